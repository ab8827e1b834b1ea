"""AttentionSpan: which positions of a text a token sees.

Owns: a window with the first tokens beside it, and what is seen by at least one of several layers.
Does not know: jax, pages, models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """A token at position p sees the positions p - window + 1 .. p, and those below sink_tokens.

    Args:
      window: in tokens, the token itself included; None for all positions up to its own.
      sink_tokens: how many of the first tokens stay in sight beside a window.
    """

    window: int | None = None
    sink_tokens: int = 0

    def within(self, window: int | None) -> AttentionSpan:
        """What a token sees in a layer with a window of its own, or None.

        A shorter window holds as it is: the layer never saw the first tokens from further on, so it has no sinks.
        """
        if self.window is None or (window is not None and window < self.window):
            return AttentionSpan(window)
        return self


WHOLE_TEXT = AttentionSpan()
"""Every token sees all positions up to its own."""
MAX_WINDOW = 2**30
"""A window longer than any text, since positions are int32."""


def widest(spans: Iterable[AttentionSpan]) -> AttentionSpan:
    """A span that covers all of these.

    Example:
        >>> widest([AttentionSpan(8, sink_tokens=4), AttentionSpan(16)])
        AttentionSpan(window=16, sink_tokens=4)
    """
    spans = list(spans)
    windows = [span.window for span in spans if span.window is not None]
    if len(windows) < len(spans):
        return WHOLE_TEXT
    return AttentionSpan(max(windows), max(span.sink_tokens for span in spans))
