"""Which pages hold a sequence.

Owns: taking, sharing, growing, publishing and giving back the pages of sequences; what of a sequence is there already.
Does not know: queues, who has to make room. Never imports jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.engine.page_allocator import PageAllocator, next_page_hash
from jaxinfer.engine.schedule import NO_SLOT, SequenceState
from jaxinfer.wrappers.step_batch import pages_for


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a sequence that is there already.

    Args:
      num_tokens: how much.
      pages: full ones, to be shared.
      partial_page: to be copied; 0 for none.
    """

    num_tokens: int
    pages: Sequence[int]
    partial_page: int = 0


class SequencePages:
    """The pages of a pool, by sequence.

    Args:
      num_pages: of the pool, the dump page excluded.
      page_size: tokens a page.
      caching: full pages can be found again by their content.
    """

    def __init__(self, num_pages: int, *, page_size: int, caching: bool):
        self.allocator = PageAllocator(num_pages)
        self._page_size = page_size
        self._caching = caching

    def find_prefix(self, sequence: SequenceState) -> Prefix:
        """What is there of a sequence: all but its last token where its leader runs, else what the prefix cache has."""
        leader, num_tokens = sequence.leader, len(sequence.token_ids) - 1
        is_there = leader is not None and leader.slot != NO_SLOT and leader.num_computed >= num_tokens
        if leader is not None and is_there and sequence.num_reusable == num_tokens:
            num_full, rest = divmod(num_tokens, self._page_size)
            return Prefix(num_tokens, leader.pages[:num_full], leader.pages[num_full] if rest else 0)
        if not self._caching:
            return Prefix(0, ())
        self._extend_hashes(sequence, len(sequence.token_ids) // self._page_size)
        pages = self.allocator.find(sequence.page_hashes[: sequence.num_reusable // self._page_size])
        return Prefix(len(pages) * self._page_size, pages)

    def num_taken(self, sequence: SequenceState, prefix: Prefix) -> int:
        """How many fewer pages are available once take has been called."""
        num_new = pages_for(len(sequence.token_ids), self._page_size) - len(prefix.pages)
        return num_new + self.allocator.num_idle(prefix.pages)

    def take(self, sequence: SequenceState, prefix: Prefix) -> tuple[tuple[int, int], ...]:
        """Gives a sequence pages for its known tokens.

        Returns:
          The (source, destination) pages to copy before it is computed.
        """
        self.allocator.share(prefix.pages)
        num_shared = len(prefix.pages)
        new = self.allocator.allocate(pages_for(len(sequence.token_ids), self._page_size) - num_shared)
        sequence.pages = [*prefix.pages, *new]
        sequence.num_computed, sequence.num_published = prefix.num_tokens, num_shared
        return ((prefix.partial_page, new[0]),) if prefix.partial_page else ()

    def num_missing(self, sequence: SequenceState, num_tokens: int) -> int:
        """Pages that a sequence lacks for so many tokens."""
        if num_tokens <= len(sequence.pages) * self._page_size:
            return 0
        return pages_for(num_tokens, self._page_size) - len(sequence.pages)

    def grow(self, sequence: SequenceState, count: int) -> None:
        """Gives a sequence more pages, which must be available."""
        sequence.pages += self.allocator.allocate(count)

    def most_tokens(self, sequence: SequenceState) -> int:
        """Tokens that a sequence could have before anybody must make room."""
        return (len(sequence.pages) + self.allocator.num_available) * self._page_size

    def give_back_unused(self, sequence: SequenceState) -> None:
        """Takes the pages behind a sequence's tokens, which rejected drafts have left."""
        needed = pages_for(len(sequence.token_ids), self._page_size)
        self.allocator.release(sequence.pages[needed:])
        del sequence.pages[needed:]

    def release(self, sequence: SequenceState) -> None:
        """Publishes a sequence's pages and takes them from it."""
        self.publish(sequence)
        self.allocator.release(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_published = [], 0, 0

    def publish(self, sequence: SequenceState) -> None:
        """Offers the sequence's new full pages, launched and known, to the prefix cache.

        The device runs launches in order, so whoever finds a page reads it after it was written.
        """
        if not self._caching:
            return
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self._page_size
        if num_full == sequence.num_published:
            return
        self._extend_hashes(sequence, num_full)
        while sequence.num_published < num_full:
            index = sequence.num_published
            parent = sequence.pages[index - 1] if index else 0
            self.allocator.publish(sequence.pages[index], sequence.page_hashes[index], parent=parent)
            sequence.num_published += 1

    def _extend_hashes(self, sequence: SequenceState, num_pages: int) -> None:
        while len(sequence.page_hashes) < num_pages:
            start = len(sequence.page_hashes) * self._page_size
            previous = sequence.page_hashes[-1] if sequence.page_hashes else b""
            page = sequence.token_ids[start : start + self._page_size]
            sequence.page_hashes.append(next_page_hash(previous, page))
