"""The tokens whose text does not depend on their neighbours, so that it can be looked up instead of decoded.

Owns: finding the text of such a token, and keeping it.
Does not know: tokenizer files, how a tokenizer decodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class FixedText:
    """The text of a token that is the same whatever tokens stand around it.

    Attributes:
      inside: what the token adds to a text that has begun, for example " house".
      alone: its text where it is the first token; some tokenizers drop a space there, so "house".
    """

    inside: str
    alone: str


class FixedTexts(dict[int, FixedText | None]):
    """The fixed texts of a tokenizer's tokens by token id, None where there is none; computed at the first use.

    A token's text is fixed if it does not depend on its neighbours, except that the first token of a text may lose a
    space. Most tokens have one, words for example. A token that holds part of a character has none: it reads as U+FFFD
    or as part of a character, depending on its neighbours. IncrementalDetokenizer looks texts up here instead of
    decoding the tokens.

    Args:
      decode: the tokenizer's method.
      is_tokenwise: whether the tokenizer's decoder turns this token into text (or bytes) without a look at its
        neighbours. A few decoded examples cannot show that, so the tokenizer has to know it. It is False for the byte
        tokens of a ByteFallback decoder: one malformed byte turns a whole run of them into U+FFFD.
    """

    def __init__(self, decode: Callable[..., str], is_tokenwise: Callable[[int], bool]) -> None:
        super().__init__()
        self._decode = partial(decode, skip_special_tokens=False)
        self._is_tokenwise = is_tokenwise

    def __missing__(self, token_id: int) -> FixedText | None:
        self[token_id] = self._find(token_id) if self._is_tokenwise(token_id) else None
        return self[token_id]

    def _find(self, token_id: int) -> FixedText | None:
        alone, twice, thrice = (self._decode([token_id] * n) for n in (1, 2, 3))
        inside = twice[len(alone) :]
        # A decoder that strips more leading spaces than this token has also strips the next token's; the comparison
        # with three copies excludes such tokens.
        is_fixed = inside.endswith(alone) and thrice == alone + inside + inside
        return FixedText(inside=inside, alone=alone) if inside and is_fixed and REPLACEMENT not in thrice else None
