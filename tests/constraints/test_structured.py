"""Structured output: random walks over the allowed tokens write what was asked for; errors; limits; end tokens."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.constraints import structured
from jaxinfer.constraints.constraint import ConstraintState, packed_len
from jaxinfer.constraints.structured import MAX_GRAMMAR_BYTES, GrammarCompiler
from jaxinfer.constraints.structured_output import StructuredOutput
from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.file_tokenizer import FileTokenizer
from jaxinfer.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer
from jaxinfer.tokenizer.vocabulary import token_bytes

pytest.importorskip("llguidance")
ALL = ("bytes", "gqa", "demo")
PADDING = 21
MAX_STEPS = 400
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LARK = """
start: sum "."
sum: NUMBER (("+" | "-") NUMBER){0,5}
NUMBER: /[1-9][0-9]{0,3}/
"""


@cache
def tokenizer_named(name: str) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name == "gqa":
        return FileTokenizer(GOLDEN / "gqa")
    return SentencePieceTokenizer(GOLDEN.parents[1] / "jaxinfer" / "demo" / "model")


@cache
def compiler_of(name: str, ends: tuple[int, ...] | None = None, padding: int = PADDING) -> GrammarCompiler:
    tokenizer = tokenizer_named(name)
    ends = tokenizer.eos_token_ids if ends is None else ends
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size + padding, eos_token_ids=ends)


def allowed_ids(state: ConstraintState) -> list[int]:
    return np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little")).tolist()


def spelled(name: str, ids: list[int]) -> str:
    return b"".join(token_bytes(tokenizer_named(name))[i] for i in ids).decode()


def walk(name: str, state: ConstraintState, seed: int) -> str | None:
    """The text of a walk that takes any allowed token; None if it goes on for long."""
    source, ids = random.Random(seed), []
    tokenizer = tokenizer_named(name)
    for _ in range(MAX_STEPS):
        if state.is_complete:
            assert set(allowed_ids(state)) <= set(tokenizer.eos_token_ids)
            return spelled(name, ids)
        allowed = allowed_ids(state)
        assert not set(allowed) & (set(tokenizer.special_token_ids) - set(tokenizer.eos_token_ids))
        assert max(allowed) < tokenizer.vocab_size
        token_id = source.choice(allowed)
        state.advance(token_id)
        ids.append(token_id)
    return None


def walks(name: str, count: int = 12, **spec) -> list[str]:
    constraint = compiler_of(name).compile(StructuredOutput(**spec))
    texts = [walk(name, constraint.start(), seed) for seed in range(count)]
    finished = [text for text in texts if text is not None]
    assert len(finished) > count // 2
    return finished


def follow(state: ConstraintState, text: bytes) -> ConstraintState:
    """Writes a text byte by byte with the byte tokenizer."""
    for token_id in text:
        assert token_id in allowed_ids(state)
        state.advance(token_id)
    return state


def start(*, ends: tuple[int, ...] | None = None, padding: int = PADDING, **spec) -> ConstraintState:
    return compiler_of("bytes", ends, padding).compile(StructuredOutput(**spec)).start()


@pytest.mark.parametrize("name", ALL)
def test_json_schema_any_walk_is_an_instance(name: str) -> None:
    for text in walks(name, json=SCHEMA):
        value = json.loads(text)
        assert {"name", "age", "kind"} <= value.keys() <= SCHEMA["properties"].keys()
        assert isinstance(value["name"], str) and len(value["name"]) <= 8
        assert type(value["age"]) is int and 0 <= value["age"] <= 120
        assert value["kind"] in ("cat", "dog", None)
        assert len(value.get("tags", [])) <= 3 and all(type(tag) is bool for tag in value.get("tags", []))


@pytest.mark.parametrize("schema", [{}, "{}"])
def test_json_empty_schema_is_any_object(schema) -> None:
    assert allowed_ids(start(json=schema)) == [ord("{")]
    assert follow(start(json=schema), b'{"a": [1, {"b": null}], "c": -1.5e3}').is_complete


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("regex", [r"\d{3}-[a-f]{2,5}(x|yz)?", "[^a]{1,9}", "é+ß{2}/\\n?", "^(日本|🙂){1,4}$"])
def test_regex_any_walk_matches_in_full(name: str, regex: str) -> None:
    for text in walks(name, regex=regex):
        assert re.fullmatch(regex, text)


@pytest.mark.parametrize("name", ALL)
def test_lark_any_walk_is_a_sentence(name: str) -> None:
    for text in walks(name, lark=LARK):
        assert re.fullmatch(r"[1-9][0-9]{0,3}([+-][1-9][0-9]{0,3}){0,5}\.", text)


@settings(max_examples=8, deadline=None)
@given(
    choices=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=5),
    name=st.sampled_from(["bytes", "gqa"]),
)
def test_choice_any_walk_is_one_of_them(choices: list[str], name: str) -> None:
    assert set(walks(name, count=6, choice=choices)) <= set(choices)


def test_choice_every_one_can_be_written() -> None:
    choices = ["a", "ab", 'say "x"\n', "\\", "日本", "//", "#", "\x7f", "\x85", "\u2028"]
    for choice in choices:
        assert tokenizer_named("bytes").eos_token_ids[0] in allowed_ids(follow(start(choice=choices), choice.encode()))


def test_choice_may_have_thousands_of_entries() -> None:
    choices = [f"option {number}" for number in range(5000)]
    state = follow(start(choice=choices), choices[-1].encode())
    assert tokenizer_named("bytes").eos_token_ids[0] in allowed_ids(state)


def test_allowed_is_every_tokenization_of_an_allowed_text() -> None:
    table = token_bytes(tokenizer_named("gqa"))
    state = compiler_of("gqa").compile(StructuredOutput(choice=[" the river"])).start()
    beginnings = [i for i, text in enumerate(table) if text and b" the river".startswith(text)]
    assert allowed_ids(state) == beginnings and len(beginnings) > 1


@pytest.mark.parametrize("padding", [0, 1, 30, 31, 32, 100])
def test_allowed_has_the_width_of_the_model_and_no_padded_id(padding: int) -> None:
    state = start(padding=padding, regex="(?s).*")
    assert state.allowed().dtype == np.uint32 and state.allowed().shape == (packed_len(258 + padding),)
    assert max(allowed_ids(state)) == 257


def test_tokenizer_larger_than_the_model_is_cut() -> None:
    compiler = GrammarCompiler(ByteTokenizer(), vocab_size=100, eos_token_ids=(257,))
    assert allowed_ids(compiler.compile(StructuredOutput(regex="[a-z]+")).start()) == [97, 98, 99]


def test_end_tokens_all_come_where_the_text_may_end_and_nowhere_else() -> None:
    state = start(ends=(257, 7, 0), regex="ab*")
    assert allowed_ids(state) == [ord("a")]
    state.advance(ord("a"))
    assert allowed_ids(state) == [0, 7, ord("b"), 257] and not state.is_complete
    state.advance(7)
    assert state.is_complete and allowed_ids(state) == [0, 7, 257]


def test_end_tokens_stand_for_no_text() -> None:
    assert allowed_ids(start(ends=(ord("a"),), regex="[ab]+")) == [ord("b")]


def test_end_tokens_none_text_ends_by_itself() -> None:
    state = follow(start(ends=(), regex="ab?"), b"a")
    assert not state.is_complete and allowed_ids(state) == [ord("b")]
    assert follow(state, b"b").is_complete and allowed_ids(state) == []


def test_end_token_before_the_end_completes() -> None:
    state = start(regex="ab")
    state.advance(257)
    assert state.is_complete


def test_states_are_independent_and_the_grammar_is_kept() -> None:
    compiler, spec = compiler_of("bytes"), StructuredOutput(regex="ab")
    constraint = compiler.compile(spec)
    assert compiler.compile(StructuredOutput(regex="ab")) is constraint
    first, second = constraint.start(), constraint.start()
    follow(first, b"ab")
    assert first.is_complete and allowed_ids(second) == [ord("a")]


def test_states_of_a_grammar_share_the_first_mask_that_was_computed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, compute = [], structured._GrammarState._compute_text_mask
    monkeypatch.setattr(
        structured._GrammarState, "_compute_text_mask", lambda state: computed.append(state) or compute(state)
    )
    constraint = compiler_of("bytes").compile(StructuredOutput(regex="a[bc]d"))
    assert len(computed) == 1
    with ThreadPoolExecutor(4) as pool:  # prompts are prepared on their callers' threads
        states = list(pool.map(lambda _: constraint.start(), range(8)))
        assert list(pool.map(allowed_ids, states)) == [[ord("a")]] * 8
    assert len(computed) == 1
    for state, letter in zip(states, b"bc" * 4, strict=True):
        follow(state, b"a" + bytes([letter]))
        assert allowed_ids(state) == [ord("d")]


@pytest.mark.parametrize("token_id", [ord("b"), 256, 260])
def test_advance_token_not_allowed_raises(token_id: int) -> None:
    state = start(regex="ab")
    with pytest.raises(RuntimeError, match=f"structured: token {token_id} is not allowed here"):
        state.advance(token_id)


WRONG = [
    ({"regex": "("}, "structured.regex must be a grammar that llguidance can follow, got: .*unclosed group"),
    ({"regex": "a(?=b)"}, "structured.regex .*look-around"),
    ({"json": {"type": "objec"}}, "structured.json .*Invalid type: objec"),
    ({"json": {"not": {}}}, 'structured.json .*Unimplemented keys: \\["not"\\]'),
    ({"json": {"$ref": "http://x"}}, "structured.json .*not present"),
    ({"lark": 'start: a "b"'}, 'structured.lark .*at 1\\(8\\): unknown name: "a"'),
    ({"lark": "start: <|endoftext|>"}, "structured.lark .*special token"),
    ({"lark": 'start: start "a"'}, "structured.lark must match some text that this vocabulary can write"),
    ({"lark": 'start: <[256]> "a"'}, "structured.lark must match some text .*no token of the vocabulary"),
    ({"regex": "a" * MAX_GRAMMAR_BYTES}, f"structured.regex must be at most {MAX_GRAMMAR_BYTES} bytes of grammar, got"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG)
def test_compile_wrong_grammar_names_the_field_and_the_reason(spec, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        start(**spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


CHAIN = 'start: a0\na8000: "x"\n' + "\n".join(f'a{i}: "x" a{i + 1}' for i in range(8000))
COSTLY = [
    {"json": {"type": "integer", "multipleOf": 999983}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(8000)}}},
    {"lark": CHAIN},
]


@pytest.mark.parametrize("spec", COSTLY)
def test_compile_costly_grammar_raises_soon(spec) -> None:
    before = time.process_time()
    with pytest.raises(ValueError, match=r"structured.* must be a grammar that compiles within a second"):
        start(**spec)
    assert time.process_time() - before < 1  # the trial's own time does not count here


def test_compile_costly_regex_is_followed_or_refused_soon() -> None:
    before = time.process_time()
    state = start(regex="((a{1,100}){1,100}){1,100}")
    with pytest.raises(RuntimeError, match=r"structured: .*too many expressions"):
        follow(state, b"a" * 1000)
    assert time.process_time() - before < 5


def test_compile_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(ByteTokenizer(), vocab_size=258, eos_token_ids=())
    with pytest.raises(ImportError, match=re.escape("pip install 'jaxinfer[structured]'")):
        compiler.compile(StructuredOutput(regex="a"))


def test_compile_trial_that_cannot_run_is_no_fault_of_the_grammar(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("jaxinfer.constraints.structured.TRIAL", tmp_path / "none.py")
    with pytest.raises(RuntimeError, match=r"none.py, run by .* to try structured.regex, failed: .*No such file"):
        start(regex="never compiled before")


def test_compile_trial_has_no_secrets_and_every_limit(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("jaxinfer.constraints.structured.TRIAL", tmp_path / "trial.py")
    (tmp_path / "trial.py").write_text(
        "import os, resource\n"
        "def main(arguments):\n"
        "    names = ('CPU', 'AS', 'STACK', 'NOFILE', 'FSIZE', 'CORE')\n"
        "    limits = [resource.getrlimit(getattr(resource, f'RLIMIT_{name}'))[1] for name in names]\n"
        "    raise SystemExit(f'{os.environ.get(\"HF_TOKEN\")} {limits}')\n"
    )
    with pytest.raises(RuntimeError, match=rf"failed: None \[1, {2**30}, {2 << 20}, 16, 0, 0\]"):
        start(regex="never compiled before, either")


def test_import_llguidance_loads_no_torch() -> None:
    program = "import sys, llguidance; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"False\n"
