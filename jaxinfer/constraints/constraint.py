"""TokenConstraint: a rule about the output in a form that the engine can use, a mask of allowed tokens at each step.

For example, "the output is a JSON object" becomes: of an empty output, the next token must be one of those that begin
with "{"; and so on after every token. The engine asks for the mask, samples from it and reports the sampled token.

Owns: the protocols TokenConstraint (the rule) and ConstraintState (the position of one sequence in it), the packed
mask, a fixed set of tokens as a constraint (TokenSet), the conjunction of constraints (AllOf).
Does not know: text, tokenizers, requests, jax, the meaning of any rule.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

WORD_BITS = 32


class ConstraintError(RuntimeError):
    """A constraint cannot tell what may come next, or got a token that it did not allow; its sequence must end."""


@runtime_checkable
class ConstraintState(Protocol):
    """The position of one sequence in a constraint; it moves on with every token."""

    def allowed(self) -> np.ndarray:
        """Returns the mask of the tokens that may come next. Asking again before the next advance costs little.

        Returns:
          uint32[W], W = ceil(vocab_size / 32): bit t % 32 of word t // 32 is set if token t is allowed. All zeros if no
          token may follow. The array may be the state's own memory: do not write to it, and do not use it after the
          next advance.

        Raises:
          ConstraintError: the constraint cannot tell.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Moves on by the token that was sampled."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the text must end here because nothing may follow."""
        ...


@runtime_checkable
class TokenConstraint(Protocol):
    """A rule about which tokens may come next; immutable, so that any number of sequences can share it."""

    def start(self) -> ConstraintState:
        """Makes the state of a sequence that has no output yet.

        Several threads may call it at the same time. It is called twice or more per request: once for a check before
        the request is queued, then once for each sample. A constraint whose first mask is expensive should therefore
        compute that mask once and share it.
        """
        ...


class TokenSet:
    """The constraint that allows the same tokens at every step; it is never complete.

    Args:
      token_ids: each in 0 .. vocab_size - 1.
      vocab_size: tokens of the model.
    """

    is_complete = False

    def __init__(self, token_ids: Collection[int], vocab_size: int) -> None:
        self._mask = pack_ids(token_ids, vocab_size)

    def start(self) -> ConstraintState:
        """Returns itself, since it has no state."""
        return self

    def allowed(self) -> np.ndarray:
        """Returns the mask of the given tokens."""
        return self._mask

    def advance(self, token_id: int) -> None:
        """Changes nothing."""


@dataclass(frozen=True, slots=True)
class AllOf:
    """The conjunction of several constraints: it allows a token if all of them do, and is complete when one of them is.

    Constraints that each allow some tokens may have none in common: then allowed() is all zeros.

    Args:
      constraints: at least one, all for the same vocabulary size.
    """

    constraints: Sequence[TokenConstraint]

    def __post_init__(self) -> None:
        if not self.constraints:
            raise ValueError("AllOf needs at least one constraint, got none")

    def start(self) -> ConstraintState:
        """Makes a state that holds one started state of each constraint."""
        return _AllOfState([constraint.start() for constraint in self.constraints])


class _AllOfState:
    def __init__(self, states: list[ConstraintState]) -> None:
        self._states = states

    def allowed(self) -> np.ndarray:
        return np.bitwise_and.reduce([state.allowed() for state in self._states])

    def advance(self, token_id: int) -> None:
        for state in self._states:
            state.advance(token_id)

    @property
    def is_complete(self) -> bool:
        return any(state.is_complete for state in self._states)


def packed_len(vocab_size: int) -> int:
    """Number of 32-bit words in the mask of a vocabulary.

    Example:
      >>> packed_len(32), packed_len(33)
      (1, 2)
    """
    return -(-vocab_size // WORD_BITS)


def pack_ids(token_ids: Collection[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Makes the mask that allows exactly these tokens.

    Args:
      token_ids: each in 0 .. vocab_size - 1, in any order.
      vocab_size: tokens of the model.

    Returns:
      uint32[ceil(vocab_size / 32)]

    Example:
      >>> pack_ids([0, 33], 40).tolist()
      [1, 2]
    """
    bits = np.zeros(packed_len(vocab_size) * WORD_BITS, np.bool_)
    bits[np.asarray(token_ids, np.intp)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def allows_beside(mask: np.ndarray, token_ids: Collection[int]) -> bool:
    """Whether a mask allows any token other than the given ones.

    Example:
      >>> allows_beside(pack_ids([3, 7], 40), [7, 99]), allows_beside(pack_ids([3, 7], 40), [3, 7])
      (True, False)
    """
    if not token_ids:
        return bool(mask.any())
    num_bits = len(mask) * WORD_BITS
    return bool((mask & ~pack_ids([token_id for token_id in token_ids if token_id < num_bits], num_bits)).any())
