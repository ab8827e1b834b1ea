"""Text to token ids and back: the tokenizers a checkpoint may bring, and text that grows with the tokens.

Owns: reading tokenizer.json, tokenizer.model and tokenizer_config.json, the built-in byte tokenizer, incremental
detokenisation.
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
# A character that is not complete lacks at least one of its at most four bytes.
MAX_HELD = 3
# Detokenisation window: when it reaches MAX_WINDOW tokens, all but the newest KEPT_WINDOW are let go. 32 tokens of one
# byte each hold seven characters even where each takes four bytes: more than the MATCHED_TAIL that must agree before
# anything is let go.
MAX_WINDOW = 64
KEPT_WINDOW = 32
MATCHED_TAIL = 6
ANCHOR = "a"  # a piece that every decoder leaves as it is
BYTE_LEVEL_SPACE = "\u0120"
# Steps of a decoder in tokenizer.json that turn each token into text by itself, byte tokens of ByteFallback apart.
TOKENWISE_STEPS = frozenset({"Replace", "ByteFallback", "Metaspace", "Strip"})
BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
SPECIAL_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SPECIAL_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
BYTE_SPECIAL_NAMES = {256: b"<s>", 257: b"</s>"}


@runtime_checkable
class Tokenizer(Protocol):
    """What the controller asks of a tokenizer.

    Attributes:
      vocab_size: one more than the largest token id.
      eos_token_ids: the tokens that end a text, as the tokenizer's own files name them; a checkpoint's
        generation_config may say otherwise and then counts.
      special_token_ids: the tokens that decode leaves out when skip_special_tokens is True.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as the tokenizer's own files name them."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that decode can leave out."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens (BOS and such) that the checkpoint puts around one."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone, with no special token put around it; special tokens named in it become tokens."""
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
    """The texts of a tokenizer's plain tokens by token id, None for other ids; each is found out when first asked for.

    A token is plain if no token before or behind it changes its text, save that the first token of a text may lose a
    space. Most words are. A token that holds a part of a character is not: its text is U+FFFD or a part of a
    character, depending on its neighbours. IncrementalDetokenizer looks plain tokens up here instead of decoding them.

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
        # A decoder that takes more spaces off a text's beginning than this token has would take the next token's, too.
        is_plain = inside.endswith(alone) and thrice == alone + inside + inside
        return PlainText(inside=inside, alone=alone) if inside and is_plain and REPLACEMENT not in thrice else None


class FileTokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.json, with tokenizer_config.json where there is one.

    What is put around a prompt is what tokenizer.json's post-processor says. `add_bos_token` and `add_eos_token` in
    tokenizer_config.json are not read: transformers drops them where a tokenizer.json exists, so no BOS is added twice
    or against the file. Truncation and padding stored in the file are turned off, `clean_up_tokenization_spaces` is
    ignored (as transformers does for BPE). A special token that tokenizer_config.json names and the vocabulary lacks
    counts as absent.

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
        # Named in the config but not flagged in tokenizer.json: flag it, or decode would not leave it out.
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
        """Ids of a prompt, with what the post-processor puts around it."""
        return self._tokenizer.encode(text).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone; a Llama-2 style tokenizer still puts its leading space in front."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids, exactly as the `tokenizers` library decodes them."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token alone; a Llama-2 style tokenizer drops the leading space."""
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
        return piece is not None and not piece.startswith("<0x")  # a byte token if the decoder has a ByteFallback


class SentencePieceTokenizer:
    """The tokenizer of a checkpoint directory that has a sentencepiece tokenizer.model and no tokenizer.json.

    BOS is put in front of a prompt unless tokenizer_config.json says `add_bos_token: false`; EOS behind it only where
    `add_eos_token` is true. Special are the control pieces and the unknown piece. sentencepiece itself reads "<s>" as
    three letters; here, as in a tokenizer.json, the name of a special token in a text is the token.

    Args:
      directory: the checkpoint's folder.

    Raises:
      FileNotFoundError: there is no tokenizer.model.
      ValueError: a file cannot be read, or the checkpoint adds tokens to the sentencepiece model, which only a
        tokenizer.json can describe; the message names the file.

    Source: transformers' LlamaTokenizer (legacy), for what is put around a prompt and the names of special tokens; ids
    and text between them are sentencepiece's own.
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
        """Ids of a prompt, between the BOS and EOS that tokenizer_config.json asks for."""
        return self._prefix + self.encode_plain(text) + self._suffix

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone; a special token's name in it becomes that token.

        A model with a dummy prefix puts its space in front of the text and of what follows a special token.
        """
        ids: list[int] = []
        for part in self._special_names.split(text):  # the names, too, for they are a group
            special_id = self._special_ids.get(part)
            ids += self._model.encode(part) if special_id is None else [special_id]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids, as sentencepiece decodes the runs between special tokens."""
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
        """Text of one token alone, without the space that a text's first word would lose."""
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
        """Text of ordinary tokens; sentencepiece drops the first one's space, which is right at the beginning only."""
        space = "" if is_first or not self._model.id_to_piece(token_ids[0]).startswith(SPACE) else " "
        return space + self._model.decode(token_ids)


