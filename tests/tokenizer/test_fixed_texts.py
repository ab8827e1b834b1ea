"""IncrementalDetokenizer: fixed texts looked up give the text that decoding them gives, at a bounded cost."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tokenizers
from conftest import GOLDEN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_tools import DIRECTORIES, token_lists, whole
from tokenizers import decoders, models

from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.detokenizer import MAX_WINDOW, IncrementalDetokenizer
from jaxinfer.tokenizer.file_tokenizer import FileTokenizer
from jaxinfer.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer

DEMO = GOLDEN.parents[1] / "jaxinfer" / "demo" / "model"
REPLACE = decoders.Replace("▁", " ")
LLAMA = [REPLACE, decoders.ByteFallback(), decoders.Fuse()]
# By name: a decoder of the tokenizers library, and whether it reads tokens without a look at their neighbours.
DECODERS = {
    "letters": (decoders.ByteLevel(), True),
    "letters_in_sequences": (decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])]), True),
    "spaces": (decoders.Metaspace(), True),
    "gemma": (decoders.Sequence(LLAMA), True),
    "llama": (decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]), True),
    "strip_three": (decoders.Sequence([*LLAMA, decoders.Strip(" ", 3, 0)]), True),
    "strip_each": (decoders.Sequence([REPLACE, decoders.Strip(" ", 1, 0)]), True),
    "cleans_up_the_joined_text": (decoders.Sequence([*LLAMA, decoders.Replace(" .", ".")]), False),
    "word_piece": (decoders.WordPiece(cleanup=True), False),
    "bpe_suffix": (decoders.BPEDecoder(), False),
    "ctc": (decoders.CTC(), False),
    "none": (None, False),
}
ALL = [*DECODERS, *DIRECTORIES, "demo", "bytes"]
PIECES = [
    *("<unk>", "lo", "▁hel", "##ing", "end</w>", "e", "\u0301", "é", "▁", "▁▁", "▁▁▁", ".", "▁.", "'s", "▁'"),
    *("\ufffd", "a\ufffd", " b", "c ", " ", "|", "<pad>", "Ġx", "Ċ", "\u200d", "👩", "👧", "ðŁ", "Ĵ", "©"),
    *(f"<0x{byte:02X}>" for byte in b"A\n\xff\x80" + "é日💩".encode()),
]


@cache
def tokenizer_named(name: str) -> Tokenizer:
    if name in DECODERS:
        return tokenizer_with(DECODERS[name][0])
    if name == "bytes":
        return ByteTokenizer()
    return SentencePieceTokenizer(DEMO) if name == "demo" else FileTokenizer(DIRECTORIES[name])


def tokenizer_with(decoder: decoders.Decoder | None) -> FileTokenizer:
    """Words, punctuation, spaces, parts of characters, byte tokens, added tokens and a special one."""
    library = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    if decoder is not None:
        library.decoder = decoder
    library.add_tokens(["two words", "日本"])
    library.add_special_tokens(["<s>"])
    with TemporaryDirectory() as directory:
        library.save(str(Path(directory) / "tokenizer.json"))
        return FileTokenizer(directory)


class Decoding:
    """A tokenizer that can only decode, as one of somebody else's; it counts the tokens it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = tokenizer.special_token_ids
        self.lens: list[int] = []

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.lens.append(len(token_ids))
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def deltas(tokenizer: Tokenizer | Decoding, prompt: list[int], output: list[int], *, skip: bool) -> list[str]:
    """What each token and finish give out."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [detokenizer.push([token_id]) for token_id in output] + [detokenizer.finish()]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_detokenizer_fixed_texts_looked_up_give_the_text_of_decoding(name: str, data, skip: bool) -> None:
    """Token by token: what is certain is given out at the same moment, malformed and cut-off characters included."""
    tokenizer = tokenizer_named(name)
    prompt, output = (data.draw(token_lists(tokenizer.vocab_size, 25)) for _ in range(2))
    decoded = deltas(Decoding(tokenizer), prompt, output, skip=skip)
    assert deltas(tokenizer, prompt, output, skip=skip) == decoded


@pytest.mark.parametrize("name", DECODERS)
def test_detokenizer_decoder_that_looks_at_neighbours_has_no_fixed_texts(name: str) -> None:
    assert (tokenizer_named(name).fixed_texts is not None) == DECODERS[name][1]


def test_subclass_that_decodes_otherwise_is_asked_for_every_text() -> None:
    class Shouting(ByteTokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens).replace("ab", "aB")

    detokenizer = IncrementalDetokenizer(Shouting(), [99], skip_special_tokens=True)
    assert "".join(detokenizer.push([byte]) for byte in b"cab") + detokenizer.finish() == "caB"
    assert Shouting().fixed_texts is None


def test_fixed_texts_by_decoder() -> None:
    def fixed(name: str, piece: str) -> tuple[str, str] | None:
        found = tokenizer_named(name).fixed_texts[PIECES.index(piece)]
        return None if found is None else (found.inside, found.alone)

    assert fixed("llama", "▁hel") == (" hel", "hel")
    assert fixed("llama", "lo") == fixed("letters", "lo") == ("lo", "lo")
    assert fixed("llama", "▁") == (" ", "")
    assert fixed("strip_three", "▁") is None  # a text that begins with it loses spaces of the next token, too
    assert fixed("llama", "<0x41>") is None  # a letter, but a part of its run of bytes
    assert fixed("llama", "\ufffd") is fixed("llama", "a\ufffd") is None
    assert fixed("letters", "Ġx") == (" x", " x")
    assert fixed("letters", "ðŁ") is fixed("letters", "©") is None  # parts of characters
    assert tokenizer_named("llama").fixed_texts[len(PIECES) + 9] is None


@pytest.mark.parametrize("name", [*DIRECTORIES, "demo", "bytes"])
def test_tokenizer_with_its_fixed_texts_survives_pickling(name: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode_plain("the house")
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert [copied.fixed_texts[i] for i in ids] == [tokenizer.fixed_texts[i] for i in ids] != [None] * len(ids)


@pytest.mark.parametrize("name", [*DIRECTORIES, "demo", "bytes"])
def test_detokenizer_ordinary_text_is_hardly_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token with a fixed text is decoded when first seen; every other output finds it in the table."""
    tokenizer = tokenizer_named(name)
    prompt, output = tokenizer.encode("And he said"), tokenizer.encode_plain(" unto them, and went home." * 20)
    expected = whole(tokenizer, prompt, output, skip=True)
    deltas(tokenizer, prompt, output, skip=True)
    counting = Decoding(tokenizer)
    monkeypatch.setattr(counting, "fixed_texts", tokenizer.fixed_texts, raising=False)
    assert "".join(deltas(counting, prompt, output, skip=True)) == expected
    assert counting.lens == [1]  # the end of the prompt


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("has_table", [True, False])
def test_detokenizer_long_prompt_costs_no_more_than_its_end(name: str, has_table: bool) -> None:
    tokenizer = tokenizer_named(name)
    counting = Decoding(tokenizer)
    if has_table:
        counting.fixed_texts = tokenizer.fixed_texts
    words = [PIECES.index("lo"), PIECES.index("e")]
    prompt = words if name in DECODERS else tokenizer.encode("naïve — 日本語, and ")
    IncrementalDetokenizer(counting, prompt * 20_000, skip_special_tokens=True)
    assert sum(counting.lens) < 10 * MAX_WINDOW


