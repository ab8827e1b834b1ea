"""The bytes of tokens: joined they are the decoded text, for every kind of tokenizer."""

from __future__ import annotations

import re
from functools import cache

import pytest
import sentencepiece
import tokenizers
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_tools import DIRECTORIES
from tokenizers import decoders, models

from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.file_tokenizer import FileTokenizer
from jaxinfer.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer
from jaxinfer.tokenizer.vocabulary import token_bytes

DEMO = GOLDEN.parents[1] / "jaxinfer" / "demo" / "model"
ALL = [*DIRECTORIES, "demo", "bytes"]
FALLBACK = ("metaspace", "demo")
"""Tokenizers in which a run of <0xNN> tokens that is no UTF-8 decodes by rules of its own."""
REPLACEMENT = "\ufffd"


@cache
def tokenizer_named(name: str) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    return SentencePieceTokenizer(DEMO) if name == "demo" else FileTokenizer(DIRECTORIES[name])


@cache
def table_of(name: str) -> tuple[bytes, ...]:
    return token_bytes(tokenizer_named(name))


class Foreign:
    """A tokenizer of somebody else's: the protocol's methods and nothing more."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids = tokenizer.eos_token_ids
        self.special_token_ids = tokenizer.special_token_ids
        self.encode, self.encode_plain = tokenizer.encode, tokenizer.encode_plain
        self.decode, self.token_text = tokenizer.decode, tokenizer.token_text


def equal_up_to_first_space(joined: str, text: str) -> bool:
    return text in (joined, joined.removeprefix(" "))


@pytest.mark.parametrize("name", ALL)
def test_token_bytes_has_one_entry_a_token_and_none_for_special_ones(name: str) -> None:
    tokenizer, table = tokenizer_named(name), table_of(name)
    assert len(table) == tokenizer.vocab_size
    assert {i for i, added in enumerate(table) if not added} == set(tokenizer.special_token_ids)


@pytest.mark.parametrize("name", ["byte_level", "bytes"])
@settings(max_examples=80)
@given(data=st.data())
def test_token_bytes_of_any_ids_joined_is_the_decoded_text(name: str, data: st.DataObject) -> None:
    """Exact, malformed bytes included: both readings write one U+FFFD for each maximal malformed part."""
    ids = data.draw(st.lists(st.integers(0, tokenizer_named(name).vocab_size - 1), max_size=30))
    joined = b"".join(table_of(name)[i] for i in ids)
    assert joined.decode(errors="replace") == tokenizer_named(name).decode(ids)


@pytest.mark.parametrize("name", FALLBACK)
@settings(max_examples=80)
@given(data=st.data())
def test_token_bytes_with_byte_fallback_joined_is_the_decoded_text(name: str, data: st.DataObject) -> None:
    """Exact up to one leading space for whole characters; byte tokens come as all the bytes of a character."""
    tokenizer, table = tokenizer_named(name), table_of(name)
    byte_ids = {bytes([byte]): i for byte in range(256) for i in [byte + 3] if table[i] == bytes([byte])}
    assert len(byte_ids) == 256
    pieces = st.integers(259, tokenizer.vocab_size - 1).map(lambda i: [i]) | st.just([1])
    whole = st.characters(codec="utf-8").map(lambda letter: [byte_ids[bytes([b])] for b in letter.encode()])
    ids = [i for part in data.draw(st.lists(pieces | whole, max_size=20)) for i in part]
    joined = b"".join(table[i] for i in ids).decode()
    assert equal_up_to_first_space(joined, tokenizer.decode(ids))


@pytest.mark.parametrize("name", FALLBACK)
@settings(max_examples=80)
@given(data=st.data())
def test_token_bytes_malformed_byte_tokens_leave_the_text_around_them_equal(name: str, data: st.DataObject) -> None:
    """Around a malformed run only the run itself reads differently: what comes before and behind it is equal."""
    tokenizer, table = tokenizer_named(name), table_of(name)
    pieces = st.lists(st.integers(259, tokenizer.vocab_size - 1), min_size=1, max_size=8)
    left, right = data.draw(pieces), data.draw(pieces)
    run = data.draw(st.lists(st.integers(0x80 + 3, 0xBF + 3), min_size=1, max_size=4))  # continuation bytes alone
    joined = b"".join(table[i] for i in left + run + right).decode(errors="replace")
    text = tokenizer.decode(left + run + right)
    assert equal_up_to_first_space(re.sub("\ufffd+", REPLACEMENT, joined), re.sub("\ufffd+", REPLACEMENT, text))


@pytest.mark.parametrize("name", ALL)
def test_token_bytes_foreign_tokenizer_by_decoding_equals_own_table(name: str) -> None:
    """Equal wherever a token is whole characters; the others are U+FFFD, as decode shows them."""
    foreign = token_bytes(Foreign(tokenizer_named(name)))
    for own, decoded in zip(table_of(name), foreign, strict=True):
        assert decoded.decode() == own.decode(errors="replace")


def test_token_bytes_foreign_tokenizer_without_text_raises() -> None:
    foreign = Foreign(tokenizer_named("bytes"))
    foreign.decode = lambda ids, **_: REPLACEMENT * len(ids)
    with pytest.raises(
        ValueError, match="expected a tokenizer with a token that is text by itself, got none among 256"
    ):
        token_bytes(foreign)


VOCABULARY = {"<unk>": 0, "lo": 1, "▁hel": 2, "##ing": 3, "wor": 4, "end</w>": 5, "Ġx": 6, "<0x41>": 7, "é": 8}
DECODERS = {
    "none": (None, {"lo": b" lo", "##ing": b" ##ing"}),
    "word_piece": (decoders.WordPiece(), {"lo": b" lo", "##ing": b"ing"}),
    "bpe_suffix": (decoders.BPEDecoder(), {"lo": b"lo", "end</w>": b"end "}),
    "metaspace": (decoders.Metaspace(), {"▁hel": b" hel", "lo": b"lo", "<0x41>": b"<0x41>"}),
    "byte_fallback": (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), {"<0x41>": b"A", "lo": b"lo"}),
    "byte_level": (decoders.ByteLevel(), {"Ġx": b" x", "▁hel": "▁hel".encode(), "é": b"\xe9", "lo": b"lo"}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_token_bytes_by_decoder_is_what_it_makes_of_a_piece_in_the_middle(tmp_path, name: str) -> None:
    decoder, expected = DECODERS[name]
    tokenizer = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens(["two words"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = token_bytes(FileTokenizer(tmp_path))
    assert {piece: table[VOCABULARY[piece]] for piece in expected} == expected
    assert table[9].strip() == b"two words"


def test_token_bytes_id_without_a_token_is_empty(tmp_path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    own = FileTokenizer(tmp_path)
    assert set(token_bytes(own)[1:]) <= {b"", b" b"}
    assert len(token_bytes(own)) == own.vocab_size


def test_token_bytes_sentencepiece_user_defined_piece_is_its_text(tmp_path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the river and the house"] * 20),
            model_writer=file,
            vocab_size=290,
            byte_fallback=True,
            model_type="bpe",
            user_defined_symbols=["<tool>"],
            hard_vocab_limit=False,
            minloglevel=2,
        )
    tokenizer = SentencePieceTokenizer(tmp_path)
    assert b"<tool>" in token_bytes(tokenizer)
