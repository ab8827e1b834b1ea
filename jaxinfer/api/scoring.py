"""Perplexity of a text that may be longer than the model's context.

Owns: how the text is cut into overlapping windows; Perplexity, the result.
Does not know: how the tokens of a window are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxinfer.config.validation import require_int


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """How well a model predicts a text.

    Args:
      num_tokens: tokens that were predicted, which is all but the text's first.
      logprob: sum of their log-probabilities (natural logarithm).
      num_bytes: length of the text in UTF-8; None for a text given as token ids.
    """

    num_tokens: int
    logprob: float
    num_bytes: int | None = None

    @property
    def value(self) -> float:
        """The perplexity: exp of the mean negative log-probability of a token."""
        return math.exp(-self.logprob / self.num_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log2-probability per byte, comparable between tokenizers; None for a text given as token ids."""
        return None if self.num_bytes is None else -self.logprob / math.log(2) / self.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A stretch of a text whose tokens are scored together.

    Args:
      start, end: the window is tokens start .. end - 1 of the text.
      first: the first token of the text whose score counts; those before it in the window are context only.
    """

    start: int
    end: int
    first: int


def check_windows(window: int | None, stride: int | None, *, max_model_len: int) -> tuple[int, int]:
    """Returns window and stride, checked, with defaults in place of None; arguments and errors as LLM.perplexity's."""
    longest = max_model_len - 1
    if longest < 2:
        raise ValueError(f"a perplexity takes a context of at least 3 tokens, got {max_model_len}; raise max_model_len")
    window = longest if window is None else require_int("window", window, 2, longest)
    stride = max(window // 2, 1) if stride is None else require_int("stride", stride, 1, window - 1)
    return window, stride


def sliding_windows(num_tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """Yields windows over a text such that the score of every token but the first counts in exactly one of them.

    Args:
      num_tokens: length of the text.
      window: length of a window; the last one may be shorter.
      stride: tokens between the starts of two windows. A token that counts in the second window or a later one is
        scored with at least window - stride tokens before it.

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
