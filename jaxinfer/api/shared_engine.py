"""An engine that several processes hold together.

Owns: the checks that all processes make the same LLM, and how a model's wrapper becomes part of the run.
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

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.distributed import LeaderRun, Run, find_run
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.leading import ModelKey


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedEngine:
    """This process's part of an engine that all processes of a run hold together.

    Args:
      run: the run.
      number: of the engine, the same on all processes.
    """

    run: Run
    number: int

    def join(
        self, wrapper: AbstractModelInferenceWrapper, *, model: int, vocab_size: int
    ) -> AbstractModelInferenceWrapper:
        """Makes a loaded model's wrapper part of the run.

        Args:
          wrapper: runs the model on this process's devices.
          model: 0 for the engine's model, 1 for its draft model.
          vocab_size: of the model.

        Returns:
          On the leader a wrapper that runs each step on all processes; elsewhere the same wrapper, which belongs to the
          leader's steps from now on.
        """
        key = ModelKey(self.number, model)
        if isinstance(self.run, LeaderRun):
            return self.run.steps.join(wrapper, key)
        return self.run.steps.join(wrapper, key, vocab_size=vocab_size)

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
    if config.data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size must be 1 in a run of several processes, got {config.data_parallel_size}; start a run "
            "for each replica"
        )
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
        with run.group.together("making the LLM"):
            _require_same(description["engine"], theirs["engine"], run)
            yield SharedEngine(run=run, number=number)
    except BaseException:
        run.steps.drop(number)
        raise


def _require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], run: Run) -> None:
    for name, value in ours.items():
        if value != theirs.get(name):
            raise ValueError(
                f"{name} must be the same on all processes: process {run.group.process_id} has {value!r}, process 0 "
                f"has {theirs.get(name)!r}"
            )
