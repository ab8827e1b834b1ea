"""What the other rooms may ask of a tokenizer.

Owns: the protocol that users' own tokenizers follow.
Does not know: any tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """What jaxinfer needs of a tokenizer; any object with these methods will do.

    Attributes:
      vocab_size: one more than the largest token id.
      eos_token_ids: the tokens that end a text according to the tokenizer's own files. If the checkpoint's
        generation_config names end tokens, those are used instead.
      special_token_ids: the tokens that decode leaves out when skip_special_tokens is True.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text according to the tokenizer's own files."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that decode can leave out."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens (BOS and such) that the checkpoint puts around prompts."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text, with no special token added; names of special tokens in the text become those tokens."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, an id that names no token becomes nothing."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token as shown to people: the decoded text of that token alone, special tokens by name."""
        ...