class ByteTokenizer:
    """One token per byte of UTF-8: ids 0 to 255 are the bytes, 256 begins a text, 257 ends it. Needs no file.

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
        """Text of one byte alone; U+FFFD for a byte that is no character by itself."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes that each token adds in the middle of a text; b"" for BOS and EOS."""
        return (*(bytes([byte]) for byte in range(256)), b"", b"")

    def _is_tokenwise(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size


def load_tokenizer(directory: Path | str) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory.

    Returns:
      A FileTokenizer where there is a tokenizer.json, else a SentencePieceTokenizer where there is a tokenizer.model;
      None where the checkpoint has no tokenizer.

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
    """The text of an output while its tokens arrive: decode(prompt + output) with decode(prompt) taken off the front.

    Text is given out as soon as it is certain, never half a character: up to three U+FFFD at the end are held back,
    because the next tokens may turn them into one character. More of them in a row cannot be one cut-off character, so
    the older ones are given out: a U+FFFD that belongs to the text waits for three more tokens with text at most, or
    for finish. What push and finish return adds up to

        decode(prompt + output)[len(decode(prompt)):]

    Two cases where that formula alone would not do:
    - A prompt that ends in half a character: the character counts as the prompt's (its U+FFFD was the prompt's last),
      so the output begins behind it.
    - A tokenizer with ByteFallback decodes a run of byte tokens to U+FFFD throughout if any of it is malformed, also
      characters given out before the malformed byte came. Text given out is never taken back: those characters stay,
      and only the bytes behind them become U+FFFD (sentencepiece reads such a run in this way).

    A plain token (see PlainTexts; nearly all tokens of ordinary text) that follows another is not decoded, its text is
    looked up. Any other token costs one decode of a window: the tokens since the last plain one, or at most about
    MAX_WINDOW of them, whatever the length of the text. (The window grows beyond that only while its end depends on
    its beginning: in a malformed run of byte tokens longer than the window.) Of the prompt, too, only such a window is
    ever decoded.

    Args:
      tokenizer: decodes. Where it has an attribute plain_texts that is not None, plain tokens are looked up there.
      prompt_token_ids: the prompt.
      skip_special_tokens: leave special tokens out of the text.

    Source: the prefix_offset/read_offset scheme of text-generation-inference
    (server/text_generation_server/models/model.py, Model.decode_token) and vLLM
    (transformers_utils/detokenizer_utils.py, detokenize_incrementally): decode a short window with and without the new
    tokens and give out the difference. Deviations: the border between old and new text is kept as a count of
    characters, not as a token offset, so that text is given out although every token ends inside a character, and
    U+FFFD in the text is not held for ever; the window moves only to a plain token, or after its end has been seen not
    to depend on what is let go; special tokens that are left out never enter the window.

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
        # The window's text is _given + _held as of its first _num_settled tokens; later ones await a decision. Behind a
        # plain token the window is that token and nothing is held or undecided.
        self._given = self._held = ""
        self._num_settled = 0
        self._is_after_plain = False
        self._read_prompt(prompt_token_ids)

    @property
    def text(self) -> str:
        """All text given out so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next output tokens.

        Returns:
          The text that they make certain; "" while a character is incomplete.
        """
        new_text = "".join([self._push(token_id) for token_id in token_ids if token_id not in self._dropped])
        self._parts.append(new_text)
        return new_text

    def finish(self) -> str:
        """Ends the output.

        Returns:
          The text that was held back: a character that was cut off, as U+FFFD. "" when called again.
        """
        new_text = self._restart() if self._num_settled < len(self._window) else ""
        new_text += self._held
        self._given, self._held = self._given + self._held, ""
        self._parts.append(new_text)
        return new_text

    def _read_prompt(self, token_ids: Sequence[int]) -> None:
        """Takes as much of the prompt's end into the window as the text behind it depends on."""
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
        """Doubles the window, from the prompt's end on, until its own end reads the same without its older tokens."""
        num_more = MAX_WINDOW
        while True:
            more = list(islice(newest_first, num_more))
            self._take_as_given(more[::-1] + self._window)
            if len(more) < num_more or self._slide():
                return
            num_more = len(self._window)

    def _take_as_given(self, window: list[int]) -> None:
        """Makes tokens of the prompt the window; their text is the prompt's."""
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
        """Lets go of all that is before a plain token: no text behind it depends on that."""
        self._window, self._given, self._num_settled = [token_id], plain.alone, 1
        self._max_window = MAX_WINDOW
        self._is_after_plain = True

    def _read(self, token_id: int) -> str:
        """Decodes the window with one more token."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.startswith(self._given.rstrip(REPLACEMENT)):
            return self._advance(text)
        # Text given out reads differently now: ByteFallback amid a character, or in a run that has become malformed.
        num_open = len(self._window) - self._num_settled
        if text.endswith(REPLACEMENT) and num_open <= MAX_HELD:
            return ""
        return self._restart()

    def _advance(self, text: str) -> str:
        """Gives out what is new and certain in the window's text."""
        end = max(self._certain_len(text), len(self._given))
        new_text = text[len(self._given) : end]
        self._given, self._held = text[:end], text[end:]
        self._num_settled = len(self._window)
        if len(self._window) >= self._max_window and len(self._held) <= MAX_HELD:
            self._slide()
        return new_text

    def _certain_len(self, text: str) -> int:
        """How much of the window's text no further token can change."""
        settled_len = len(text.rstrip(REPLACEMENT))
        if len(text) - settled_len <= MAX_HELD:
            return settled_len
        # ByteFallback turns whole U+FFFD in the text into one for each byte while the next character is incomplete.
        shorter = (self._decode(self._window[:-i]) for i in range(1, MAX_HELD + 1))
        return max(settled_len, min(len(text) - MAX_HELD, *map(len, shorter)))

    def _restart(self) -> str:
        """Leaves the text as it was given out and reads the undecided tokens by themselves."""
        held = self._held
        del self._window[: self._num_settled]
        self._given = self._held = ""
        return held + self._advance(self._decode(self._window))

    def _slide(self) -> bool:
        """Lets the oldest tokens of the window go, if its end reads the same without them; returns whether it does."""
        newest = len(self._window) - KEPT_WINDOW
        # Without its last one to three tokens as well: then a malformed run is told from one that is only incomplete.
        ends = [len(self._window) - i for i in range(MAX_HELD + 1)]
        old = [self._decode(self._window[:end]) for end in ends]
        for start in range(newest, newest - MAX_HELD - 1, -1):  # one of four neighbours is not inside a character
            new = [self._decode(self._window[start:end]) for end in ends]
            if _end_alike(old, new):
                del self._window[:start]
                self._given = new[0][: len(new[0]) - len(self._held)]
                self._num_settled = len(self._window)
                self._max_window = MAX_WINDOW
                return True
        self._max_window *= 2  # so that trying again costs no more than the tokens did
        return False

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _end_alike(old: list[str], new: list[str]) -> bool:
    """Whether the texts end in the same characters, and the first two grew out of the last two by as many."""
    alike = all(len(b) > MATCHED_TAIL and b.endswith(a[-MATCHED_TAIL:]) for a, b in zip(old, new, strict=True))
    return alike and len(old[0]) - len(old[-1]) == len(new[0]) - len(new[-1])


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in one of a tokenizer's JSON files.

    Raises:
      ValueError: it is no JSON object; the message names the file.
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
    """Whether a decoder turns each token into text, or into bytes of UTF-8, without a look at its neighbours."""
    steps = [] if decoder is None else _decoder_steps(json.loads(decoder.__getstate__()))
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return True
    num_tokenwise = names.index("Fuse") if "Fuse" in names else len(names)
    # Fuse joins the tokens; of what may follow, a Strip of the text's beginning concerns the first token only.
    on_joined = [step for step in steps[num_tokenwise:] if step["type"] != "Fuse"]
    return (
        bool(steps)
        and TOKENWISE_STEPS.issuperset(names[:num_tokenwise])
        and all(step["type"] == "Strip" and step["stop"] == 0 for step in on_joined)
    )


def _decoder_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder as tokenizer.json writes it, as the list of its steps."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _decoder_steps(part)]


def _piece_reader(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """What turns a token as tokenizer.json writes it into the bytes that it adds in the middle of a text.

    The decoder is asked how it reads pieces, because it may be a sequence of several: whether it knows ByteLevel's
    letters for bytes, ByteFallback's <0xNN>, and what a piece becomes between two others.
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
    """The byte of a piece <0xNN>."""
    return bytes([int(piece[3:-1], 16)])


def _byte_level_bytes(piece: str) -> bytes:
    """The bytes of a ByteLevel piece; an added token with other letters than ByteLevel's is plain text."""
    if all(letter in BYTE_LEVEL_LETTERS for letter in piece):
        return bytes(BYTE_LEVEL_LETTERS[letter] for letter in piece)
    return piece.encode()


def _byte_level_letters() -> dict[str, int]:
    """ByteLevel's letter of each byte: printable Latin-1 is itself, the others follow in order from U+0100."""
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
    """The text of a special token as tokenizer_config.json names it: a string, or an object with "content"; or None.

    Raises:
      ValueError: anything else; the message names the file.
    """
    if isinstance(entry, dict):
        entry = entry.get("content")
    if entry is None or isinstance(entry, str):
        return entry
    raise ValueError(f'{file}: a special token must be a string or an object with "content", got {entry!r}')
