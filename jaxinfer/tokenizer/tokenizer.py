"""Tokenizers: text to token ids and back, for whole texts and for outputs that grow token by token.

Owns: the tokenizers that are read from a checkpoint's tokenizer.json or tokenizer.model, the built-in byte tokenizer,
incremental detokenisation.
Does not know: models, requests, stop strings, chat templates, jax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import sentencepiece
import tokenizers

REPLACEMENT = "\ufffd"
SPACE = "\u2581"  # as sentencepiece writes it in its pieces
# A character has at most four bytes in UTF-8, so an incomplete one shows as at most three U+FFFD.
MAX_HELD = 3
# When the detokenisation window reaches MAX_WINDOW tokens, all but the newest KEPT_WINDOW are dropped from it. Before
# that, the last MATCHED_TAIL characters of its text must read the same without the dropped tokens. The kept tokens hold
# at least seven whole characters, even if each token is one byte and each character takes four: enough to compare.
MAX_WINDOW = 64
KEPT_WINDOW = 32
MATCHED_TAIL = 6
ANCHOR = "a"  # a piece that every decoder turns into the same text
BYTE_LEVEL_SPACE = "\u0120"  # the piece by which ByteLevel writes a space
# Decoder steps in tokenizer.json that turn each token into text without a look at its neighbours (except the byte
# tokens of ByteFallback).
TOKENWISE_STEPS = frozenset({"Replace", "ByteFallback", "Metaspace", "Strip"})
BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
SPECIAL_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SPECIAL_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
BYTE_SPECIAL_NAMES = {256: b"<s>", 257: b"</s>"}


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


@dataclass(frozen=True, slots=True)
class PlainText:
    """The text of a token that is the same whatever tokens stand around it.

    Attributes:
      inside: what the token adds to a text that has begun, for example " house".
      alone: its text where it is the first token; some tokenizers drop a space there, so "house".
    """

    inside: str
    alone: str


class PlainTexts(dict[int, PlainText | None]):
    """The texts of a tokenizer's plain tokens by token id, None for other ids; an entry is computed at its first use.

    A token is plain if its text does not depend on its neighbours, except that the first token of a text may lose a
    space. Most tokens are plain, words for example. A token that holds part of a character is not: its text is U+FFFD
    or part of a character, depending on its neighbours. IncrementalDetokenizer looks plain tokens up here instead of
    decoding them.

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

    def __missing__(self, token_id: int) -> PlainText | None:
        self[token_id] = self._find(token_id) if self._is_tokenwise(token_id) else None
        return self[token_id]

    def _find(self, token_id: int) -> PlainText | None:
        alone, twice, thrice = (self._decode([token_id] * n) for n in (1, 2, 3))
        inside = twice[len(alone) :]
        # A decoder that strips more leading spaces than this token has also strips the next token's; the comparison
        # with three copies excludes such tokens.
        is_plain = inside.endswith(alone) and thrice == alone + inside + inside
        return PlainText(inside=inside, alone=alone) if inside and is_plain and REPLACEMENT not in thrice else None


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
        decodes_tokenwise = type(self).decode is FileTokenizer.decode and _reads_tokenwise(self._tokenizer.decoder)
        self.plain_texts = PlainTexts(self.decode, self._is_tokenwise) if decodes_tokenwise else None

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
        piece_bytes = _piece_reader(self._tokenizer)
        return tuple(b"" if piece is None else piece_bytes(piece) for piece in pieces)

    def _is_tokenwise(self, token_id: int) -> bool:
        piece = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return piece is not None and not piece.startswith("<0x")  # "<0x41>" is a byte token of ByteFallback


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
        self.plain_texts = PlainTexts(self.decode, self._is_tokenwise) if decodes_tokenwise else None

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
        return _byte_of(piece) if self._model.is_byte(token_id) else piece.replace(SPACE, " ").encode()

    def _is_tokenwise(self, token_id: int) -> bool:
        is_ordinary = 0 <= token_id < self.vocab_size and token_id not in self.special_token_ids
        return is_ordinary and not self._model.is_byte(token_id)

    def _run_text(self, token_ids: list[int], is_first: bool) -> str:
        """Text of ordinary tokens. sentencepiece drops the first token's space; it is put back unless is_first."""
        space = "" if is_first or not self._model.id_to_piece(token_ids[0]).startswith(SPACE) else " "
        return space + self._model.decode(token_ids)


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
        self.plain_texts = PlainTexts(self.decode, self._is_tokenwise) if decodes_tokenwise else None

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


