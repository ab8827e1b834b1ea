"""The tokenizer of a checkpoint that has a tokenizer.json.

Owns: which tokens are special, what of the checkpoint's tokenizer files is heeded.
Does not know: how the `tokenizers` library encodes, chat templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from jaxinfer.tokenizer.config_file import read_json_object, token_name
from jaxinfer.tokenizer.fixed_texts import FixedTexts
from jaxinfer.tokenizer.library_decoder import decodes_tokenwise, piece_reader

SPECIAL_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SPECIAL_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


class FileTokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.json, with tokenizer_config.json where there is one.

    The post-processor in tokenizer.json decides which special tokens are put around a prompt. `add_bos_token` and
    `add_eos_token` in tokenizer_config.json are not read; transformers ignores them too if there is a tokenizer.json.
    Truncation and padding stored in the file are turned off, and `clean_up_tokenization_spaces` is ignored (as
    transformers does for BPE). A special token that tokenizer_config.json names but the vocabulary lacks is ignored.

    Args:
      directory: the checkpoint's folder.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: one of the two files cannot be read; the message names the file.

    Source: transformers 5, tokenization_utils_tokenizers.py (TokenizersBackend), whose ids and text it reproduces.
    """

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        self._tokenizer = _read_tokenizer(directory / "tokenizer.json")
        config_file = directory / "tokenizer_config.json"
        config = read_json_object(config_file) if config_file.exists() else {}
        names = [token_name(config.get(field), config_file) for field in SPECIAL_TOKEN_FIELDS]
        lists = [config.get(field) or [] for field in SPECIAL_TOKEN_LISTS]
        entries = [entry for group in lists for entry in (group.values() if isinstance(group, dict) else group)]
        names += [token_name(entry, config_file) for entry in entries]
        known = [name for name in names if name is not None and self._tokenizer.token_to_id(name) is not None]
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        # Tokens that only the config calls special are flagged here, so that decode leaves them out too.
        self._tokenizer.add_special_tokens([name for name in known if name not in special])
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_size = max([self._tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        eos = names[SPECIAL_TOKEN_FIELDS.index("eos_token")]
        self._eos_token_id = None if eos is None else self._tokenizer.token_to_id(eos)
        is_tokenwise = type(self).decode is FileTokenizer.decode and decodes_tokenwise(self._tokenizer.decoder)
        self.fixed_texts = FixedTexts(self.decode, self._is_tokenwise) if is_tokenwise else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model's padded vocabulary may be larger."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The id of tokenizer_config.json's eos_token, or nothing."""
        return () if self._eos_token_id is None else (self._eos_token_id,)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens flagged special in tokenizer.json or named in tokenizer_config.json."""
        return self._special_token_ids

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the post-processor adds."""
        return self._tokenizer.encode(text).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text without added special tokens; a Llama-2 style tokenizer still adds its leading space."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids, exactly as the `tokenizers` library decodes them."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; a Llama-2 style tokenizer drops its leading space."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes that each token adds in the middle of a text; b"" for special tokens and ids without a token."""
        pieces = [
            None if i in self._special_token_ids else self._tokenizer.id_to_token(i) for i in range(self.vocab_size)
        ]
        piece_bytes = piece_reader(self._tokenizer)
        return tuple(b"" if piece is None else piece_bytes(piece) for piece in pieces)

    def _is_tokenwise(self, token_id: int) -> bool:
        piece = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return piece is not None and not piece.startswith("<0x")  # "<0x41>" is a byte token of ByteFallback


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; a checkpoint's tokenizer is read from it")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{file}: expected a tokenizer of the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
