"""Allocates KV pages, and finds pages again by their content.

Owns: page ids 1 .. N (0 is the dump page), reference counts, the prefix cache (SHA-256 chain over full pages) and the
order of eviction from it.
Does not know: requests, devices. Never imports jax.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def next_page_hash(previous: bytes, page_token_ids: Sequence[int]) -> bytes:
    """The hash of a full page and all text before it; equal hashes mean equal text up to the end of the page.

    Args:
      previous: the hash of the page before; b"" for the first page of a text.
      page_token_ids: the tokens of the page.
    """
    return hashlib.sha256(previous + np.asarray(page_token_ids, np.int64).tobytes()).digest()


def page_hashes(token_ids: Sequence[int], page_size: int) -> list[bytes]:
    """The hashes of all full pages of a text."""
    hashes = [b""]
    for end in range(page_size, len(token_ids) + 1, page_size):
        hashes.append(next_page_hash(hashes[-1], token_ids[end - page_size : end]))
    return hashes[1:]


@dataclass(slots=True)
class _CachedPage:
    """A page whose content can be found by hash.

    Args:
      hash: hash of the text up to the end of the page.
      parent: the cached page before it in the text; 0 for the first page.
      num_children: how many cached pages continue the text after it.
      last_used: the allocator's clock at its last release.
    """

    hash: bytes
    parent: int
    num_children: int = 0
    last_used: int = 0


class PageAllocator:
    """Pages with reference counts and a prefix cache.

    A page is free (no owner, no content worth keeping), cached (no owner, content findable) or in use. Cached pages
    count as available: allocate evicts the least recently used one that no other cached page continues.

    Args:
      num_pages: pages 1 .. num_pages.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._owners = [0] * (num_pages + 1)
        self._cached: dict[int, _CachedPage] = {}
        self._by_hash: dict[bytes, int] = {}
        self._evictable: list[tuple[int, int]] = []  # heap of (last_used, page); some entries are out of date
        self._num_idle_cached = 0
        self._outdated: set[int] = set()  # pages in use since before a flush; never published
        self._clock = 0

    @property
    def num_available(self) -> int:
        """Pages that allocate can hand out, cached ones included."""
        return len(self._free) + self._num_idle_cached

    @property
    def num_used(self) -> int:
        """Pages with an owner."""
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages without an owner whose content can still be found."""
        return self._num_idle_cached

    def allocate(self, count: int) -> list[int]:
        """Takes `count` available pages; each then has one owner.

        Raises:
          ValueError: fewer are available.
        """
        if count > self.num_available:
            raise ValueError(f"{count} pages wanted, {self.num_available} of {self.num_pages} are available")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The cached pages of the longest known beginning of a hash chain; takes no ownership."""
        pages = []
        for page_hash in hashes:
            page = self._by_hash.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Sequence[int]) -> int:
        """How many of these pages have no owner; sharing them leaves so many fewer available."""
        return sum(self._owners[page] == 0 for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """Adds an owner to pages that find returned.

        Raises:
          ValueError: a page has neither an owner nor findable content.
        """
        for page in pages:
            if self._owners[page] == 0:
                if page not in self._cached:
                    raise ValueError(f"page {page} is free and cannot be shared")
                self._num_idle_cached -= 1
            self._owners[page] += 1

    def publish(self, page: int, page_hash: bytes, *, parent: int) -> bool:
        """Makes a full page findable, unless its content already is.

        Args:
          page: a page in use.
          page_hash: hash of the text up to the end of the page.
          parent: the page before it in the owner's text, 0 for none. The parent must be findable too, so that whoever
            shares a page also shares its parent. A page whose content is findable in another page therefore stays
            private, and so do the pages after it.

        Returns:
          Whether the page is findable now.
        """
        if page in self._cached:
            return True
        if page in self._outdated or page_hash in self._by_hash or (parent and parent not in self._cached):
            return False
        self._cached[page] = _CachedPage(page_hash, parent)
        self._by_hash[page_hash] = page
        if parent:
            self._cached[parent].num_children += 1
        return True

    def release(self, pages: Sequence[int]) -> None:
        """Takes one owner from each page; a page without owners is then cached if it was published, else free.

        Raises:
          ValueError: a page has no owner.
        """
        self._clock += 1
        for page in pages:
            if self._owners[page] == 0:
                raise ValueError(f"page {page} has no owner and cannot be released")
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if page in self._cached:
                self._num_idle_cached += 1
                self._cached[page].last_used = self._clock
                self._offer(page)
            else:
                self._outdated.discard(page)
                self._free.append(page)

    def flush(self) -> None:
        """Empties the prefix cache; pages in use stay with their owners, but can no longer be found or published."""
        self._free.extend(page for page in self._cached if self._owners[page] == 0)
        self._outdated.update(page for page, owners in enumerate(self._owners) if owners)
        self._cached.clear()
        self._by_hash.clear()
        self._evictable.clear()
        self._num_idle_cached = 0

    def _offer(self, page: int) -> None:
        if not self._is_evictable(page):
            return
        heapq.heappush(self._evictable, (self._cached[page].last_used, page))
        if len(self._evictable) > 2 * self.num_pages:  # drop stale entries, or reused pages pile them up
            pages = [page for page in self._cached if self._is_evictable(page)]
            self._evictable = [(self._cached[page].last_used, page) for page in pages]
            heapq.heapify(self._evictable)

    def _is_evictable(self, page: int) -> bool:
        return page in self._cached and not self._cached[page].num_children and not self._owners[page]

    def _evict(self) -> int:
        while True:
            last_used, page = heapq.heappop(self._evictable)
            if self._is_evictable(page) and self._cached[page].last_used == last_used:
                break
        entry = self._cached[page]
        del self._cached[page]
        del self._by_hash[entry.hash]
        self._num_idle_cached -= 1
        if entry.parent:
            self._cached[entry.parent].num_children -= 1
            self._offer(entry.parent)
        return page
