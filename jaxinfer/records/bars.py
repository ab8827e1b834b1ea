"""Renders counts as bars of HTML for notebooks.

Owns: the markup.
Does not know: what is counted.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

_COLOURS = ("rgba(66, 133, 244, 0.75)", "rgba(66, 133, 244, 0.35)", "rgba(128, 128, 128, 0.2)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A bar that is divided into parts.

    Args:
      name: what is divided.
      parts: (name, count) of each part, at most three.
    """

    name: str
    parts: tuple[tuple[str, int], ...]


def render_bars(bars: Sequence[Bar], caption: str) -> str:
    """Renders bars; those of nothing are left out.

    Args:
      bars: the bars, one below the other.
      caption: a line below them.

    Returns:
      One <div> that needs neither scripts nor style sheets and is readable on light and dark pages.

    Example:
      >>> shown = render_bars([Bar(name="pages", parts=(("used", 1), ("free", 3)))], "4 pages")
      >>> "width: 25.0%" in shown, "used 1, free 3" in shown
      (True, True)
    """
    lines = ['<div style="font-family: sans-serif; max-width: 46em; line-height: 1.5">']
    for bar in bars:
        total = sum(count for _, count in bar.parts)
        if not total:
            continue
        text = ", ".join(f"{name} {count:,}" for name, count in bar.parts if count or name != bar.parts[-1][0])
        pieces = "".join(
            f'<span title="{html.escape(name)} {count:,}" style="display: inline-block; height: 0.8em; '
            f'width: {100 * count / total:.1f}%; background: {colour}"></span>'
            for (name, count), colour in zip(bar.parts, _COLOURS, strict=False)
        )
        lines.append(
            f'<div style="font-size: 85%">{html.escape(bar.name)}: {html.escape(text)}</div><div>{pieces}</div>'
        )
    lines.append(f'<div style="opacity: 0.6; font-size: 85%">{html.escape(caption)}</div></div>')
    return "\n".join(lines)