def load_tokenizer(directory: Path | str) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint directory.

    Returns:
      A FileTokenizer if there is a tokenizer.json, otherwise a SentencePieceTokenizer if there is a tokenizer.model,
      otherwise None.

    Raises:
      ValueError: a tokenizer file cannot be read; the message names it.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        return FileTokenizer(directory)
    if (directory / "tokenizer.model").exists():
        return SentencePieceTokenizer(directory)
    return None


class IncrementalDetokenizer:
    """Decodes an output token by token.

    What push and finish return adds up to the text of prompt and output without the prompt's text at its beginning:

        decode(prompt + output)[len(decode(prompt)):]

    Text is returned as soon as it is certain, and never half a character. A character whose bytes are spread over
    several tokens decodes to up to three U+FFFD until it is complete, so up to three U+FFFD at the end of the text are
    held back. If there are more in a row, the older ones cannot be part of one incomplete character and are returned.

    In two cases the text differs from that formula:
    - A prompt ends in half a character. The character counts as part of the prompt, so the output begins after it.
    - A tokenizer with ByteFallback gets a malformed run of byte tokens. It would decode the whole run to U+FFFD, even
      characters that were returned before the malformed byte came. Returned text is never taken back: those characters
      stay, and only the bytes after them become U+FFFD (as sentencepiece decodes such a run).

    Cost: a plain token (see PlainTexts; nearly all tokens of ordinary text are plain) that follows a plain token is
    looked up, not decoded. Any other token costs one decode of a window: the tokens from the last plain one on, at most
    about MAX_WINDOW of them however long the text is. (The window grows further only inside a malformed run of byte
    tokens longer than the window, because its end then depends on its beginning.) Of the prompt, only such a window is
    decoded.

    Args:
      tokenizer: decodes. If it has an attribute plain_texts that is not None, plain tokens are looked up there.
      prompt_token_ids: the prompt.
      skip_special_tokens: leave special tokens out of the text.

    Source: the prefix_offset/read_offset scheme of text-generation-inference
    (server/text_generation_server/models/model.py, Model.decode_token) and vLLM
    (transformers_utils/detokenizer_utils.py, detokenize_incrementally): decode a short window with and without the new
    tokens and return the difference. Deviations: the border between old and new text is a number of characters, not of
    tokens, so that text comes out even if every token ends inside a character, and U+FFFD that belong to the text are
    not held back for ever; the window moves only to a plain token, or after a check that its end does not depend on the
    tokens dropped; special tokens that are left out of the text never enter the window.

    Example:
      >>> detokenizer = IncrementalDetokenizer(ByteTokenizer(), [104], skip_special_tokens=True)
      >>> [detokenizer.push([byte]) for byte in "aé".encode()], detokenizer.finish(), detokenizer.text
      (['a', '', 'é'], '', 'aé')
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._dropped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._plain_texts: PlainTexts | None = getattr(tokenizer, "plain_texts", None)
        self._parts: list[str] = []
        self._window: list[int] = []
        self._max_window = MAX_WINDOW
        # The first _num_settled tokens of the window decode to _given (returned already) + _held (held back). Tokens
        # after them are undecided. After a plain token the window is that token, and nothing is held or undecided.
        self._given = self._held = ""
        self._num_settled = 0
        self._is_after_plain = False
        self._read_prompt(prompt_token_ids)

    @property
    def text(self) -> str:
        """All text that push and finish have returned so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds the next output tokens.

        Returns:
          The text that is certain now and was not returned before; "" while a character is incomplete.
        """
        new_text = "".join([self._push(token_id) for token_id in token_ids if token_id not in self._dropped])
        self._parts.append(new_text)
        return new_text

    def finish(self) -> str:
        """Ends the output.

        Returns:
          The text that was held back, which is an incomplete character as U+FFFD; "" if there is none.
        """
        new_text = self._restart() if self._num_settled < len(self._window) else ""
        new_text += self._held
        self._given, self._held = self._given + self._held, ""
        self._parts.append(new_text)
        return new_text

    def _read_prompt(self, token_ids: Sequence[int]) -> None:
        """Makes the window of the end of the prompt, as many tokens as the output's text can depend on."""
        newest_first = (i for i in reversed(token_ids) if i not in self._dropped)
        if self._plain_texts is None:
            self._grow_window(newest_first)
            return
        newest: list[int] = []
        for token_id in newest_first:
            newest.append(token_id)
            if self._plain_texts[token_id] is not None:
                break
        self._take_as_given(newest[::-1])
        self._is_after_plain = len(newest) == 1 and self._plain_texts[newest[0]] is not None
        if len(newest) >= MAX_WINDOW:
            self._slide()

    def _grow_window(self, newest_first: Iterator[int]) -> None:
        """Takes ever more tokens of the prompt's end into the window until its text no longer depends on the oldest."""
        num_more = MAX_WINDOW
        while True:
            more = list(islice(newest_first, num_more))
            self._take_as_given(more[::-1] + self._window)
            if len(more) < num_more or self._slide():
                return
            num_more = len(self._window)

    def _take_as_given(self, window: list[int]) -> None:
        """Sets the window to tokens of the prompt, whose text is not part of the output."""
        self._window, self._num_settled = window, len(window)
        self._given = self._decode(window)

    def _push(self, token_id: int) -> str:
        plain = None if self._plain_texts is None else self._plain_texts[token_id]
        if plain is None:
            self._is_after_plain = False
            return self._read(token_id)
        new_text = plain.inside if self._is_after_plain else self._read(token_id)
        self._start_at(token_id, plain)
        return new_text

    def _start_at(self, token_id: int, plain: PlainText) -> None:
        """Starts the window anew at a plain token, since no later text depends on the tokens before it."""
        self._window, self._given, self._num_settled = [token_id], plain.alone, 1
        self._max_window = MAX_WINDOW
        self._is_after_plain = True

    def _read(self, token_id: int) -> str:
        """Adds a token to the window, decodes the window and returns the text that is new and certain."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.startswith(self._given.rstrip(REPLACEMENT)):
            return self._advance(text)
        # Text that was returned decodes differently now. Either ByteFallback waits for the rest of a character, or its
        # run of byte tokens has become malformed, which is certain after more than MAX_HELD tokens.
        num_open = len(self._window) - self._num_settled
        if text.endswith(REPLACEMENT) and num_open <= MAX_HELD:
            return ""
        return self._restart()

    def _advance(self, text: str) -> str:
        """Returns the part of the window's text that is new and certain, and remembers it as returned."""
        end = max(self._certain_len(text), len(self._given))
        new_text = text[len(self._given) : end]
        self._given, self._held = text[:end], text[end:]
        self._num_settled = len(self._window)
        if len(self._window) >= self._max_window and len(self._held) <= MAX_HELD:
            self._slide()
        return new_text

    def _certain_len(self, text: str) -> int:
        """Length of the beginning of the window's text that no further token can change."""
        settled_len = len(text.rstrip(REPLACEMENT))
        if len(text) - settled_len <= MAX_HELD:
            return settled_len
        # While a character is incomplete, ByteFallback decodes even a whole U+FFFD of the text to one for each byte.
        shorter = (self._decode(self._window[:-i]) for i in range(1, MAX_HELD + 1))
        return max(settled_len, min(len(text) - MAX_HELD, *map(len, shorter)))

    def _restart(self) -> str:
        """Keeps the text that was returned, drops its tokens, and decodes the undecided tokens by themselves."""
        held = self._held
        del self._window[: self._num_settled]
        self._given = self._held = ""
        return held + self._advance(self._decode(self._window))

    def _slide(self) -> bool:
        """Drops the oldest tokens of the window if its end decodes the same without them; returns whether it did."""
        newest = len(self._window) - KEPT_WINDOW
        # Compared also without the last one to three tokens, to tell a malformed run from one that is only incomplete.
        ends = [len(self._window) - i for i in range(MAX_HELD + 1)]
        old = [self._decode(self._window[:end]) for end in ends]
        for start in range(newest, newest - MAX_HELD - 1, -1):  # of four neighbours one does not split a character
            new = [self._decode(self._window[start:end]) for end in ends]
            if _end_alike(old, new):
                del self._window[:start]
                self._given = new[0][: len(new[0]) - len(self._held)]
                self._num_settled = len(self._window)
                self._max_window = MAX_WINDOW
                return True
        self._max_window *= 2  # so that all further attempts together cost no more than decoding the tokens
        return False

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _end_alike(old: list[str], new: list[str]) -> bool:
    """Whether texts at the same index end in the same MATCHED_TAIL characters, and the first text of each list is
    longer than its last by equally many characters."""
    alike = all(len(b) > MATCHED_TAIL and b.endswith(a[-MATCHED_TAIL:]) for a, b in zip(old, new, strict=True))
    return alike and len(old[0]) - len(old[-1]) == len(new[0]) - len(new[-1])


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads a tokenizer's JSON file, which must hold an object.

    Raises:
      ValueError: the file is not JSON or not an object; the message names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file}: expected a JSON object, got broken JSON: {error}") from error
    if isinstance(value, dict):
        return value
    raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")


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


