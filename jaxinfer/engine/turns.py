"""Whose turn it is: how the sequences are spread over the steps that are in a pipeline at the same time.

Owns: which sequences decode in a step, how many rows of prompts it prefills.
Does not know: pages, how rows are laid out, devices. Never imports jax.

In a pipeline of S stages a token is sampled when its step leaves the last stage. A sequence can therefore decode in
every S-th step only, and the sequences take turns. With one stage, all of them decode in every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.engine.waiting import WaitingQueue
from jaxinfer.wrappers.step_shapes import StepShapes, num_blocks


class Turns:
    """Chooses the sequences of each step by the steps in which they were last sampled.

    Args:
      config: the engine's settings.
      shapes: the shapes of steps, which bound how many rows and chunks a step can have.
    """

    def __init__(self, config: EngineConfig, shapes: StepShapes):
        self._num_stages = shapes.num_stages
        self._max_prefill = shapes.max_prefill
        self._shares_prefill = shapes.num_stages > 1 and config.enable_chunked_prefill
        self._prefill_share = 0
        # Every host-fed sequence may take a chunk. One chunk is kept for prompts, or they could be starved.
        self._max_host_fed = max(min(shapes.max_chunks, shapes.max_prefill) - 1, 1)

    def to_decode(self, running: Sequence[SequenceState], *, step: int) -> list[SequenceState]:
        """Sequences that decode in a step, oldest first: of the ready ones 1/S, those sampled longest ago.

        Args:
          running: the sequences with a slot, oldest first.
          step: number of the step.
        """
        ready = [s for s in running if s.is_ready and not s.is_parked and s.num_tokens < s.max_total_len]
        through = [
            sequence
            for sequence in ready
            if sequence.last_sampled + self._num_stages <= step
            and not (sequence.num_unread and self._has_to_be_read(sequence))
        ]
        share = -(-len(ready) // self._num_stages)
        if len(through) <= share and sum(s.is_host_fed for s in through) <= self._max_host_fed:
            return through
        chosen = sorted(through, key=lambda sequence: sequence.last_sampled)[:share]
        # Host-fed sequences beyond the step's chunks are left out; as the ones sampled longest ago, they come first in
        # the next step.
        beyond = [sequence for sequence in chosen if sequence.is_host_fed][self._max_host_fed :]
        return sorted((s for s in chosen if s not in beyond), key=lambda sequence: sequence.order)

    def num_prefill_rows(self, running: Sequence[SequenceState], waiting: WaitingQueue, *, num_free_slots: int) -> int:
        """How many rows of prompts a step may prefill: without pipeline or chunked prefill, as many as it can have.

        In a pipeline, the prompts are spread over as many steps as there are stages, so that every stage has work. The
        share does not shrink until all prompts are computed: a share of what is left would end in many small steps.

        Args:
          running: the sequences with a slot.
          waiting: those without one, of which the first num_free_slots could be admitted next.
          num_free_slots: slots that no sequence has.
        """
        if not self._shares_prefill:
            return self._max_prefill
        left = [sequence for sequence in running if sequence.is_prefilling] + waiting.first(num_free_slots)
        rows = sum(num_blocks(len(sequence.token_ids) - sequence.num_computed_tokens) for sequence in left)
        self._prefill_share = max(self._prefill_share, -(-rows // self._num_stages)) if rows else 0
        return min(self._prefill_share, self._max_prefill)

    def _has_to_be_read(self, sequence: SequenceState) -> bool:
        """Whether the host has to read a sequence's last token before it can schedule the sequence again.

        A constrained sequence needs a mask that follows from that token, but only when the step is sampled. In a
        pipeline that is some launches after the step has entered, and by then the token has been read.
        """
        return sequence.is_host_fed or (sequence.constraint is not None and self._num_stages == 1)
