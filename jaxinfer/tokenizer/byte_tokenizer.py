"""The built-in tokenizer of bytes, for models and tests that have no tokenizer file.

Owns: ByteTokenizer.
Does not know: files, models.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer.tokenizer.fixed_texts import FixedTexts

BYTE_SPECIAL_NAMES = {256: b"<s>", 257: b"</s>"}


class ByteTokenizer:
    """One token per byte of UTF-8: ids 0 to 255 are the bytes, 256 is BOS, 257 is EOS. Needs no file.

    Args:
      add_bos: whether encode puts BOS in front.

    Example:
      >>> tokenizer = ByteTokenizer()
      >>> tokenizer.encode("hé")
      [104, 195, 169]
      >>> tokenizer.decode([104, 195, 257])
      'h\ufffd'
    """

    vocab_size: int = 258
    bos_token_id: int = 256
    eos_token_ids: tuple[int, ...] = (257,)
    special_token_ids: frozenset[int] = frozenset({256, 257})

    def __init__(self, *, add_bos: bool = False) -> None:
        self._prefix = [self.bos_token_id] if add_bos else []
        decodes_tokenwise = type(self).decode is ByteTokenizer.decode
        self.fixed_texts = FixedTexts(self.decode, self._is_tokenwise) if decodes_tokenwise else None

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: its bytes, after BOS if the tokenizer was made with add_bos."""
        return self._prefix + self.encode_plain(text)

    def encode_plain(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the bytes; what is not UTF-8 becomes U+FFFD, an id above 257 becomes nothing."""
        names = {} if skip_special_tokens else BYTE_SPECIAL_NAMES
        pieces = (bytes([token_id]) if 0 <= token_id < 256 else names.get(token_id, b"") for token_id in token_ids)
        return b"".join(pieces).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """Text of one byte by itself; U+FFFD for a byte that is not a whole character."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes that each token adds in the middle of a text; b"" for BOS and EOS."""
        return (*(bytes([byte]) for byte in range(256)), b"", b"")

    def _is_tokenwise(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size
