"""Tokenizers, token lists and the definition of detokenised text that several test files share."""

from __future__ import annotations

from functools import cache

from conftest import GOLDEN
from hypothesis import strategies as st

from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.file_tokenizer import FileTokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer

DIRECTORIES = {"byte_level": GOLDEN / "gqa", "metaspace": GOLDEN / "tokenizers" / "metaspace"}
ALL = [*DIRECTORIES, "bytes"]


@cache
def tokenizer_named(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "bytes" else FileTokenizer(DIRECTORIES[name])


def whole(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool) -> str:
    """The definition: decode(prompt + output) with decode(prompt) taken off the front."""
    prompt_text = tokenizer.decode(prompt, skip_special_tokens=skip)
    return tokenizer.decode(prompt + output, skip_special_tokens=skip)[len(prompt_text) :]


def token_lists(vocab_size: int, max_size: int) -> st.SearchStrategy[list[int]]:
    """Random ids, among them ids beyond the vocabulary, and runs of one id."""
    ids = st.integers(0, vocab_size + 2)
    runs = st.tuples(ids, st.integers(1, 30)).map(lambda run: [run[0]] * run[1])
    pieces = st.lists(ids.map(lambda i: [i]) | runs, max_size=max_size)
    return pieces.map(lambda parts: [i for part in parts for i in part])
