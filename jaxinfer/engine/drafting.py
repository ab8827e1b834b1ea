"""Proposals for the next tokens, which the model verifies several at a time.

Owns: the protocol, and prompt lookup.
Does not know: devices. Never imports jax.

A draft is right if the sampler, whose noise depends on nothing but seed, position and token, chooses the same token. So
the output is that of decoding one token at a time, token for token, whoever proposes; only the number of steps differs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxinfer.engine.schedule import Schedule, SequenceState

PROMPT_LOOKUP = "prompt-lookup"
"""EngineConfig.draft_model for PromptLookup."""
NGRAM_LENS = (3, 2)
"""Tokens that have to be the same, the more the better."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens of sequences that the host feeds."""

    def plan(self, sequence: SequenceState, most: int) -> Sequence[int]:
        """Tokens that may follow a sequence's last one.

        Args:
          sequence: all its tokens are read.
          most: as many as may be proposed.

        Returns:
          The tokens, or as many placeholders that complete replaces.
        """
        ...

    def complete(self, schedule: Schedule) -> Schedule:
        """A schedule with tokens in place of placeholders; called for every schedule before its launch."""
        ...


class PromptLookup:
    """Proposes what followed the last tokens where they occurred before.

    Args:
      num_tokens: proposed at a time, at most.

    A text that repeats itself is expected to go on so: where the earlier occurrence is near the end, what followed it
    is repeated.

    Source: Saxena 2023, "Prompt lookup decoding"; here the latest occurrence counts, and a longer one before a shorter.
    """

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._indexes: weakref.WeakKeyDictionary[SequenceState, _NgramIndex] = weakref.WeakKeyDictionary()

    def plan(self, sequence: SequenceState, most: int) -> Sequence[int]:
        """As Drafter's."""
        index = self._indexes.setdefault(sequence, _NgramIndex())
        return index.continuation(sequence.token_ids, min(most, self._num_tokens))

    def complete(self, schedule: Schedule) -> Schedule:
        """As Drafter's; nothing is left to do."""
        return schedule


class _NgramIndex:
    """Where each run of tokens of a growing text occurred last."""

    def __init__(self) -> None:
        self._num_indexed = 0
        self._ends: dict[tuple[int, ...], int] = {}

    def continuation(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """Up to `most` tokens behind the latest earlier occurrence of the text's end."""
        for end in range(self._num_indexed + 1, len(token_ids)):
            for length in NGRAM_LENS:
                if end >= length:
                    self._ends[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(len(token_ids) - 1, 0)
        for length in NGRAM_LENS:
            end = self._ends.get(tuple(token_ids[-length:]))
            if end is not None:
                return list(itertools.islice(itertools.cycle(token_ids[end : end + most]), most))
        return ()
