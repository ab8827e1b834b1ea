"""Allocates KV pages, and finds pages again by their content.

Owns: page ids 1 .. N (0 is the dump page), reference counts, the prefix cache (SHA-256 chain over full pages) and the
order of eviction from it.
Does not know: requests, devices. Never imports jax.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

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


class PageAllocator:
    """Pages with reference counts and a prefix cache.

    A page is free (no owner, no content worth keeping), idle (no owner, content findable) or in use. Idle pages count
    as available: allocate evicts the one that was released first. The pages of a text are released from its end, so a
    page goes before those in front of it, which are found by more texts. A text with a window also releases pages
    from its beginning.

    Args:
      num_pages: pages 1 .. num_pages.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._owners = [0] * (num_pages + 1)
        self._hashes: dict[int, bytes] = {}  # of pages whose content can be found
        self._by_hash: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the order of their eviction

    @property
    def num_available(self) -> int:
        """Pages that allocate can hand out, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages with an owner."""
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages without an owner whose content can still be found."""
        return len(self._idle)

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

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """For each hash the page with that content, 0 if there is none; takes no ownership."""
        return [self._by_hash.get(page_hash, 0) for page_hash in hashes]

    def find_leading(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages with these contents up to the first one that is not there; takes no ownership."""
        pages: list[int] = []
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
                if page not in self._idle:
                    raise ValueError(f"page {page} is free and cannot be shared")
                del self._idle[page]
            self._owners[page] += 1

    def publish(self, page: int, page_hash: bytes, *, parent: int) -> bool:
        """Makes a full page findable, unless its content already is.

        Args:
          page: a page in use.
          page_hash: hash of the text up to the end of the page.
          parent: the page before it among its owner's pages; 0 for none, or if the owner has released it. The parent
            must be findable too, so that whoever shares a page also shares its parent. A page whose content is findable
            in another page therefore stays private, and so do the pages after it.

        Returns:
          Whether the page is findable now.
        """
        if page in self._hashes:
            return True
        if page_hash in self._by_hash or (parent and parent not in self._hashes):
            return False
        self._hashes[page] = page_hash
        self._by_hash[page_hash] = page
        return True

    def release(self, pages: Sequence[int]) -> None:
        """Takes one owner from each page; a page without owners is then idle if it was published, else free.

        Args:
          pages: in the order of the text.

        Raises:
          ValueError: a page has no owner.
        """
        for page in reversed(pages):
            if self._owners[page] == 0:
                raise ValueError(f"page {page} has no owner and cannot be released")
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if page in self._hashes:
                self._idle[page] = None
            else:
                self._free.append(page)

    def flush(self) -> None:
        """Empties the prefix cache.

        Raises:
          ValueError: a page is in use; later ones of its text would be found although they build on it.
        """
        if self.num_used:
            raise ValueError(f"{self.num_used} pages are in use; the prefix cache can be flushed when none is")
        self._free.extend(self._idle)
        self._hashes.clear()
        self._by_hash.clear()
        self._idle.clear()

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._by_hash[self._hashes.pop(page)]
        return page
