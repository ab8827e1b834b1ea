"""Which pages of a sequence its tokens still see.

Owns: the arithmetic of a window over pages, and how many pages a sequence holds at once.
Does not know: which pages these are, who else has them. Never imports jax.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.config.attention_span import AttentionSpan
from jaxinfer.wrappers.step_shapes import pages_for


@dataclass(frozen=True, slots=True)
class PagesInSight:
    """Of the pages of a text, those of the sink tokens and those from `first` on; all of them without a window.

    Args:
      span: what a token sees.
      page_size: tokens in a page.
      max_chunk: tokens of one sequence that a step computes, at most.
    """

    span: AttentionSpan
    page_size: int
    max_chunk: int

    @property
    def num_sinks(self) -> int:
        """Pages that hold sink tokens."""
        return pages_for(self.span.sink_tokens, self.page_size)

    def first(self, position: int) -> int:
        """The first page, not counting those of sink tokens, that the token at a position sees.

        Later tokens see no page between the sink tokens and this one either.
        """
        if self.span.window is None:
            return 0
        return max((position - self.span.window + 1) // self.page_size, self.num_sinks)

    def end(self, position: int, num_tokens: int) -> int:
        """Up to which token a sequence needs pages when the next one to compute is at a position.

        That is up to the end of its num_tokens tokens. With a window it is no further than one step can get, or, at the
        beginning of a text, than the window and one step.
        """
        if self.span.window is None:
            return num_tokens
        return min(num_tokens, max(position, self.span.window) + self.max_chunk)

    def most(self, num_tokens: int) -> int:
        """How many pages a sequence of this length holds at once, at most."""
        num_pages = pages_for(num_tokens, self.page_size)
        if self.span.window is None:
            return num_pages
        return min(num_pages, self.num_sinks + pages_for(self.span.window + self.max_chunk, self.page_size) + 1)

    def num_usable(self, found: list[int]) -> int:
        """How many of a text's first pages need not be computed, since all of them that later tokens see are there.

        Args:
          found: for each of the text's full pages, the page that holds it, or 0 if there is none.

        Example:
            >>> span = AttentionSpan(window=16, sink_tokens=1)  # of two pages
            >>> PagesInSight(span, page_size=8, max_chunk=16).num_usable([3, 0, 0, 7, 9, 4, 0])
            6
        """
        num_leading = found.index(0) if 0 in found else len(found)
        usable = begin = 0  # begin: of the pages in a row that are there
        for end, page in enumerate(found, 1):
            begin = begin if page else end
            if min(self.num_sinks, end) <= num_leading and begin <= self.first(end * self.page_size):
                usable = end
        return usable
