"""The values that a request has captured so far.

Owns: an array for each site, which grows with the text, by position.
Does not know: jax, steps, sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32

from jaxinfer.sites import PROBS, Site, TokenSpan

_FIRST_TOKENS = 16


def joined_along_tokens(
    first: Float32[np.ndarray, "I ..."], second: Float32[np.ndarray, "J ..."]
) -> Float32[np.ndarray, "K ..."]:
    """The captures of a prompt and of a text behind it, at one site.

    Attention weights of the prompt may be those of a text of another length; behind the prompt they are zeros.
    """
    length = second.shape[-1]
    missing = max(length - first.shape[-1], 0)
    first = np.pad(first[..., :length], [(0, 0)] * (first.ndim - 1) + [(0, missing)])
    return np.concatenate([first, second])


class CapturedValues:
    """Values of the tokens of a span, by site and position; one thread adds to them, and reads once it has ended.

    A position may be added again (after preemption, or after a wrong draft); the last one counts.

    Args:
      sites: where values are captured.
      span: the positions that are wanted.
    """

    def __init__(self, sites: Sequence[Site], span: TokenSpan):
        self.sites = sites
        self.span = span
        self._values = {site.name: np.zeros((0, *site.dims), np.float32) for site in sites}
        self._num_known = 0

    @property
    def end(self) -> int:
        """The first position of the span whose values are not there yet."""
        return self.span.start + self._num_known

    def wanted(self, start: int, stop: int) -> range:
        """The wanted positions among start .. stop - 1."""
        return self.span.within(start, stop)

    def add(self, site: str, positions: range, values: Float[np.ndarray, "J ..."]) -> None:
        """Adds the values of consecutive positions at a site; finish_adding follows when all sites have them."""
        first, last = positions.start - self.span.start, positions.stop - self.span.start
        kept = self._values[site]
        if last > len(kept):
            grown = np.zeros((max(last, 2 * len(kept), _FIRST_TOKENS), *kept.shape[1:]), np.float32)
            grown[: len(kept)] = kept
            self._values[site] = kept = grown
        kept[first:last, ..., : values.shape[-1]] = values[..., : kept.shape[-1]]

    def finish_adding(self, positions: range) -> None:
        """Records that all sites have the values of consecutive positions."""
        if positions.start <= self.end:
            self._num_known = max(self._num_known, positions.stop - self.span.start)

    def arrays(self, text_len: int) -> dict[str, Float32[np.ndarray, "J ..."]]:
        """The values by site, float32[tokens, dims], of a text whose first text_len tokens went through the model.

        Attention weights are cut to that length, too.
        """
        num_tokens = len(self.wanted(0, text_len))
        found = {}
        for site in self.sites:
            values = self._values[site.name][:num_tokens]
            found[site.name] = values[..., :text_len].copy() if site.name.endswith(PROBS) else values.copy()
        return found
