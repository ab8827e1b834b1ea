"""Chains: several decode steps in a row that are launched at once, as one program.

A step of a small model takes a GPU less time than the host takes to launch it: with the 0.6B shape on an H100, 0.93 ms
on the device and 1.75 ms in all. A chain is launched once for all its steps.

Owns: how many steps a chain has, and which steps can be in one.
Does not know: queues, devices, how a chain is computed.
"""

from __future__ import annotations

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.wrappers.step_batch import StepBatch

CHAIN_LEN = 8
"""Steps of a chain where the settings name no number. Its tokens arrive together, so that longer ones are felt."""
MAX_WEIGHT_BYTES = 6e9
"""Bytes of weights on a device up to which launching takes longer than computing: an H100 reads as many in 2 ms."""


def chain_len(config: EngineConfig, *, platform: str, weight_bytes: int) -> int:
    """How many decode steps a launch computes at most; 1 for no chains.

    Args:
      config: the engine's settings.
      platform: JAX's name of the devices' platform.
      weight_bytes: bytes of the parameters that a device holds.
    """
    # In a pipeline, a sequence decodes in every S-th step only; drafts are chosen by the host.
    if config.pipeline_parallel_size > 1 or config.draft_model is not None:
        return 1
    if config.steps_per_launch is not None:
        return config.steps_per_launch
    return CHAIN_LEN if platform == "gpu" and weight_bytes <= MAX_WEIGHT_BYTES else 1


def can_chain(batch: StepBatch) -> bool:
    """Whether a step can be in a chain: it decodes, samples without logit edits and reports nothing but tokens."""
    return not (
        batch.shape.num_prefill
        or len(batch.page_copies)
        or batch.edited
        or batch.num_top is not None
        or batch.taps is not None
    )
