"""token_bytes(): the table of the bytes that each token of a vocabulary adds to a text.

Owns: the table for any tokenizer, and how it is found for one that cannot tell it: by decoding each token.
Does not know: models, requests, constraints, jax.
"""

from __future__ import annotations

import string
from typing import Protocol, runtime_checkable

from jaxinfer.tokenizer.fixed_texts import REPLACEMENT
from jaxinfer.tokenizer.tokenizer import Tokenizer


@runtime_checkable
class _KnowsBytes(Protocol):
    """A tokenizer that can return the table itself."""

    def token_bytes(self) -> tuple[bytes, ...]: ...


def token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """Returns the bytes that each token adds when it stands inside a text, for example b" house".

    The joined bytes of several tokens are the UTF-8 text that decode makes of them, with two exceptions: decode may
    drop a space at the beginning of a text, and it replaces bytes that are not UTF-8 by U+FFFD.

    Args:
      tokenizer: one of jaxinfer's tokenizers, or any object that follows the Tokenizer protocol. If it has a method
        token_bytes(), that returns the table. Otherwise each token is decoded after an ordinary one, and a token that
        holds part of a character counts as U+FFFD, because decode shows it so.

    Returns:
      One entry for each id below tokenizer.vocab_size; b"" for special tokens and for ids that name no token.

    Example:
      >>> from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
      >>> token_bytes(ByteTokenizer())[64:67]
      (b'@', b'A', b'B')
    """
    if isinstance(tokenizer, _KnowsBytes):
        return tokenizer.token_bytes()
    anchor = _anchor(tokenizer)
    anchor_len = len(tokenizer.decode([anchor]))
    return tuple(
        b"" if token_id in tokenizer.special_token_ids else tokenizer.decode([anchor, token_id])[anchor_len:].encode()
        for token_id in range(tokenizer.vocab_size)
    )


def _anchor(tokenizer: Tokenizer) -> int:
    """Finds a token whose text does not depend on what follows: a letter if there is one, else whole characters."""
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_token_ids]
    texts = {token_id: tokenizer.decode([token_id]) for token_id in ordinary}
    whole = [token_id for token_id, text in texts.items() if text.strip() and REPLACEMENT not in text]
    if not whole:
        raise ValueError(f"expected a tokenizer with a token that is text by itself, got none among {len(ordinary)}")
    return next((token_id for token_id in whole if texts[token_id] in string.ascii_letters), whole[0])
