"""The tokens of a reply's thoughts.

Owns: which tokens begin and end thoughts, and their count.
Does not know: texts; parser.py takes these apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxinfer.serve.replies.formats import ReplyFormat
from jaxinfer.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ThoughtMarkers:
    """Tokens that begin and end thoughts.

    Args:
      openers, closers: their ids.
    """

    openers: frozenset[int]
    closers: frozenset[int]

    @classmethod
    def of(cls, format: ReplyFormat, tokenizer: Tokenizer | None) -> ThoughtMarkers | None:
        """Those of a format; None if it has no thoughts, or its markers are no tokens of their own."""
        if tokenizer is None:
            return None

        def token_of(marker: str) -> int | None:
            token_ids = tokenizer.encode_plain(marker)
            return token_ids[0] if len(token_ids) == 1 and tokenizer.token_text(token_ids[0]) == marker else None

        pairs = [(token_of(opener), token_of(closer)) for opener, closer in format.thoughts]
        known = [(opener, closer) for opener, closer in pairs if opener is not None and closer is not None]
        return cls(frozenset(one for one, _ in known), frozenset(one for _, one in known)) if known else None


@dataclass(slots=True)
class ThoughtCount:
    """Counts the thoughts with which one reply begins, token by token.

    Args:
      markers: their beginning and end.
      is_open: whether the prompt has begun them.
      number: tokens between the markers so far.
    """

    markers: ThoughtMarkers
    is_open: bool
    number: int = 0
    _has_content: bool = False

    def add(self, token_ids: Iterable[int]) -> None:
        """Adds the next tokens."""
        for token_id in token_ids:
            if self.is_open:
                self.is_open = token_id not in self.markers.closers
                self.number += self.is_open
            else:
                self.is_open = token_id in self.markers.openers and not self._has_content
                self._has_content = not self.is_open
