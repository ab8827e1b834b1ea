"""Sizes in bytes as text.

Owns: the units.
Does not know: what is measured.
"""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """A size for error messages.

    Example:
      >>> size_text(3 * 2**29), size_text(30_000)
      ('1.5 GiB', '29.3 KiB')
    """
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**exponent:
            return f"{num_bytes / 2**exponent:,.1f} {unit}"
    return f"{num_bytes} B"
