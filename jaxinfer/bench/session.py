"""A model and an engine to be timed, with the steps of DynamicEngine called directly.

Owns: opening the model (checkpoint, hub id or random weights), engine settings that fit a measurement, compiling the
programs that a measurement needs.
Does not know: how steps are timed (timed_engine.py), which benchmark uses the times.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.bench.random_weights import DeviceRandomStore, RandomStore
from jaxinfer.bench.rehearsal import RecordingWrapper
from jaxinfer.bench.timed_engine import TimedEngine
from jaxinfer.bench.workload import random_prompts
from jaxinfer.checkpoint import directory
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.checkpoint.store import SafetensorsStore, TensorStore
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.step_shapes import pages_for


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


def given_config(fields: Mapping[str, Any]) -> EngineConfig:
    """The engine settings that the user gave, with the usual defaults for all others.

    Raises:
      TypeError, ValueError: a setting is wrong, or asks for several replicas.
    """
    config = EngineConfig(**fields)
    if config.data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size must be 1 here, got {config.data_parallel_size}; one engine is measured, and replicas "
            "are engines of their own"
        )
    return config


def engine_config(fields: Mapping[str, Any], model: ModelConfig, *, num_seqs: int, num_tokens: int) -> EngineConfig:
    """Engine settings for a measurement; slots and context are just large enough, unless they are given.

    Args:
      fields: the fields of EngineConfig that the user gave.
      model: the model's numbers, whose context is the upper limit.
      num_seqs: requests at once.
      num_tokens: tokens of the longest request, prompt and output together.

    Raises:
      TypeError, ValueError: as given_config.
    """
    page_size = given_config(fields).page_size
    # One page more than the tokens fill: the scheduler admits a request only while every running one has a page to
    # grow into. With fewer, the last requests of a batch would wait until others end.
    needed = (pages_for(num_tokens, page_size) + 1) * page_size
    fitting: dict[str, Any] = {
        "max_num_seqs": num_seqs,
        "max_model_len": max(2, min(needed, model.max_position_embeddings)),
        "max_num_batched_tokens": max(num_seqs, EngineConfig().max_num_batched_tokens),
    }
    return EngineConfig(**{**fitting, **fields})


class Session(TimedEngine):
    """An engine with a model, ready to be timed; a context manager that frees the device.

    Args:
      model_config: the model's numbers.
      store: its tensors.
      config: the engine's settings.
    """

    def __init__(self, model_config: ModelConfig, store: TensorStore, config: EngineConfig):
        self.model_config = model_config
        self._loaded = LoadedEngine(model_config, store, config)
        super().__init__(self._loaded.engine, config, max_model_len=self._loaded.max_model_len)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loaded.close()

    @property
    def decoder(self) -> DecoderWrapper:
        """The wrapper that runs the model."""
        return self._loaded.decoder

    def chain_len(self, num_rows: int) -> int:
        """Decode steps of a launch with so many rows."""
        chains = self.decoder.chains
        return chains.length if chains.covers(num_rows) else 1

    def wait_for_programs(self) -> None:
        """Waits for programs that are compiled in the background, which would slow down what is measured."""
        self.decoder.wait_for_programs()

    def warmup(self) -> None:
        """Compiles every program that the engine can need."""
        self._loaded.warmup()

    def compile_for(self, work: Callable[[Session], object]) -> None:
        """Compiles exactly the programs that some work will need, several at a time.

        Args:
          work: called with a session whose engine has no model, to find out which programs the work needs. There, every
            token is 0 and all times are meaningless.
        """
        wrapper = self.decoder
        recorder = RecordingWrapper(wrapper.shapes, wrapper.num_pages, wrapper.chains)
        rehearsed = copy.copy(self)
        rehearsed.engine = DynamicEngine(recorder, self.config, max_model_len=self.max_model_len)
        work(rehearsed)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda program: wrapper.compiled(*program), recorder.programs))

    def prompts(self, count: int, length: int, *seed: int) -> list[tuple[int, ...]]:
        """Random prompts of one length."""
        return random_prompts([length] * count, vocab_size=self.model_config.vocab_size, seed=seed)
