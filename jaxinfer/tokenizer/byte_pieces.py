"""How vocabularies write bytes as letters: ByteFallback's <0xNN> and the letters of ByteLevel.

Owns: from such a piece to its bytes.
Does not know: tokenizers, files.
"""

from __future__ import annotations

import re

BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def byte_of(piece: str) -> bytes:
    """The byte that a piece <0xNN> stands for."""
    return bytes([int(piece[3:-1], 16)])


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a ByteLevel piece; a piece with other letters than ByteLevel's, an added token, is plain text."""
    if all(letter in BYTE_LEVEL_LETTERS for letter in piece):
        return bytes(BYTE_LEVEL_LETTERS[letter] for letter in piece)
    return piece.encode()


def _byte_level_letters() -> dict[str, int]:
    """Maps ByteLevel's letters to bytes: printable Latin-1 stands for itself, U+0100 and on for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL_LETTERS = _byte_level_letters()
