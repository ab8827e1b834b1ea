"""What a decoder of the `tokenizers` library makes of single tokens.

Owns: whether it looks at a token's neighbours, the bytes that a token stands for.
Does not know: tokenizer files, special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tokenizers

from jaxinfer.tokenizer.byte_pieces import BYTE_PIECE, byte_level_bytes, byte_of

ANCHOR = "a"  # a piece that every decoder turns into the same text
BYTE_LEVEL_SPACE = "\u0120"  # the piece by which ByteLevel writes a space
# Decoder steps in tokenizer.json that turn each token into text without a look at its neighbours (except the byte
# tokens of ByteFallback).
TOKENWISE_STEPS = frozenset({"Replace", "ByteFallback", "Metaspace", "Strip"})


def decodes_tokenwise(decoder: tokenizers.decoders.Decoder | None) -> bool:
    """Whether a decoder turns each token into text, or into bytes of UTF-8, independently of its neighbours."""
    steps = [] if decoder is None else _decoder_steps(json.loads(decoder.__getstate__()))
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return True
    num_tokenwise = names.index("Fuse") if "Fuse" in names else len(names)
    # Fuse joins the tokens. After it, only a Strip of the text's beginning is harmless: it concerns the first token.
    on_joined = [step for step in steps[num_tokenwise:] if step["type"] != "Fuse"]
    return (
        bool(steps)
        and TOKENWISE_STEPS.issuperset(names[:num_tokenwise])
        and all(step["type"] == "Strip" and step["stop"] == 0 for step in on_joined)
    )


def _decoder_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """Flattens a decoder, in the form that tokenizer.json has, into the list of its steps."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _decoder_steps(part)]


def piece_reader(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Returns a function from a token as written in tokenizer.json (a piece) to the bytes that it adds inside a text.

    A decoder may consist of several steps, so its kind is found out by decoding samples: whether it understands
    ByteLevel's letters for bytes or ByteFallback's <0xNN>. Any other piece is decoded between two anchors.
    """
    join = " ".join if tokenizer.decoder is None else tokenizer.decoder.decode
    if join([ANCHOR, BYTE_LEVEL_SPACE]) == ANCHOR + " ":
        return byte_level_bytes
    has_byte_fallback = join([ANCHOR, "<0x41>"]) == ANCHOR + "A"
    before, behind = len(ANCHOR), len(join([ANCHOR, ANCHOR])) - len(ANCHOR)

    def between(piece: str) -> bytes:
        if has_byte_fallback and BYTE_PIECE.fullmatch(piece):
            return byte_of(piece)
        text = join([ANCHOR, piece, ANCHOR])
        return text[before : len(text) - behind].encode()

    return between
