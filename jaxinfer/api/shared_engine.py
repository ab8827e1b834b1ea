"""An engine that several processes hold together.

Owns: the checks that all processes make the same LLM, which replicas this process has a part of, and how a model's
wrapper becomes part of the run.
Does not know: requests, text, how steps are sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer.communication.mesh import processes_of_replicas
from jaxinfer.communication.process_group import Members
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.distributed import LeaderRun, Run, find_run
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.assembly import context_length
from jaxinfer.wrappers.holders import Holders
from jaxinfer.wrappers.leading import ModelKey
from jaxinfer.wrappers.remote_model import RemoteModel
from jaxinfer.wrappers.step_shapes import StepShapes

OPENING = "making the LLM"
"""What all processes do together while an LLM is made; errors name it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedReplica:
    """One replica of a model as this process sees it: it holds a part of it, or leads those that do.

    Args:
      run: the run.
      engine: number of the engine, the same on all processes.
      replica: number of the replica.
      holders: the processes on whose devices it is.
    """

    run: Run
    engine: int
    replica: int
    holders: Holders

    def join(
        self, wrapper: AbstractModelInferenceWrapper, model_config: ModelConfig, *, is_draft: bool
    ) -> AbstractModelInferenceWrapper:
        """Makes a loaded model's wrapper part of the run.

        Args:
          wrapper: runs the model on this process's devices.
          model_config: the model's numbers.
          is_draft: whether it is the engine's draft model.

        Returns:
          On the leader a wrapper that runs each step on all processes that hold the model; elsewhere the same wrapper,
          which belongs to the leader's steps from now on.
        """
        key, process_ids = ModelKey(self.engine, self.replica, int(is_draft)), self.holders.process_ids
        if not isinstance(self.run, LeaderRun):
            return self.run.steps.join(wrapper, key, process_ids, vocab_size=model_config.vocab_size)
        return self.run.steps.join(wrapper, key, process_ids)

    def join_remote(
        self, model_config: ModelConfig, config: EngineConfig, *, is_draft: bool
    ) -> AbstractModelInferenceWrapper:
        """A wrapper that runs each step on the processes that hold a model, if this one, the leader, has no part of it.

        Args:
          model_config, is_draft: as join's.
          config: the engine's settings.

        Raises:
          GatherError: one of the processes could not load its part.
        """
        wrapper = RemoteModel(
            self.run.group,
            StepShapes.on_platform(
                jax.devices()[0].platform, config, max_model_len=context_length(config, model_config)
            ),
            num_pages=config.num_kv_pages or self.holders.fewest_pages(),
            span=model_config.widest_span(config.span),
            vocab_size=model_config.vocab_size,
        )
        return self.join(wrapper, model_config, is_draft=is_draft)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedEngine:
    """This process's part of an engine that all processes of a run hold together.

    Args:
      run: the run.
      number: of the engine, the same on all processes.
      config: its settings.
    """

    run: Run
    number: int
    config: EngineConfig

    def replicas(self) -> list[SharedReplica]:
        """The replicas of which this process holds a part; on the leader all of them.

        Raises:
          ValueError: there are too few devices, or a process has none in any replica.
        """
        group, config = self.run.group, self.config
        found = processes_of_replicas(config)
        idle = sorted(set(group.everyone.ids) - {process_id for ids in found for process_id in ids})
        if idle:
            sizes = f"{config.data_parallel_size} x {config.pipeline_parallel_size} x {config.tensor_parallel_size}"
            raise ValueError(
                f"no device of process {', '.join(map(str, idle))} is needed for {sizes} (replicas x pipeline stages x "
                "tensor shards); raise a parallel size, or start fewer processes"
            )
        parts = [
            SharedReplica(
                run=self.run, engine=self.number, replica=replica, holders=Holders(group, Members(ids, self.number))
            )
            for replica, ids in enumerate(found)
        ]
        return [part for part in parts if group.is_leader or part.holders.are_here]

    def least(self, what: str, value: int) -> int:
        """The smallest of the values that all processes have.

        Raises:
          GatherError: a process failed.
        """
        return min(map(int, self.run.group.gather(what, str(value))))

    def require_same_checkpoint(self, fingerprint: str) -> None:
        """Refuses to go on if the processes have different weights before them.

        Raises:
          GatherError: they have; the message names a process and both fingerprints.
        """
        self.run.group.agree("the checkpoint's fingerprint", fingerprint)


@contextlib.contextmanager
def opened(config: EngineConfig, *, model: str | Path | None, tokenizer: object) -> Iterator[SharedEngine | None]:
    """A block in which all processes of the run load the same model; None if this process runs alone.

    Args:
      config: the engine's settings.
      model, tokenizer: as given to LLM; model is None for weights in memory.

    Raises:
      ValueError: this process makes another LLM than the leader; the message names what differs.
      GatherError: another process does, or failed while it was loading; the message names it.
    """
    run = find_run(gpu_memory_utilization=config.gpu_memory_utilization)
    if run is None:
        yield None
        return
    description: dict[str, Any] = {
        "model": None if model is None else str(model),
        "tokenizer": tokenizer if tokenizer is None else str(tokenizer),
        "engine": dataclasses.asdict(config),
    }
    if isinstance(run, LeaderRun):
        number, theirs = run.calls.open(json.dumps(description)), description
    else:
        number, text = run.calls.next_opened()
        theirs = json.loads(text)
    try:
        with run.group.together(OPENING):
            _require_same(description["engine"], theirs["engine"], run)
            yield SharedEngine(run=run, number=number, config=config)
    except BaseException:
        run.steps.drop(number)
        raise
    finally:
        run.group.forget(number)


def _require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], run: Run) -> None:
    for name, value in ours.items():
        if value != theirs.get(name):
            raise ValueError(
                f"{name} must be the same on all processes: process {run.group.process_id} has {value!r}, process 0 "
                f"has {theirs.get(name)!r}"
            )
