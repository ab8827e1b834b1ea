"""Renders generated tokens as HTML for notebooks: coloured by probability, with the alternatives on hover.

Owns: the markup, and escaping everything in it that comes from a model or a user.
Does not know: requests, tokenizers; it gets texts and numbers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_STRONGEST = 0.85
"""Opacity of the background colour of a token of probability 0; it falls linearly to 0 at probability 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenView:
    """One token as shown.

    Args:
      text: the token's text.
      logprob: natural logarithm of its probability; None if it is not known, and then the token has no colour.
      alternatives: (text, logprob) of the most likely tokens at its position, best first.
    """

    text: str
    logprob: float | None = None
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputView:
    """One generated text as shown.

    Args:
      tokens: the tokens in order; without log-probabilities, one TokenView may hold the whole text.
      caption: a line below the text.
    """

    tokens: tuple[TokenView, ...]
    caption: str


def render(prompt: str, outputs: Sequence[OutputView]) -> str:
    """Renders a prompt and the texts generated from it.

    Args:
      prompt: the prompt's text.
      outputs: the generated texts; the prompt is repeated before each.

    Returns:
      One <div> that needs neither scripts nor style sheets and is readable on light and dark pages.

    Example:
      >>> print(render("a<b", [OutputView(tokens=(TokenView(text="&", logprob=0.0),), caption="1 token")]))
      <div style="font-family: monospace; line-height: 1.6; max-width: 60em">
      <div style="white-space: pre-wrap"><span style="opacity: 0.6">a&lt;b</span><span title="&amp;  100.0 %" \
style="background: rgba(255, 120, 0, 0.00)">&amp;</span></div>
      <div style="opacity: 0.6; font-size: 85%">1 token</div>
      </div>
    """
    lines = ['<div style="font-family: monospace; line-height: 1.6; max-width: 60em">']
    for output in outputs:
        tokens = "".join(map(_span, output.tokens))
        shown = f'<span style="opacity: 0.6">{html.escape(prompt)}</span>{tokens}'
        lines.append(f'<div style="white-space: pre-wrap">{shown}</div>')
        lines.append(f'<div style="opacity: 0.6; font-size: 85%">{html.escape(output.caption)}</div>')
    return "\n".join([*lines, "</div>"])


def _span(token: TokenView) -> str:
    text = html.escape(token.text).replace("\n", "\u21b5\n")
    if token.logprob is None:
        return f"<span>{text}</span>"
    opacity = _STRONGEST * (1 - math.exp(token.logprob))
    rows = [_row(token.text, token.logprob)]
    rows += [_row(*alternative) for alternative in token.alternatives if alternative[0] != token.text]
    title = html.escape("\n".join(rows)).replace("\n", "&#10;")
    return f'<span title="{title}" style="background: rgba(255, 120, 0, {opacity:.2f})">{text}</span>'


def _row(text: str, logprob: float) -> str:
    shown = text.replace("\n", "\u21b5") or "(nothing)"
    return f"{shown}  {100 * math.exp(logprob):.1f} %"
