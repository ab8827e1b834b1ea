"""Which tokens may come next: what a rule about the text is to the engine, which knows only ids.

Owns: the two protocols (a rule, and where one sequence stands in it), the packed mask, a fixed set of tokens as a rule,
the conjunction of rules.
Does not know: text, tokenizers, requests, jax, what any rule says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

WORD_BITS = 32


class ConstraintError(RuntimeError):
    """A constraint cannot be followed any further; the sequence has to end."""


@runtime_checkable
class ConstraintState(Protocol):
    """Where one sequence stands in a constraint; changes with every token."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next; asking again before the next advance costs little.

        Raises:
          ConstraintError: nobody can say.

        Returns:
          uint32[W], W = ceil(vocab_size / 32): bit t % 32 of word t // 32 is set for an allowed token t. It may be the
          state's own memory: not to be written to, and valid until the next advance. All zeros if nothing may follow.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Takes the token that came."""
        ...

    @property
    def is_complete(self) -> bool:
        """Nothing may follow any more: the text must end here."""
        ...


@runtime_checkable
class TokenConstraint(Protocol):
    """A rule about which tokens may come; immutable, shared by any number of sequences."""

    def start(self) -> ConstraintState:
        """The state of a sequence that has no output yet.

        Several threads may call it at the same time. Every request starts one state to be checked before it is queued,
        and one a sample: a constraint whose first mask costs much had better compute it once for all of them.
        """
        ...


class OnlyThese:
    """The constraint that allows the same tokens all the time; never complete.

    Args:
      token_ids: each in 0 .. vocab_size - 1.
      vocab_size: tokens of the model.
    """

    is_complete = False

    def __init__(self, token_ids: Collection[int], vocab_size: int) -> None:
        self._mask = pack_ids(token_ids, vocab_size)

    def start(self) -> ConstraintState:
        """Itself, for it has no state."""
        return self

    def allowed(self) -> np.ndarray:
        """The mask."""
        return self._mask

    def advance(self, token_id: int) -> None:
        """Changes nothing."""


@dataclass(frozen=True, slots=True)
class AllOf:
    """The constraint that holds where all of several hold; complete when one of them is.

    Constraints that each leave tokens may leave none together: then allowed() is all zeros.

    Args:
      constraints: at least one, all for the same vocabulary size.
    """

    constraints: Sequence[TokenConstraint]

    def __post_init__(self) -> None:
        if not self.constraints:
            raise ValueError("AllOf needs at least one constraint, got none")

    def start(self) -> ConstraintState:
        """A state that starts each of the constraints."""
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
    """Words in the mask of a vocabulary.

    Example:
      >>> packed_len(32), packed_len(33)
      (1, 2)
    """
    return -(-vocab_size // WORD_BITS)


def pack_ids(token_ids: Collection[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """The mask that allows just these tokens.

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
    """Whether a mask allows any token but these.

    Example:
      >>> allows_beside(pack_ids([3, 7], 40), [7, 99]), allows_beside(pack_ids([3, 7], 40), [3, 7])
      (True, False)
    """
    if not token_ids:
        return bool(mask.any())
    num_bits = len(mask) * WORD_BITS
    return bool((mask & ~pack_ids([token_id for token_id in token_ids if token_id < num_bits], num_bits)).any())
