"""PageAllocator against a model that remembers every page's owners, content and last use in plain dictionaries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from jaxinfer.engine.page_allocator import PageAllocator, next_page_hash

PAGE_SIZE = 2
contents = st.integers(0, 1)


def chain(text: tuple[int, ...]) -> list[bytes]:
    """Hashes of a text whose i-th page holds text[i] twice."""
    pages = ([content] * PAGE_SIZE for content in text)
    return list(accumulate(pages, next_page_hash, initial=b""))[1:]


@dataclass(eq=False)
class Owner:
    """One request: its text by page, its pages, and how many were offered for publication."""

    text: tuple[int, ...]
    pages: list[int]
    num_offered: int


@dataclass
class Cached:
    """What the model knows of a findable page."""

    text: tuple[int, ...]
    parent: int
    last_used: int = 0


class PageAllocatorMachine(RuleBasedStateMachine):
    owners = Bundle("owners")

    @initialize(num_pages=st.integers(1, 6))
    def create(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.all_pages = set(range(1, num_pages + 1))
        self.counts: Counter[int] = Counter()
        self.cached: dict[int, Cached] = {}
        self.clock = 0

    def free(self) -> set[int]:
        return {page for page in self.all_pages if not self.counts[page] and page not in self.cached}

    def idle(self) -> set[int]:
        return {page for page in self.cached if not self.counts[page]}

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.free() | self.idle()):
            with pytest.raises(ValueError, match=f"{count} pages wanted"):
                self.allocator.allocate(count)
            return None
        pages = self.allocator.allocate(count)
        assert len(pages) == count
        for page in pages:
            if self.free():
                assert page in self.free()
            else:
                assert self.cached[page].last_used == min(self.cached[idle].last_used for idle in self.idle())
                del self.cached[page]
            self.counts[page] = 1
        return pages

    @rule(target=owners, text=st.lists(contents, min_size=1, max_size=4).map(tuple))
    def start(self, text: tuple[int, ...]):
        found = self.allocator.find(chain(text))
        known = {entry.text: page for page, entry in self.cached.items()}
        assert found == [known.get(text[:end], 0) for end in range(1, len(text) + 1)]
        found = [page for page in found if page]  # those in front, as no page is left without the one before it
        idle = len(set(found) & self.idle())
        assert self.allocator.num_idle(found) == idle
        if len(text) - len(found) + idle > self.allocator.num_available:
            return multiple()
        self.allocator.share(found)
        self.counts.update(found)
        return Owner(text, found + (self.allocate(len(text) - len(found)) or []), len(found))

    @rule(owner=owners, content=contents)
    def grow(self, owner: Owner, content: int) -> None:
        pages = self.allocate(1)
        if pages:
            owner.pages += pages
            owner.text = (*owner.text, content)

    @rule(count=st.integers(7, 20))
    def allocate_too_many(self, count: int) -> None:
        assert self.allocate(count) is None

    @rule(owner=owners, count=st.integers(1, 5))
    def publish(self, owner: Owner, count: int) -> None:
        for _ in range(min(count, len(owner.pages) - owner.num_offered)):
            self.publish_next(owner)

    def publish_next(self, owner: Owner) -> None:
        i = owner.num_offered
        page, parent, text = owner.pages[i], owner.pages[i - 1] if i else 0, owner.text[: i + 1]
        is_new = text not in {entry.text for entry in self.cached.values()}
        publishable = is_new and (not parent or parent in self.cached)
        expected = page in self.cached or publishable
        assert self.allocator.publish(page, chain(text)[-1], parent=parent) == expected
        if publishable:
            self.cached[page] = Cached(text, parent)
        owner.num_offered += 1

    @rule(owner=consumes(owners), count=st.sampled_from([0, 1, 5, 5, 5]))
    def release(self, owner: Owner, count: int) -> None:
        self.publish(owner, count)
        self.allocator.release(owner.pages)
        self.counts.subtract(owner.pages)
        for page in reversed(owner.pages):
            self.clock += 1
            if not self.counts[page] and page in self.cached:
                self.cached[page].last_used = self.clock

    @precondition(lambda self: self.clock > 3)
    @rule()
    def flush(self) -> None:
        if any(self.counts.values()):
            with pytest.raises(ValueError, match="pages are in use"):
                self.allocator.flush()
            return
        self.allocator.flush()
        self.cached.clear()

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.num_cached == len(self.idle())
        assert self.allocator.num_available == len(self.free()) + len(self.idle())
        assert self.allocator.num_used == sum(count > 0 for count in self.counts.values())

    @invariant()
    def pages_are_found_exactly_while_cached(self) -> None:
        for page, entry in self.cached.items():
            assert self.allocator.find(chain(entry.text))[-1] == page
            assert 0 not in self.allocator.find(chain(entry.text))
            assert self.allocator.find_leading([*chain(entry.text), b"other"]) == self.allocator.find(chain(entry.text))
            assert not entry.parent or entry.parent in self.cached


PageAllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_page_allocator_any_history_equals_model = PageAllocatorMachine.TestCase


def test_page_hashes_equal_prefix_equals_chain() -> None:
    first, second = chain((0, 1, 2)), chain((0, 1, 9))
    assert first[:2] == second[:2] and first[2] != second[2]
    assert chain((1,))[0] not in first


def test_publish_same_content_twice_keeps_copy_private() -> None:
    allocator = PageAllocator(4)
    hashes = chain((0, 1))
    original, copy, next_of_copy = allocator.allocate(3)
    assert allocator.publish(original, hashes[0], parent=0)
    assert not allocator.publish(copy, hashes[0], parent=0)
    assert not allocator.publish(next_of_copy, hashes[1], parent=copy)
    allocator.release([copy, next_of_copy])
    assert allocator.num_cached == 0 and allocator.num_available == 3
    assert allocator.find(hashes) == [original, 0]
    assert allocator.find_leading(hashes) == [original]


def test_allocate_page_used_again_evicts_the_other() -> None:
    allocator = PageAllocator(2)
    for page, content in zip(allocator.allocate(2), (0, 1), strict=True):
        allocator.publish(page, chain((content,))[0], parent=0)
        allocator.release([page])
    (again,) = allocator.find(chain((0,)))
    allocator.share([again])
    allocator.release([again])
    assert allocator.allocate(1) != [again]
    assert allocator.find(chain((0,))) == [again]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda allocator: allocator.allocate(4), "4 pages wanted, 3 of 3 are available"),
        (lambda allocator: allocator.release([2]), "page 2 has no owner"),
        (lambda allocator: allocator.release(allocator.allocate(1) * 2), "has no owner"),
        (lambda allocator: allocator.share([2]), "page 2 is free"),
    ],
    ids=["too_many", "never_owned", "released_twice", "shared_free"],
)
def test_page_allocator_misuse_raises(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(PageAllocator(3))