@pytest.mark.parametrize("name", ["metaspace", "demo", "bytes"])
@pytest.mark.parametrize("letter", ["日", "🦄"])
@example(num_letters=21)
@example(num_letters=90)
@settings(max_examples=10, deadline=None)
@given(num_letters=st.integers(1, 200))
def test_detokenizer_without_a_table_reads_a_prompt_that_is_one_run_of_bytes(
    name: str, letter: str, num_letters: int
) -> None:
    """The window at the prompt's end is doubled until it does not begin inside a character."""
    tokenizer = tokenizer_named(name)
    prompt, output = tokenizer.encode(letter * num_letters), tokenizer.encode_plain("x" + letter)[-5:]
    text = "".join(deltas(Decoding(tokenizer), prompt, output, skip=True))
    assert text == whole(tokenizer, prompt, output, skip=True)


def test_detokenizer_prompt_ends_in_a_long_malformed_run_of_bytes_output_is_part_of_it() -> None:
    """ByteFallback writes U+FFFD for every byte of the run, however far back the malformed one is."""
    tokenizer = tokenizer_named("metaspace")
    day = tokenizer.encode_plain("日")[-3:]
    prompt = [*tokenizer.encode("x"), 3 + 0xFF, *day * 300]
    assert (
        "".join(deltas(tokenizer, prompt, [*day, *tokenizer.encode_plain("xy")[-1:]], skip=True)) == "\ufffd" * 3 + "y"
    )
