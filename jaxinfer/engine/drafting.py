"""Drafts for speculative decoding: guesses of the next tokens, which the model verifies several at a time.

Owns: the protocol of what proposes drafts, and one that needs no model, prompt lookup.
Does not know: devices. Never imports jax.

A draft is right if the sampler chooses the same token. The sampler's noise depends only on seed, position and token, so
the output is the same, token for token, as when decoding one token at a time; only the number of steps differs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxinfer.config.attention_span import AttentionSpan
from jaxinfer.engine.schedule import Schedule
from jaxinfer.engine.sequence import SequenceState

PROMPT_LOOKUP = "prompt-lookup"
"""The value of EngineConfig.draft_model that selects PromptLookup."""
NGRAM_LENS = (3, 2)
"""How many of the last tokens have to occur earlier in the text; a longer match is preferred."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes drafts for host-fed sequences."""

    @property
    def span(self) -> AttentionSpan:
        """Which KV pages of a text proposing reads."""
        ...

    def plan(self, sequence: SequenceState, most: int) -> Sequence[int]:
        """Tokens that may follow a sequence's last one.

        Args:
          sequence: the sequence, all of whose tokens have been read.
          most: how many tokens may be proposed.

        Returns:
          The drafts, or as many placeholders, which complete will replace.
        """
        ...

    def complete(self, schedule: Schedule) -> Schedule:
        """The schedule with drafts in place of placeholders; called for every schedule before its launch."""
        ...


class PromptLookup:
    """Proposes the tokens that followed the last tokens of a text where these occurred earlier in it.

    Where the earlier occurrence is so near the end that fewer tokens follow it than are wanted, these are repeated: to
    a text ending in 7, 8, 7, 8, 7, 8 it proposes 7, 8, 7, 8.

    Args:
      num_tokens: tokens to propose at a time, at most.

    Source: Saxena 2023, "Prompt lookup decoding". Here a longer match is preferred to a shorter one, and among matches
    of one length the latest.
    """

    def __init__(self, num_tokens: int):
        self.span = AttentionSpan(1)  # no pages
        self._num_tokens = num_tokens
        self._indexes: weakref.WeakKeyDictionary[SequenceState, _NgramIndex] = weakref.WeakKeyDictionary()

    def plan(self, sequence: SequenceState, most: int) -> Sequence[int]:
        """See Drafter.plan."""
        index = self._indexes.setdefault(sequence, _NgramIndex())
        return index.continuation(sequence.token_ids, min(most, self._num_tokens))

    def complete(self, schedule: Schedule) -> Schedule:
        """The schedule as it is, since plan has returned drafts, not placeholders."""
        return schedule


class _NgramIndex:
    """Finds where in a growing text each n-gram occurred last."""

    def __init__(self) -> None:
        self._num_indexed = 0
        self._ends: dict[tuple[int, ...], int] = {}

    def continuation(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """`most` tokens that follow the latest earlier occurrence of the text's end; none if there is none."""
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
