"""Structured output and bad words with a model: the texts asked for, equal on every mesh and whatever runs beside.

What tokens a mask leaves is test_structured.py's and test_bad_words.py's; here they are sampled from.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from mesh_tools import on_mesh

from jaxinfer import LLM, RequestOutput, SamplingParams

pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("few_programs")

MATRIX = pytest.mark.matrix
MODEL = "llama"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
REGEX = r"[0-9]{2}-[a-f]{3,8}(x|yz)?"
CHOICES = ["yes", "yellow", "no", "never"]
FORMS = [{"json": SCHEMA}, {"regex": REGEX}, {"choice": CHOICES}]
GREEDY, RANDOM = {"temperature": 0.0}, {"temperature": 1.2}
PLAIN = [SamplingParams(max_tokens=20, seed=50 + i, ignore_eos=True, **RANDOM) for i in range(2)]
BAD = {"bad_words": ["a", "bc", "cdd"], "allowed_token_ids": [*b"abcd"], "ignore_eos": True}
FORMED = [SamplingParams(max_tokens=50, seed=1, structured=form, **kind) for form in FORMS for kind in (RANDOM, GREEDY)]
PARAMS = [*PLAIN, *FORMED, SamplingParams(max_tokens=24, seed=1, n=2, **BAD, **RANDOM)]
PROMPTS = [[*range(number, number + 1 + 3 * number % 13)] for number in range(len(PARAMS))]


def is_what_was_asked(text: str, params: SamplingParams) -> bool:
    if params.bad_words is not None:
        return not any(word in text for word in params.bad_words) and set(text) <= set("bcd")
    if params.structured is None:
        return True
    if params.structured.choice is not None:
        return text in CHOICES
    if params.structured.regex is not None:
        return re.fullmatch(REGEX, text) is not None
    value = json.loads(text)
    name, age = value["name"], value["age"]
    return (
        value.keys() == SCHEMA["properties"].keys()
        and (re.fullmatch("[a-z]{1,6}", name) is not None)
        and (type(age) is int and 0 <= age <= 120)
        and value["kind"] in ("cat", "dog", None)
    )


def tokens_of(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[entry.token_ids for entry in output.outputs] for output in outputs]


@functools.cache
def alone() -> list[list[tuple[int, ...]]]:
    """Every prompt by itself on one device."""
    with on_mesh(MODEL, (1, 1), tokenizer="byte", enable_prefix_caching=False) as llm:
        return tokens_of([llm.generate(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)])


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param((1, 1), {}, marks=MATRIX),
        pytest.param((4, 2), {}, marks=MATRIX),
        ((2, 2), {"enable_prefix_caching": False}),
        pytest.param((1, 1), {"num_kv_pages": 9, "enable_prefix_caching": False}, marks=MATRIX),
        pytest.param((2, 4), {"run_ahead": False}, marks=MATRIX),
        pytest.param((4, 2), {"num_kv_pages": 9, "enable_prefix_caching": False}, marks=MATRIX),
    ],
    ids=str,
)
def test_generate_constrained_texts_are_valid_and_equal_in_any_company(layout, fields):
    with on_mesh(MODEL, layout, tokenizer="byte", **fields) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        stats = llm.stats()
    for output, params in zip(outputs, PARAMS, strict=True):
        assert all(is_what_was_asked(entry.text, params) for entry in output.outputs), output.text
        assert output.finish_reason == ("length" if params.structured is None else "stop")
    assert tokens_of(outputs) == alone()
    assert (stats.num_preemptions > 0) == ("num_kv_pages" in fields)
    assert stats.kv_pages_used == 0


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with on_mesh(MODEL, (1, 1), tokenizer="byte", enable_prefix_caching=False) as llm:
        yield llm


@pytest.mark.parametrize("kind", [GREEDY, RANDOM], ids=str)
def test_generate_regex_of_single_letters_equals_their_ids_allowed(llm, kind):
    """Two ways to the same mask: the grammar's, and the logit edit that test_logit_edits.py holds against numpy."""
    wishes = {"max_tokens": 12, "seed": 5, "ignore_eos": True} | kind
    allowed = llm.generate([7, 8], SamplingParams(allowed_token_ids=[*b"abcdefgh"], **wishes))
    regex = llm.generate([7, 8], SamplingParams(structured={"regex": "[a-h]{12}"}, **wishes))
    assert regex.token_ids == allowed.token_ids
    assert len(set(regex.token_ids)) > 1
    assert (regex.finish_reason, allowed.finish_reason) == ("stop", "length")


