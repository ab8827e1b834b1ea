"""The shapes of the steps to come, as far as requests tell, so that their programs can be compiled ahead of time.

Owns: the guess. A wrong one costs a compilation; it never changes what a step computes.
Does not know: queues, pages, programs. Never imports jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.wrappers.step_shapes import StepShape, StepShapes, num_blocks


class Work(NamedTuple):
    """What is left to do for a sequence.

    Args:
      num_prefill: tokens to compute before it decodes.
      num_decode: decode steps after that.
    """

    num_prefill: int
    num_decode: int


def coming_shapes(shapes: StepShapes, running: Sequence[Work], waiting: Sequence[Work]) -> list[StepShape]:
    """The shapes of the next steps, nearest first and each once, if no sequence ends early.

    - Prompts that are partly computed, and those that wait while slots are free, are computed beside what decodes.
    - Then all decode.
    - Each of the others that wait takes the place of one that ends.
    - At last the sequences end one after the other, unless all are equally long.

    Args:
      shapes: the shapes of steps, without a pipeline.
      running: the sequences with a slot.
      waiting: those without one, first to run first.
    """
    num_slots = shapes.num_slots
    num_free = num_slots - len(running)
    left = [work.num_decode for work in (*running, *waiting)]

    def longer_than(end: int) -> int:
        return min(sum(tokens > end for tokens in left), num_slots)

    num_decoding = sum(not work.num_prefill and work.num_decode > 0 for work in running)
    joining = sum(num_blocks(work.num_prefill) for work in (*running, *waiting[:num_free]))
    found = [(num_decoding, joining)] if joining else []
    found.append((longer_than(0), 0))
    found += [(num_slots - 1, num_blocks(work.num_prefill)) for work in waiting[num_free:]]
    found += [(longer_than(end), 0) for end in sorted(set(left))]
    return list(dict.fromkeys(_shape(shapes, *rows) for rows in found if any(rows)))


def _shape(shapes: StepShapes, num_decode: int, num_prefill: int) -> StepShape:
    return shapes.shape(num_decode=num_decode, num_prefill=min(num_prefill, shapes.max_prefill), num_logits=num_decode)
