"""What each token adds to a text, in bytes.

Owns: the table of bytes by token id, whatever the tokenizer; how a tokenizer that does not know it is asked.
Does not know: models, requests, constraints, jax.
"""

from __future__ import annotations

import string
from typing import Protocol, runtime_checkable

from jaxinfer.tokenizer.tokenizer import REPLACEMENT, Tokenizer


@runtime_checkable
class _KnowsBytes(Protocol):
    """A tokenizer that has the table itself."""

    def token_bytes(self) -> tuple[bytes, ...]: ...


def token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes that each token adds to a text in the middle of it.

    The bytes of several tokens in a row, joined, are the UTF-8 text that decode makes of them, except that a text may
    lose a space at its beginning, and that decode writes bytes that are no UTF-8 as U+FFFD.

    Args:
      tokenizer: one of jaxinfer's, or any object with the methods of the Tokenizer protocol. The latter is asked for
        the text of each token behind an ordinary one: a token that holds part of a character then counts as U+FFFD,
        as decode shows it, unless the tokenizer has a method token_bytes() that returns the table.

    Returns:
      One entry for each id below tokenizer.vocab_size; b"" for special tokens and for ids that name no token.

    Example:
      >>> from jaxinfer.tokenizer.tokenizer import ByteTokenizer
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
    """A token whose text stays as it is whatever follows: a letter if there is one, else any with whole characters."""
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_token_ids]
    texts = {token_id: tokenizer.decode([token_id]) for token_id in ordinary}
    whole = [token_id for token_id, text in texts.items() if text.strip() and REPLACEMENT not in text]
    if not whole:
        raise ValueError(f"expected a tokenizer with a token that is text by itself, got none among {len(ordinary)}")
    return next((token_id for token_id in whole if texts[token_id] in string.ascii_letters), whole[0])
