"""A model and an engine to be timed, with the steps of DynamicEngine called directly.

Owns: opening the model (checkpoint, hub id or random weights), engine settings that fit a measurement, timing steps.
Does not know: which benchmark uses the times.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.bench.random_weights import DeviceRandomStore, RandomStore
from jaxinfer.bench.rehearsal import RecordingWrapper
from jaxinfer.bench.workload import random_prompts
from jaxinfer.checkpoint import directory
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.checkpoint.store import SafetensorsStore, TensorStore
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import Request
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.step_shapes import pages_for

_BATCH_BROKE = (
    "not all {} rows decode together for as long as they are timed; raise max_model_len or num_kv_pages, or lower "
    "batch_size, prompt_len or output_len"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The model to measure.

    Args:
      model: a checkpoint directory, a hub id, or "demo".
      random_weights: a config.json (or a directory with one) to measure that shape with random weights; None to measure
        `model`.
      seed: of the random weights.
    """

    model: str = DEMO
    random_weights: Path | None = None
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """Which model was measured, for the settings in the result's JSON."""
        model = None if self.random_weights else self.model
        return {"model": model, "random_weights": self.random_weights, "seed": self.seed}

    def fields(self) -> dict[str, Any]:
        """The fields of config.json.

        Raises:
          FileNotFoundError, ValueError: there is no such model, or its config.json is broken.
        """
        if self.random_weights is not None:
            path = self.random_weights
            return directory.read_json(path / "config.json" if path.is_dir() else path)
        return directory.read_json(self.path() / "config.json")

    def path(self) -> Path:
        """The checkpoint's directory.

        Raises:
          FileNotFoundError: there is no such checkpoint.
        """
        return directory.resolve(self.model)

    def store(self, config: ModelConfig) -> TensorStore:
        """The model's tensors; random weights are drawn on the host for CPUs, and on the device otherwise."""
        if self.random_weights is not None:
            return (RandomStore if jax.default_backend() == "cpu" else DeviceRandomStore)(config, self.seed)
        return SafetensorsStore(directory.weight_files(self.path()))


def engine_config(fields: Mapping[str, Any], model: ModelConfig, *, num_seqs: int, num_tokens: int) -> EngineConfig:
    """Engine settings for a measurement; slots and context are just large enough, unless they are given.

    Args:
      fields: the fields of EngineConfig that the user gave.
      model: the model's numbers, whose context is the upper limit.
      num_seqs: requests at once.
      num_tokens: tokens of the longest request, prompt and output together.
    """
    page_size = EngineConfig(**fields).page_size
    # One page more than the tokens fill: the scheduler admits a request only while every running one has a page to
    # grow into. With fewer, the last requests of a batch would wait until others end.
    needed = (pages_for(num_tokens, page_size) + 1) * page_size
    fitting: dict[str, Any] = {
        "max_num_seqs": num_seqs,
        "max_model_len": max(2, min(needed, model.max_position_embeddings)),
        "max_num_batched_tokens": max(num_seqs, EngineConfig().max_num_batched_tokens),
    }
    return EngineConfig(**{**fitting, **fields})


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """The times of one batch.

    Args:
      prefill_s: seconds from the first launch to the first token of the last prompt, while no row decodes.
      decode_s: seconds for one more token of every row.
      mean_context: KV positions that a row reads in a decode step, mean over the timed steps.
    """

    prefill_s: float
    decode_s: float
    mean_context: float


@dataclass(slots=True)
class Decoding:
    """A batch of requests whose prompts are prefilled, so that all of them decode.

    Args:
      run_steps: called with n, runs the engine until every row has n more tokens.
      mean_len: tokens of a row so far, prompt included, mean over the rows.
    """

    run_steps: Callable[[int], None]
    mean_len: float

    def run(self, num_steps: int) -> float:
        """Runs num_steps steps and returns the seconds of one, their mean."""
        started = time.perf_counter()
        self.run_steps(num_steps)
        self.mean_len += num_steps
        return (time.perf_counter() - started) / num_steps


