"""An engine to be timed, whose steps are called directly.

Owns: batches of requests, timing their prefill and their decode steps.
Does not know: what computes the steps, which benchmark uses the times.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import Request

_BATCH_BROKE = (
    "not all {} rows decode together for as long as they are timed; raise max_model_len or num_kv_pages, or lower "
    "batch_size, prompt_len or output_len"
)


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
      run_steps: called with n, runs the engine until every row has n more tokens, and returns how many they got: more
        where steps are launched in chains.
      mean_len: tokens of a row so far, prompt included, mean over the rows.
    """

    run_steps: Callable[[int], int]
    mean_len: float

    def run(self, num_steps: int) -> float:
        """Runs num_steps steps, or whole chains up to there, and returns the seconds of one, their mean."""
        started = time.perf_counter()
        num_run = self.run_steps(num_steps)
        self.mean_len += num_run
        return (time.perf_counter() - started) / num_run


class TimedEngine:
    """An engine that runs nothing but what is timed.

    Args:
      engine: the engine.
      config: its settings.
      max_model_len: tokens of the longest request.
    """

    def __init__(self, engine: DynamicEngine, config: EngineConfig, *, max_model_len: int):
        self.engine = engine
        self.config = config
        self.max_model_len = max_model_len
        self._ids = itertools.count()

    def generate(self, prompts: Sequence[tuple[int, ...]], output_len: int) -> list[list[int]]:
        """Greedy tokens of all prompts, which run together; the end token is ignored."""
        return self.serve(prompts, [output_len] * len(prompts))

    def serve(self, prompts: Sequence[tuple[int, ...]], output_lens: Sequence[int]) -> list[list[int]]:
        """Greedy tokens of all requests, output_lens of each; those without a slot wait; the end token is ignored."""
        ids = self._add(prompts, output_lens)
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
        lengths = dict(zip(self._add(prompts, [self._room(prompts)] * len(prompts)), map(len, prompts), strict=True))
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

    def _decode(self, ids: Mapping[str, int], num_steps: int) -> int:
        """Runs the engine until every row has num_steps more tokens; returns how many they got.

        With pipeline stages that takes more launches than num_steps, as each brings tokens of some rows only.
        """
        counts = dict.fromkeys(ids, 0)
        while sum(counts.values()) < num_steps * len(ids):
            if not self.engine.has_unfinished() or max(counts.values()) > min(counts.values()) + 1:
                raise ValueError(_BATCH_BROKE.format(len(ids)))
            for event in self.engine.step():
                counts[event.request_id] += 1
        return min(counts.values())

    def _room(self, prompts: Sequence[tuple[int, ...]]) -> int:
        return max(1, self.max_model_len - max(map(len, prompts)))

    def _add(self, prompts: Sequence[tuple[int, ...]], output_lens: Sequence[int]) -> list[str]:
        ids = [f"bench-{next(self._ids)}" for _ in prompts]
        for request_id, prompt, max_tokens in zip(ids, prompts, output_lens, strict=True):
            self.engine.add_request(Request(request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens))
        return ids

    def _abort(self, ids: Mapping[str, int]) -> None:
        for request_id in ids:
            self.engine.abort(request_id)
        for _ in range(2 * self.config.pipeline_parallel_size):  # results of steps launched ahead are dropped
            self.engine.step()
