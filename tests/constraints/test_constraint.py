"""The packed mask and the conjunction of constraints."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.constraints.constraint import AllOf, pack_ids, packed_len


@dataclass
class Fixed:
    """A constraint and its own state: always the same mask, complete after so many tokens."""

    ids: set[int]
    length: int = 9
    taken: list[int] = field(default_factory=list)

    def start(self) -> Fixed:
        return Fixed(self.ids, self.length)

    def allowed(self) -> np.ndarray:
        return pack_ids(sorted(self.ids), 40)

    def advance(self, token_id: int) -> None:
        self.taken.append(token_id)

    @property
    def is_complete(self) -> bool:
        return len(self.taken) >= self.length


@given(ids=st.sets(st.integers(0, 99)), more=st.integers(0, 70))
def test_pack_ids_sets_one_bit_a_token(ids: set[int], more: int) -> None:
    mask = pack_ids(sorted(ids), 100 + more)
    assert mask.dtype == np.uint32 and mask.shape == (packed_len(100 + more),)
    assert {i for i in range(100 + more) if mask[i // 32] >> np.uint32(i % 32) & np.uint32(1)} == ids


def test_all_of_allows_what_each_allows_and_ends_with_the_first() -> None:
    state = AllOf([Fixed({1, 2, 39}), Fixed({2, 39}, length=2), Fixed({2, 3, 39})]).start()
    assert state.allowed().tolist() == pack_ids([2, 39], 40).tolist()
    completions = []
    for token_id in (2, 39):
        state.advance(token_id)
        completions.append(state.is_complete)
    assert completions == [False, True]


def test_all_of_states_are_independent() -> None:
    constraint = AllOf([Fixed({1}, length=1)])
    first, second = constraint.start(), constraint.start()
    first.advance(1)
    assert first.is_complete and not second.is_complete


def test_all_of_nothing_raises() -> None:
    with pytest.raises(ValueError, match="at least one constraint, got none"):
        AllOf([])
