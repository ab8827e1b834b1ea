"""How likely a model finds a long text: windows over it, and what they add up to.

Owns: the plan of windows, Perplexity.
Does not know: how tokens are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxinfer.config import require_int


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """How well a model predicts a text.

    Args:
      num_tokens: predicted, all but the first.
      logprob: natural logarithm of their probability.
      num_bytes: of the text in UTF-8; None for a text given as token ids.
    """

    num_tokens: int
    logprob: float
    num_bytes: int | None = None

    @property
    def value(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return math.exp(-self.logprob / self.num_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, unlike the value; None for token ids."""
        return None if self.num_bytes is None else -self.logprob / math.log(2) / self.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A stretch of a text to be scored together.

    Args:
      start, end: its tokens.
      first: the first token that counts; those before it are its context only.
    """

    start: int
    end: int
    first: int


def check_windows(window: int | None, stride: int | None, *, max_model_len: int) -> tuple[int, int]:
    """Window and stride of a model, with its defaults for what is None; arguments and errors as LLM.perplexity's."""
    longest = max_model_len - 1
    window = longest if window is None else require_int("window", window, 2, longest)
    stride = max(window // 2, 1) if stride is None else require_int("stride", stride, 1, window - 1)
    return window, stride


def sliding_windows(num_tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """Windows in which every token but the first counts once.

    Args:
      num_tokens: of the text.
      window: tokens of a window at most.
      stride: tokens by which windows follow each other; from the second window on, a token sees at least
        window - stride tokens before it.

    Source: the sliding window of transformers' documentation, "Perplexity of fixed-length models".

    Example:
      >>> [(w.start, w.end, w.first) for w in sliding_windows(10, window=6, stride=3)]
      [(0, 6, 1), (3, 9, 6), (6, 10, 9)]
    """
    first = 1
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        yield Window(start=start, end=end, first=first)
        if end == num_tokens:
            return
        first = end