def _reads_tokenwise(decoder: tokenizers.decoders.Decoder | None) -> bool:
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


def _piece_reader(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Returns a function from a token as written in tokenizer.json (a piece) to the bytes that it adds inside a text.

    A decoder may consist of several steps, so its kind is found out by decoding samples: whether it understands
    ByteLevel's letters for bytes or ByteFallback's <0xNN>. Any other piece is decoded between two anchors.
    """
    join = " ".join if tokenizer.decoder is None else tokenizer.decoder.decode
    if join([ANCHOR, BYTE_LEVEL_SPACE]) == ANCHOR + " ":
        return _byte_level_bytes
    has_byte_fallback = join([ANCHOR, "<0x41>"]) == ANCHOR + "A"
    before, behind = len(ANCHOR), len(join([ANCHOR, ANCHOR])) - len(ANCHOR)

    def between(piece: str) -> bytes:
        if has_byte_fallback and BYTE_PIECE.fullmatch(piece):
            return _byte_of(piece)
        text = join([ANCHOR, piece, ANCHOR])
        return text[before : len(text) - behind].encode()

    return between


def _byte_of(piece: str) -> bytes:
    """The byte that a piece <0xNN> stands for."""
    return bytes([int(piece[3:-1], 16)])


def _byte_level_bytes(piece: str) -> bytes:
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
    added += [int(i) for i in config.get("added_tokens_decoder") or {} if str(i).isdigit()]
    beyond = [i for i in added if i >= vocab_size]
    if beyond:
        raise ValueError(
            f"{directory} adds token {min(beyond)} to the {vocab_size} of tokenizer.model, which cannot be read from "
            "it; save the tokenizer as tokenizer.json (transformers' fast tokenizer does)"
        )


def _id_or_none(token_id: int) -> int | None:
    return None if token_id < 0 else token_id


def token_name(entry: object, file: Path) -> str | None:
    """Returns a special token's text from its entry in tokenizer_config.json.

    Args:
      entry: a string, an object with "content", or None, which gives None.
      file: the file, for the error message.

    Raises:
      ValueError: the entry is anything else.
    """
    if isinstance(entry, dict):
        entry = entry.get("content")
    if entry is None or isinstance(entry, str):
        return entry
    raise ValueError(f'{file}: a special token must be a string or an object with "content", got {entry!r}')
