"""Chains: several decode steps in a row that are launched at once, as one program.

A step of a small model takes a GPU less time than the host takes to launch it: with the 0.6B shape on an H100, 0.93 ms
on the device and 1.75 ms in all. A chain is launched once for all its steps.

Owns: how many steps a chain has, and which steps can begin one.
Does not know: queues, devices, how a chain is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.wrappers.step_batch import StepBatch

CHAIN_LEN = 8
"""Steps of a chain where the settings name no number. Its tokens arrive together, so that longer ones are felt."""
MAX_WEIGHT_BYTES, MAX_ROWS = 6e9, 32
"""Bytes of weights on a device, and rows of a step, up to which launching can take longer than computing. Steps that
only waited for the host took 1.7 to 2.6 ms beside an H100, which reads 6 GB in 2 ms, and computes 32 rows of the 0.6B
shape in 2.4 ms."""


@dataclass(frozen=True, kw_only=True)
class ChainRule:
    """Which steps are launched together.

    Args:
      length: steps of a chain; 1 for no chains.
      max_rows: rows of a step that can be in one; None for any number.
    """

    length: int = 1
    max_rows: int | None = None

    @classmethod
    def of(cls, config: EngineConfig, *, platform: str, weight_bytes: int) -> ChainRule:
        """The rule for a model.

        Args:
          config: the engine's settings.
          platform: JAX's name of the devices' platform.
          weight_bytes: bytes of the parameters that a device holds.
        """
        # In a pipeline, a sequence decodes in every S-th step only; drafts are chosen by the host.
        if config.pipeline_parallel_size > 1 or config.draft_model is not None:
            return cls()
        if config.steps_per_launch is not None:
            return cls(length=config.steps_per_launch)
        if platform == "gpu" and weight_bytes <= MAX_WEIGHT_BYTES:
            return cls(length=CHAIN_LEN, max_rows=MAX_ROWS)
        return cls()

    def covers(self, num_rows: int) -> bool:
        """Whether steps of so many rows can be in chains."""
        return self.length > 1 and (self.max_rows is None or num_rows <= self.max_rows)

    def chain_len(self, batch: StepBatch) -> int:
        """How many steps can be launched together if a step is the first; 1 if it has to be launched alone.

        Steps of a chain decode, sample without logit edits and report nothing but tokens.
        """
        is_plain = not (
            batch.shape.num_prefill
            or len(batch.page_copies)
            or batch.edited
            or batch.num_top is not None
            or batch.taps is not None
        )
        return self.length if is_plain and self.covers(batch.shape.num_decode) else 1


NO_CHAINS = ChainRule()
"""Every step is launched alone."""
