"""Sites: the named places in a model where values can be captured and changed.

Owns: the names of sites, patterns of names, which tokens of a text are meant ("prompt", "generated", a slice).
Does not know: jax, where in a layer a site is (layers do), what is done there.
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Tokens = str | slice
"""Which tokens of a text: "all", "prompt", "last" (the prompt's last one), "generated", or a slice of positions."""
TOKEN_NAMES = ("all", "prompt", "last", "generated")
EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final_norm", "logits"
PROBS = "attention.probs"
LAYER_SITES = (
    *("attention.input", "attention.queries", "attention.keys", "attention.values", PROBS),
    *("attention.heads", "attention.output", "mlp.input", "mlp.router", "mlp.gate", "mlp.neurons", "mlp.output"),
    "residual",
)
"""The sites of the layers in layers/, in the order in which a token passes them; not every layer has all of them."""
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place in a model that every token passes.

    Args:
      name: such as "layers.3.mlp.output".
      dims: dimensions of one token's value there.
      dtype: of that value in the model; captures are float32.
    """

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def layer(self) -> int | None:
        """The number of its layer; None outside the layers."""
        return split_layer(self.name)[0]


class Sites(Mapping[str, Site]):
    """The sites of a model by name, in the order in which a token passes them; printed as a table.

    Args:
      sites: in that order.
    """

    def __init__(self, sites: list[Site]):
        self._sites = {site.name: site for site in sites}

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def find(self, pattern: str) -> list[Site]:
        """The sites that a name or a pattern means, in which "*" stands for any one part between dots.

        Raises:
          ValueError: there is no such site; the message names the nearest ones.
        """
        parts = pattern.split(".")
        found = [site for name, site in self._sites.items() if _matches(name.split("."), parts)]
        if found:
            return found
        layers = [site.layer for site in self.values() if site.layer is not None]
        layer, _ = split_layer(pattern)
        if layer is not None and layers and layer > max(layers):
            raise ValueError(f"no site {pattern!r}: the model has layers 0..{max(layers)}")
        near = difflib.get_close_matches(pattern, list(self._sites), n=2, cutoff=0.3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"no site {pattern!r}; {hint}llm.sites() lists all of them")

    def __repr__(self) -> str:
        rows = [(site.name, _dims(site), site.dtype) for site in self.values()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{html.escape(site.name)}</code></td><td>{_dims(site)}</td><td>{site.dtype}</td></tr>"
            for site in self.values()
        )
        return f"<table><tr><th>site</th><th>dims of a token</th><th>dtype</th></tr>{rows}</table>"


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive positions of a text, of which prompt and output together are the positions 0, 1, 2, ...

    Args:
      start: the first position.
      stop: the position after the last one; None for the end of the text, wherever that will be.
    """

    start: int
    stop: int | None = None

    def within(self, start: int, stop: int) -> range:
        """The positions of the span among start .. stop - 1."""
        first = max(start, self.start)
        return range(first, max(first, stop if self.stop is None else min(stop, self.stop)))


def require_tokens(name: str, value: object) -> Tokens:
    """Checks a choice of tokens.

    Raises:
      TypeError, ValueError: it is neither one of TOKEN_NAMES nor a slice with whole numbers and step 1.
    """
    if isinstance(value, str):
        if value not in TOKEN_NAMES:
            raise ValueError(f"{name} must be a slice or one of {', '.join(TOKEN_NAMES)}, got {value!r}")
        return value
    if not isinstance(value, slice):
        raise TypeError(f"{name} must be a slice or one of {', '.join(TOKEN_NAMES)}, got {value!r}")
    ends = [end for end in (value.start, value.stop) if end is not None]
    if value.step not in (None, 1) or any(isinstance(end, bool) or not hasattr(end, "__index__") for end in ends):
        raise ValueError(f"{name} must be a slice of whole numbers with step 1, got {value!r}")
    return value


def token_span(tokens: Tokens, *, prompt_len: int) -> TokenSpan:
    """The positions that a choice of tokens means for a prompt of so many tokens.

    In a slice, negative numbers count from the end of the prompt: slice(-1, None) is the prompt's last token and all of
    the output.

    Example:
      >>> token_span("generated", prompt_len=5), token_span(slice(-1, None), prompt_len=5)
      (TokenSpan(start=5, stop=None), TokenSpan(start=4, stop=None))
    """
    if isinstance(tokens, str):
        return {
            "all": TokenSpan(0),
            "prompt": TokenSpan(0, prompt_len),
            "last": TokenSpan(prompt_len - 1, prompt_len),
            "generated": TokenSpan(prompt_len),
        }[tokens]

    def position(value: int | None) -> int | None:
        return value if value is None or value >= 0 else max(prompt_len + value, 0)

    return TokenSpan(position(tokens.start) or 0, position(tokens.stop))


def split_layer(name: str) -> tuple[int | None, str]:
    """The layer's number and the rest of a site's name; None and the whole name outside the layers."""
    found = _LAYER.fullmatch(name)
    return (None, name) if found is None else (int(found[1]), found[2])


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(wanted in ("*", part) for part, wanted in zip(name, pattern, strict=True))


def _dims(site: Site) -> str:
    return " x ".join(map(str, site.dims))
