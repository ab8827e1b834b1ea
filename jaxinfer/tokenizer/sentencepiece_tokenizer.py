"""The tokenizer of a checkpoint that has a sentencepiece tokenizer.model and no tokenizer.json.

Owns: special tokens around and inside a text, what of the checkpoint's tokenizer files is heeded.
Does not know: how sentencepiece encodes, chat templates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece

from jaxinfer.tokenizer.byte_pieces import byte_of
from jaxinfer.tokenizer.config_file import read_json_object
from jaxinfer.tokenizer.fixed_texts import FixedTexts

SPACE = "\u2581"  # as sentencepiece writes it in its pieces


class SentencePieceTokenizer:
    """The tokenizer of a checkpoint directory that has a sentencepiece tokenizer.model and no tokenizer.json.

    BOS is put before a prompt unless tokenizer_config.json says `add_bos_token: false`; EOS is put after it only if
    `add_eos_token` is true. The special tokens are the control pieces and the unknown piece. sentencepiece itself reads
    "<s>" in a text as three letters; here, as with a tokenizer.json, it becomes the special token of that name.

    Args:
      directory: the checkpoint's folder.

    Raises:
      FileNotFoundError: there is no tokenizer.model.
      ValueError: a file cannot be read, or the checkpoint adds tokens to the sentencepiece model, which only a
        tokenizer.json can describe; the message names the file.

    Source: transformers' LlamaTokenizer (legacy), for the special tokens; sentencepiece itself encodes and decodes the
    text between them.
    """

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        self._model = _read_sentencepiece(directory / "tokenizer.model")
        self.vocab_size = self._model.vocab_size()
        config_file = directory / "tokenizer_config.json"
        config = read_json_object(config_file) if config_file.exists() else {}
        _refuse_added_tokens(directory, config, self.vocab_size)
        bos = _id_or_none(self._model.bos_id())
        eos = _id_or_none(self._model.eos_id())
        self.eos_token_ids = () if eos is None else (eos,)
        self._prefix = [] if bos is None or config.get("add_bos_token") is False else [bos]
        self._suffix = list(self.eos_token_ids) if config.get("add_eos_token") is True else []
        is_special = (i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i))
        self.special_token_ids = frozenset(is_special)
        self._special_ids = {self._model.id_to_piece(token_id): token_id for token_id in self.special_token_ids}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_names = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        decodes_tokenwise = type(self).decode is SentencePieceTokenizer.decode
        self.fixed_texts = FixedTexts(self.decode, self._is_tokenwise) if decodes_tokenwise else None

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the BOS and EOS that tokenizer_config.json asks for."""
        return self._prefix + self.encode_plain(text) + self._suffix

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text without BOS and EOS; a special token's name in it becomes that token.

        A model with a dummy prefix adds its space at the beginning of the text and after each special token.
        """
        ids: list[int] = []
        for part in self._special_names.split(text):  # the names are a group, so split returns them as parts too
            special_id = self._special_ids.get(part)
            ids += self._model.encode(part) if special_id is None else [special_id]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids. Special tokens, if not skipped, become their names; sentencepiece decodes the others."""
        known = [i for i in token_ids if 0 <= i < self.vocab_size]
        if skip_special_tokens:
            return self._model.decode([i for i in known if i not in self.special_token_ids])
        runs = groupby(known, key=lambda i: i in self.special_token_ids)
        texts = []
        for special, run in runs:
            ids = list(run)
            texts.append("".join(map(self._model.id_to_piece, ids)) if special else self._run_text(ids, not texts))
        return "".join(texts)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; it lacks its leading space, as the first word of a text does."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes that each token adds in the middle of a text; b"" for special and unused pieces."""
        return tuple(self._piece_bytes(token_id) for token_id in range(self.vocab_size))

    def _piece_bytes(self, token_id: int) -> bytes:
        if token_id in self.special_token_ids or self._model.is_unused(token_id):
            return b""
        piece = self._model.id_to_piece(token_id)
        return byte_of(piece) if self._model.is_byte(token_id) else piece.replace(SPACE, " ").encode()

    def _is_tokenwise(self, token_id: int) -> bool:
        is_ordinary = 0 <= token_id < self.vocab_size and token_id not in self.special_token_ids
        return is_ordinary and not self._model.is_byte(token_id)

    def _run_text(self, token_ids: list[int], is_first: bool) -> str:
        """Text of ordinary tokens. sentencepiece drops the first token's space; it is put back unless is_first."""
        space = "" if is_first or not self._model.id_to_piece(token_ids[0]).startswith(SPACE) else " "
        return space + self._model.decode(token_ids)


def _read_sentencepiece(file: Path) -> sentencepiece.SentencePieceProcessor:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; a checkpoint's tokenizer is read from it")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file}: expected a sentencepiece model: {error}") from error


def _refuse_added_tokens(directory: Path, config: dict[str, Any], vocab_size: int) -> None:
    file = directory / "added_tokens.json"
    added = list(read_json_object(file).values()) if file.exists() else []
    for token_id in added:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ValueError(f"{file}: expected a token id for each text, got {token_id!r}")
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: added_tokens_decoder must be an object, got {decoder!r}"
        )
    added += [int(token_id) for token_id in decoder if token_id.isdecimal()]
    beyond = [i for i in added if i >= vocab_size]
    if beyond:
        raise ValueError(
            f"{directory} adds token {min(beyond)} to the {vocab_size} of tokenizer.model, which cannot be read from "
            "it; save the tokenizer as tokenizer.json (transformers' fast tokenizer does)"
        )


def _id_or_none(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
