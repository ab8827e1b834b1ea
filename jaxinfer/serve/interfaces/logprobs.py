"""Log-probabilities in the forms of OpenAI's API and vLLM's.

Owns: these forms, and how tokens are shown in them.
Does not know: requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxinfer.outputs import Logprob
from jaxinfer.serve.interfaces.answered import Completed
from jaxinfer.tokenizer.tokenizer import Tokenizer
from jaxinfer.tokenizer.vocabulary import token_bytes

Found = Mapping[int, Logprob]


class TokenNames:
    """Shows tokens as what they add to a text, spaces included, so that the tokens of a text spell it.

    Args:
      tokenizer: of the model; None shows all tokens as "token_id:" and the id.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def load(self) -> None:
        """Makes the table of all tokens now, which takes up to a second, and not when the first one is shown."""
        _ = self._texts

    def name(self, token_id: int, *, as_id: bool = False) -> str:
        """A token's text, special tokens by name."""
        if as_id or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._texts[token_id] or self._tokenizer.token_text(token_id)

    def bytes_of(self, token_id: int) -> list[int] | None:
        """A token's bytes, which need not be whole characters; None without a tokenizer."""
        return None if self._tokenizer is None else list(self._bytes[token_id])

    @cached_property
    def _bytes(self) -> Sequence[bytes]:
        return () if self._tokenizer is None else token_bytes(self._tokenizer)

    @cached_property
    def _texts(self) -> Sequence[str]:
        return [one.decode(errors="replace") for one in self._bytes]


def chat_logprobs(
    names: TokenNames, completion: Completed, *, num_top: int, as_ids: bool = False
) -> dict[str, Any] | None:
    """The "logprobs" of a chat completion's choice; None if they were not asked for.

    Args:
      names: shows tokens.
      completion: the text, or what is new of it.
      num_top: how many of the most likely tokens to show at each position.
      as_ids: shows tokens by their ids.
    """
    if completion.logprobs is None:
        return None

    def entry(token_id: int, found: Found) -> dict[str, Any]:
        return {
            "token": names.name(token_id, as_id=as_ids),
            "logprob": found[token_id].logprob,
            "bytes": names.bytes_of(token_id),
        }

    content = []
    for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True):
        top = [entry(other, found) for other in _best_first(found) if found[other].rank <= num_top]
        content.append(entry(token_id, found) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(
    names: TokenNames,
    token_ids: Sequence[int],
    logprobs: Sequence[Found | None],
    *,
    num_top: int,
    offset: int = 0,
    as_ids: bool = False,
) -> dict[str, Any]:
    """The "logprobs" of a completion's choice.

    Args:
      names: shows tokens.
      token_ids: the tokens.
      logprobs: of each; None for a first token, which nothing precedes.
      num_top: how many of the most likely tokens to show at each position, beside the token itself.
      offset: where the first token begins, in characters of the choice's text.
      as_ids: shows tokens by their ids.
    """
    tokens = [names.name(token_id, as_id=as_ids) for token_id in token_ids]
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, name, found in zip(token_ids, tokens, logprobs, strict=True):
        offsets.append(offset)
        offset += len(name)
        if found is None:
            values.append(None)
            tops.append(None)
            continue
        values.append(found[token_id].logprob)
        top: dict[str, float] = {}
        for other in _best_first(found):  # of tokens with the same text, the likelier one stays
            if other == token_id or found[other].rank <= num_top:
                top.setdefault(names.name(other, as_id=as_ids), found[other].logprob)
        tops.append(top)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs(found: Sequence[Found | None] | None) -> list[dict[str, Any] | None] | None:
    """The "prompt_logprobs" of vLLM: by token id, as text."""
    if found is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
            for token_id, one in entry.items()
        }
        for entry in found
    ]


def _best_first(found: Found) -> list[int]:
    return sorted(found, key=lambda token_id: found[token_id].rank)
