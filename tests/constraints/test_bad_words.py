"""Bad words: a token is forbidden exactly if it would complete a word, whichever tokens the text is made of."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.constraints.bad_words import BadWords
from jaxinfer.constraints.constraint import packed_len
from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.vocabulary import token_bytes

LETTERS = "ab\u00e9"  # few, so that words overlap each other and themselves


def allowed_ids(mask: np.ndarray) -> set[int]:
    assert mask.dtype == np.uint32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@st.composite
def vocabularies(draw: st.DrawFn) -> list[bytes]:
    text = st.text(LETTERS, max_size=4).map(str.encode)
    cut = st.tuples(text, st.integers(0, 8), st.integers(0, 8)).map(lambda parts: parts[0][parts[1] : parts[2]])
    return draw(st.lists(text | cut, min_size=1, max_size=40))


@settings(max_examples=100)
@given(
    vocabulary=vocabularies(),
    words=st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4),
    padding=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_bad_words_forbids_exactly_the_tokens_that_complete_a_word(vocabulary, words, padding, seed) -> None:
    vocab_size = len(vocabulary) + padding
    state = BadWords(words, vocabulary, vocab_size).start()
    text, source = b"", random.Random(seed)
    for _ in range(12):
        mask = state.allowed()
        assert mask.shape == (packed_len(vocab_size),)
        allowed = allowed_ids(mask)
        expected = {
            token_id
            for token_id in range(vocab_size)
            if token_id >= len(vocabulary) or not any(word.encode() in text + vocabulary[token_id] for word in words)
        }
        assert allowed == expected
        choice = sorted(token_id for token_id in allowed if token_id < len(vocabulary))
        if not choice:
            return
        token_id = source.choice(choice)
        state.advance(token_id)
        text += vocabulary[token_id]
        assert not state.is_complete


def test_bad_words_overlapping_ends_are_all_followed() -> None:
    state = BadWords(["aab", "ab"], [b"a", b"b", b"c"], 3).start()
    for _ in range(3):
        assert allowed_ids(state.allowed()) == ({0, 1, 2} if state.allowed()[0] == 7 else {0, 2})
        state.advance(0)
    assert allowed_ids(state.allowed()) == {0, 2}
    state.advance(2)
    assert allowed_ids(state.allowed()) == {0, 1, 2}


def test_bad_words_states_are_independent_and_start_afresh() -> None:
    constraint = BadWords(["ab"], [b"a", b"b"], 2)
    first, second = constraint.start(), constraint.start()
    first.advance(0)
    assert allowed_ids(first.allowed()) == {0}
    assert allowed_ids(second.allowed()) == {0, 1}


def test_bad_words_special_tokens_keep_the_end_of_the_text() -> None:
    tokenizer = ByteTokenizer()
    state = BadWords(["hi"], token_bytes(tokenizer), tokenizer.vocab_size).start()
    for token_id in (ord("h"), *sorted(tokenizer.special_token_ids)):
        state.advance(token_id)
        assert set(range(258)) - allowed_ids(state.allowed()) == {ord("i")}


def test_bad_words_no_token_left_is_all_zeros() -> None:
    state = BadWords(["a"], [b"a", b"ba"], 2).start()
    assert not state.allowed().any()


def test_bad_words_tokenizer_larger_than_the_model_is_cut() -> None:
    mask = BadWords(["a"], [b"b", b"a", b"c"], 2).start().allowed()
    assert allowed_ids(mask) == {0}


def test_bad_words_lone_surrogate_forbids_nothing() -> None:
    assert allowed_ids(BadWords(["\ud800"], [b"a"], 1).start().allowed()) == {0}


def test_bad_words_masks_are_shared_and_read_only() -> None:
    constraint = BadWords(["ab"], [b"a", b"b"], 2)
    mask = constraint.start().allowed()
    assert mask is constraint.start().allowed()
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = 0


def test_bad_words_none_forbids_nothing() -> None:
    assert allowed_ids(BadWords([], [b"a", b"b"], 2).start().allowed()) == {0, 1}


def test_bad_words_empty_word_raises() -> None:
    with pytest.raises(ValueError, match="bad_words must not contain an empty string, got \\['a', ''\\]"):
        BadWords(["a", ""], [b"a"], 1)
