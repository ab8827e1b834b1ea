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
        """Those of a format; None if it has no thoughts, or its markers are several tokens each."""
        pairs = [] if tokenizer is None else [[tokenizer.encode_plain(one) for one in pair] for pair in format.thoughts]
        single = [(opener[0], closer[0]) for opener, closer in pairs if len(opener) == len(closer) == 1]
        openers, closers = (frozenset(ids) for ids in zip(*single, strict=True)) if single else (None, None)
        return None if openers is None or closers is None else cls(openers, closers)


@dataclass(slots=True)
class ThoughtCount:
    """Counts the thoughts of one reply, token by token.

    Args:
      markers: their beginning and end.
      is_open: whether the prompt has begun them.
      number: tokens between the markers so far.
    """

    markers: ThoughtMarkers
    is_open: bool
    number: int = 0

    def add(self, token_ids: Iterable[int]) -> None:
        """Adds the next tokens."""
        for token_id in token_ids:
            if self.is_open:
                self.is_open = token_id not in self.markers.closers
                self.number += self.is_open
            else:
                self.is_open = token_id in self.markers.openers