def test_generate_bad_word_is_avoided_where_it_would_have_come_and_not_before(llm):
    wishes = {"max_tokens": 24, "seed": 3, "allowed_token_ids": [*b"abcd"], "ignore_eos": True} | RANDOM
    plain = llm.generate([5, 6], SamplingParams(**wishes)).text
    words = [plain[1:3], plain[8:11]]
    found = llm.generate([5, 6], SamplingParams(bad_words=words, **wishes)).text
    completed = min(plain.index(word) + len(word) for word in words)
    assert found[: completed - 1] == plain[: completed - 1] and found[completed - 1] != plain[completed - 1]
    assert not any(word in found for word in words)
    assert len(found) == 24


def test_generate_bad_words_forbid_a_word_in_any_text(llm):
    """Without allowed_token_ids: of all bytes."""
    params = SamplingParams(max_tokens=40, seed=8, ignore_eos=True, **RANDOM)
    plain = llm.generate([3], params).text
    letter = next(letter for letter in plain if letter.isalnum() and letter.isascii())
    assert letter not in llm.generate([3], replace(params, bad_words=[letter])).text


def test_generate_constrained_samples_are_single_requests_with_raw_logprobs(llm):
    params = SamplingParams(
        n=2, seed=4, max_tokens=30, structured={"regex": REGEX}, bad_words=["aa", "0"], logprobs=3, **RANDOM
    )
    output = llm.generate([7, 8], params)
    for entry in output.outputs:
        assert re.fullmatch(REGEX, entry.text) and "aa" not in entry.text and "0" not in entry.text
        single = llm.generate([7, 8], replace(params, n=1, seed=entry.seed))
        assert single.token_ids == entry.token_ids
        scored = llm.score([7, 8, *entry.token_ids], prompt_logprobs=3).prompt_logprobs[2:]
        for found, expected in zip(entry.logprobs, scored, strict=True):
            assert {token: value.rank for token, value in found.items()} == {
                token: value.rank for token, value in expected.items()
            }
            np.testing.assert_allclose(
                [value.logprob for value in found.values()],
                [value.logprob for value in expected.values()],
                atol=1e-4,  # float32, sums in another order
            )
    assert output.outputs[0].text != output.outputs[1].text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"structured": {"choice": ["a"]}}, "a"),
        ({"structured": {"regex": "ab?"}, "bad_words": ["b"]}, "a"),
    ],
    ids=str,
)
def test_generate_min_tokens_text_ends_early_where_only_an_end_is_left(llm, fields, text):
    output = llm.generate([1, 2, 3], SamplingParams(max_tokens=8, min_tokens=5, **fields, **GREEDY))
    assert (output.text, output.finish_reason) == (text, "stop")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured": {"regex": "("}}, r"structured.regex must be a grammar .*unclosed group"),
        ({"structured": {"json": {"type": "objec"}}}, r"structured.json .*Invalid type: objec"),
        ({"structured": {"lark": "start: nothing"}}, r"structured.lark .*unknown name"),
        (
            {"structured": {"choice": ["no"]}, "bad_words": ["n"]},
            r"structured, bad_words and allowed_token_ids together leave no token to begin with",
        ),
        (
            {"structured": {"choice": ["no"]}, "allowed_token_ids": [1, 2]},
            r"structured, bad_words and allowed_token_ids together leave no token to begin with",
        ),
        (
            {"structured": {"regex": "[ab]+"}, "stop_token_ids": [*b"ab"], "min_tokens": 2},
            r"together leave no token to begin with, while min_tokens 2 holds back stop tokens",
        ),
    ],
    ids=str,
)
def test_generate_impossible_constraint_is_refused_and_the_engine_goes_on(llm, fields, message):
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=message):
            call([1, 2], SamplingParams(**fields))
    assert llm.generate([1, 2], SamplingParams(structured={"choice": ["no"]}, **GREEDY)).text == "no"