class Session:
    """An engine with a model, ready to be timed; a context manager that frees the device.

    Args:
      model_config: the model's numbers.
      store: its tensors.
      config: the engine's settings.
    """

    def __init__(self, model_config: ModelConfig, store: TensorStore, config: EngineConfig):
        self.model_config = model_config
        self.config = config
        self._loaded = LoadedEngine(model_config, store, config)
        self.engine = self._loaded.engine
        self._ids = itertools.count()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loaded.close()

    def warmup(self) -> None:
        """Compiles every program that the engine can need."""
        self._loaded.warmup()

    def compile_for(self, work: Callable[[Session], object]) -> None:
        """Compiles exactly the programs that some work will need, several at a time.

        Args:
          work: called with a session whose engine has no model, to find out which programs the work needs. There, every
            token is 0 and all times are meaningless.
        """
        wrapper = self._loaded.wrapper
        assert isinstance(wrapper, DecoderWrapper)  # a bench runs in one process
        recorder = RecordingWrapper(wrapper.shapes, wrapper.num_pages)
        rehearsed = copy.copy(self)
        rehearsed.engine = DynamicEngine(recorder, self.config, max_model_len=self._loaded.max_model_len)
        work(rehearsed)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda program: wrapper.compiled(*program), recorder.programs))

    def prompts(self, count: int, length: int, *seed: int) -> list[tuple[int, ...]]:
        """Random prompts of one length."""
        return random_prompts([length] * count, vocab_size=self.model_config.vocab_size, seed=seed)

    def generate(self, prompts: Sequence[tuple[int, ...]], output_len: int) -> list[list[int]]:
        """Greedy tokens of all prompts, which run together; the end token is ignored."""
        ids = self._add(prompts, output_len)
        tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
        while self.engine.has_unfinished():
            for event in self.engine.step():
                tokens[event.request_id].append(event.token_id)
        return list(tokens.values())

    def time_steps(self, prompts: Sequence[tuple[int, ...]], num_steps: int) -> StepTimes:
        """Times the prefill of a batch, then decode steps in which all its rows take part.

        The prompts are submitted twice: first for one token only, which times the prefill, then again to decode.
        Decoding is timed from the moment when every row has a token, so that no prefill is included. The prefix cache
        makes the second prefill short.

        Args:
          prompts: the batch; use new prompts each time, as the prefix cache would spare known ones their prefill.
          num_steps: decode steps to time.

        Raises:
          ValueError: rows end, wait or are preempted while they are timed, or a draft model makes steps bring several
            tokens; the message names the settings to change.
        """
        started = time.perf_counter()
        self.generate(prompts, 1)
        prefill_s = time.perf_counter() - started
        with self.decoding(prompts) as decoding:
            mean_context = decoding.mean_len + (num_steps - 1) / 2
            decode_s = decoding.run(num_steps)
        return StepTimes(prefill_s=prefill_s, decode_s=decode_s, mean_context=mean_context)

    @contextlib.contextmanager
    def decoding(self, prompts: Sequence[tuple[int, ...]]) -> Iterator[Decoding]:
        """A context in which all prompts are prefilled and every row decodes; at its end they are aborted.

        Raises:
          ValueError: rows end, wait or are preempted inside, or a draft model makes steps bring several tokens; the
            message names the settings to change.
        """
        if self.config.draft_model is not None:
            raise ValueError(
                "steps are timed one token at a time; leave draft_model out, or measure with bench throughput"
            )
        lengths = dict(zip(self._add(prompts, self._room(prompts)), map(len, prompts), strict=True))
        try:
            self._begin(lengths)
            yield Decoding(lambda num_steps: self._decode(lengths, num_steps), sum(lengths.values()) / len(lengths))
        finally:
            self._abort(lengths)

    def _begin(self, lengths: dict[str, int]) -> None:
        """Runs the engine until every request has a token; adds the tokens to lengths."""
        waiting = set(lengths)
        while waiting:
            if not self.engine.has_unfinished():
                raise ValueError(_BATCH_BROKE.format(len(lengths)))
            for event in self.engine.step():
                waiting.discard(event.request_id)
                lengths[event.request_id] += 1

    def _decode(self, ids: Mapping[str, int], num_steps: int) -> None:
        """Runs the engine until every row has num_steps more tokens.

        With pipeline stages that takes more launches than num_steps, as each brings tokens of some rows only.
        """
        counts = dict.fromkeys(ids, 0)
        while sum(counts.values()) < num_steps * len(ids):
            if not self.engine.has_unfinished() or max(counts.values()) > min(counts.values()) + 1:
                raise ValueError(_BATCH_BROKE.format(len(ids)))
            for event in self.engine.step():
                counts[event.request_id] += 1

    def _room(self, prompts: Sequence[tuple[int, ...]]) -> int:
        return max(1, self._loaded.max_model_len - max(map(len, prompts)))

    def _add(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[str]:
        ids = [f"bench-{next(self._ids)}" for _ in prompts]
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.engine.add_request(Request(request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens))
        return ids

    def _abort(self, ids: Mapping[str, int]) -> None:
        for request_id in ids:
            self.engine.abort(request_id)
        for _ in range(2 * self.config.pipeline_parallel_size):  # results of steps launched ahead are dropped
            self.engine.step()
