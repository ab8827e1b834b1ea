"""The KV pages of each sequence.

Owns: the allocation, sharing, publishing and release of pages by sequence, the return of those that nobody sees any
more, and the search for the part of a sequence whose keys are in the pool already.
Does not know: queues, which sequence is preempted when pages run out. Never imports jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.engine.page_allocator import PageAllocator, next_page_hash
from jaxinfer.engine.pages_in_sight import PagesInSight
from jaxinfer.engine.sequence import NO_SLOT, SequenceState
from jaxinfer.wrappers.step_shapes import pages_for


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a sequence whose keys are in the pool already.

    Args:
      num_tokens: its length.
      pages: full pages, which the sequence can share; 0 where it sees none of a page.
      partial_page: a page that is full only in part, which the sequence has to copy; 0 if there is none.
    """

    num_tokens: int
    pages: Sequence[int]
    partial_page: int = 0

    @property
    def shared(self) -> list[int]:
        """The pages without the zeros."""
        return [page for page in self.pages if page]


class SequencePages:
    """The pages of a pool, by sequence.

    Args:
      num_pages: pages of the pool, without the dump page.
      in_sight: which pages sequences see.
      caching: whether full pages can be found again by their content (the prefix cache).
    """

    def __init__(self, num_pages: int, *, in_sight: PagesInSight, caching: bool):
        self.allocator = PageAllocator(num_pages)
        self._in_sight = in_sight
        self._page_size = in_sight.page_size
        self._caching = caching

    def find_prefix(self, sequence: SequenceState) -> Prefix:
        """The part of a sequence whose keys are in the pool: from a running prefix source, else from the prefix cache.

        A prefix source gives all tokens but the last one, the prefix cache gives full pages.
        """
        prefix_source, num_tokens = sequence.prefix_source, len(sequence.token_ids) - 1
        is_there = (
            prefix_source is not None
            and prefix_source.slot != NO_SLOT
            and prefix_source.num_computed_tokens >= num_tokens
            and prefix_source.first_kept <= self._in_sight.first(num_tokens)
        )
        if prefix_source is not None and is_there and sequence.num_reusable == num_tokens:
            num_full, rest = divmod(num_tokens, self._page_size)
            pages = prefix_source.pages
            return Prefix(num_tokens, self._seen(pages[:num_full], num_tokens), pages[num_full] if rest else 0)
        if not self._caching:
            return Prefix(0, ())
        self._extend_hashes(sequence, len(sequence.token_ids) // self._page_size)
        num_reusable = min(sequence.num_reusable, sequence.request.num_unchanged)
        pages = self._find(sequence.page_hashes[: num_reusable // self._page_size])
        num_tokens = len(pages) * self._page_size
        return Prefix(num_tokens, self._seen(pages, num_tokens))

    def num_cached(self, hashes: Sequence[bytes]) -> int:
        """How many of a text's first pages need not be computed, given the hashes of its full pages.

        Any thread may ask.
        """
        return len(self._find(hashes))

    def num_taken(self, sequence: SequenceState, prefix: Prefix) -> int:
        """How many of the available pages a sequence will hold at once until its known tokens are computed, at most.

        Without a window that is what `take` allocates and shares. With one, `take` allocates fewer, and the sequence
        takes and gives back others while its prompt is computed.
        """
        num_new = self._in_sight.most(len(sequence.token_ids)) - len(prefix.shared)
        return num_new + self.allocator.num_idle(prefix.shared)

    def num_reserved(self, running: Sequence[SequenceState]) -> int:
        """How many of the available pages running sequences will need.

        That is one for each to grow into, else what is admitted now is soon preempted, and what those that compute
        known tokens will hold more than now.
        """
        if self._in_sight.span.window is None:  # all their pages are taken at admission
            return len(running)
        missing = 0
        for sequence in running:
            if sequence.is_prefilling:
                held = len(sequence.pages) - max(sequence.first_kept - self._in_sight.num_sinks, 0)
                missing += max(self._in_sight.most(len(sequence.token_ids)) - held, 0)
        return len(running) + missing

    def take(self, sequence: SequenceState, prefix: Prefix) -> tuple[tuple[int, int], ...]:
        """Gives a sequence the prefix's pages, shared, and new ones up to PagesInSight.end of its known tokens.

        Returns:
          The (source, destination) pages to copy before the sequence is computed.
        """
        self.allocator.share(prefix.shared)
        end = self._in_sight.end(prefix.num_tokens, len(sequence.token_ids))
        new = self.allocator.allocate(pages_for(end, self._page_size) - len(prefix.pages))
        sequence.pages = [*prefix.pages, *new]
        sequence.num_computed_tokens, sequence.num_published = prefix.num_tokens, len(prefix.pages)
        sequence.first_kept = self._in_sight.first(prefix.num_tokens)
        return ((prefix.partial_page, new[0]),) if prefix.partial_page else ()

    def next_end(self, sequence: SequenceState) -> int:
        """How many of its known tokens a sequence needs pages for, whatever part of them the next step computes."""
        return self._in_sight.end(sequence.num_computed_tokens, len(sequence.token_ids))

    def give_back_unseen(self, sequence: SequenceState) -> None:
        """Releases the pages that no token of a sequence sees from the next one on.

        The device runs launches in order, so steps that are launched already read these pages before their next owner
        writes to them. The sequence's page table still names them. Pages that the token before the next one sees are
        kept, since sequences that wait to share the prompt compute its last token themselves.
        """
        if self._in_sight.span.window is None:
            return
        first = self._in_sight.first(max(sequence.num_computed_tokens - 1, 0))
        if first > sequence.first_kept:
            self.allocator.release(sequence.pages[sequence.first_kept : first])
            sequence.first_kept = first

    def num_missing(self, sequence: SequenceState, num_tokens: int) -> int:
        """How many more pages a sequence needs to hold num_tokens tokens."""
        if num_tokens <= len(sequence.pages) * self._page_size:
            return 0
        return pages_for(num_tokens, self._page_size) - len(sequence.pages)

    def grow(self, sequence: SequenceState, count: int) -> None:
        """Gives a sequence more pages, which must be available."""
        sequence.pages += self.allocator.allocate(count)

    def most_tokens(self, sequence: SequenceState) -> int:
        """How many tokens a sequence can have before another one must be preempted for it."""
        return (len(sequence.pages) + self.allocator.num_available) * self._page_size

    def give_back_unused(self, sequence: SequenceState) -> None:
        """Releases the pages after a sequence's last token, which were taken for drafts that were wrong."""
        needed = pages_for(len(sequence.token_ids), self._page_size)
        self.allocator.release(sequence.pages[needed:])
        del sequence.pages[needed:]

    def release(self, sequence: SequenceState) -> None:
        """Publishes a sequence's full pages, then releases all its pages."""
        self.publish(sequence)
        kept = [page for index, page in enumerate(sequence.pages) if self._has(sequence, index)]
        self.allocator.release(kept)
        sequence.pages, sequence.num_computed_tokens, sequence.num_published, sequence.first_kept = [], 0, 0, 0

    def publish(self, sequence: SequenceState) -> None:
        """Offers the sequence's new full pages to the prefix cache.

        A page is offered when its tokens have been read and the steps that compute it are launched. The device runs
        launches in order, so a sequence that finds the page reads it after it was written. A page with tokens that an
        intervention may change is never offered.
        """
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self._page_size
        if num_full <= sequence.num_published or not self._caching:
            return
        num_full = min(num_full, sequence.request.num_unchanged // self._page_size)
        self._extend_hashes(sequence, num_full)
        while sequence.num_published < num_full:
            index = sequence.num_published
            parent = sequence.pages[index - 1] if index and self._has(sequence, index - 1) else 0
            if self._has(sequence, index):
                self.allocator.publish(sequence.pages[index], sequence.page_hashes[index], parent=parent)
            sequence.num_published += 1

    def _has(self, sequence: SequenceState, index: int) -> bool:
        """Whether a page of a sequence has not been given back."""
        return index < self._in_sight.num_sinks or index >= sequence.first_kept

    def _find(self, hashes: Sequence[bytes]) -> list[int]:
        """The first pages of a text that need not be computed; 0 for those that no later token sees."""
        if self._in_sight.span.window is None:
            return self.allocator.find_leading(hashes)
        found = self.allocator.find(hashes)
        return found[: self._in_sight.num_usable(found)]

    def _seen(self, pages: Sequence[int], position: int) -> Sequence[int]:
        """The pages before a position, 0 in place of those that the token there does not see."""
        num_sinks, first = self._in_sight.num_sinks, self._in_sight.first(position)
        return [*pages[:num_sinks], *[0] * len(pages[num_sinks:first]), *pages[first:]]

    def _extend_hashes(self, sequence: SequenceState, num_pages: int) -> None:
        while len(sequence.page_hashes) < num_pages:
            start = len(sequence.page_hashes) * self._page_size
            previous = sequence.page_hashes[-1] if sequence.page_hashes else b""
            page = sequence.token_ids[start : start + self._page_size]
            sequence.page_hashes.append(next_page_hash(previous, page))
