"""Tokenizers against transformers (tests/golden/*/texts.json), and text that arrives token by token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.detokenizer import MAX_HELD, MAX_WINDOW, IncrementalDetokenizer
from jaxinfer.tokenizer.file_tokenizer import FileTokenizer
from jaxinfer.tokenizer.load import load_tokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer

DIRECTORIES = {"byte_level": GOLDEN / "gqa", "metaspace": GOLDEN / "tokenizers" / "metaspace"}
ALL = [*DIRECTORIES, "bytes"]


@cache
def tokenizer_named(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "bytes" else FileTokenizer(DIRECTORIES[name])


def golden_texts(name: str) -> dict[str, Any]:
    return json.loads((DIRECTORIES[name] / "texts.json").read_text(encoding="utf-8"))


def copy_checkpoint(source: str, target: Path, **config: object) -> Path:
    """A checkpoint's tokenizer files with some fields of tokenizer_config.json changed."""
    shutil.copy(DIRECTORIES[source] / "tokenizer.json", target)
    fields = json.loads((DIRECTORIES[source] / "tokenizer_config.json").read_text()) | config
    (target / "tokenizer_config.json").write_text(json.dumps(fields))
    return target


@pytest.mark.parametrize("name", DIRECTORIES)
def test_encode_golden_texts_equals_transformers(name: str) -> None:
    tokenizer = tokenizer_named(name)
    for entry in golden_texts(name)["encode"]:
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.encode_plain(entry["text"]) == entry["plain_ids"]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_decode_golden_ids_equals_transformers(name: str) -> None:
    tokenizer = tokenizer_named(name)
    for entry in golden_texts(name)["decode"]:
        assert tokenizer.decode(entry["ids"]) == entry["text"]
        assert tokenizer.decode(entry["ids"], skip_special_tokens=False) == entry["text_with_special"]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_properties_golden_equal_transformers(name: str) -> None:
    tokenizer, record = tokenizer_named(name), golden_texts(name)["transformers"]
    assert tokenizer.vocab_size == record["vocab_size"]
    assert tokenizer.eos_token_ids == (record["eos_token_id"],)
    assert sorted(tokenizer.special_token_ids) == record["all_special_ids"]


@pytest.mark.parametrize("flag", [True, False])
def test_encode_add_bos_token_in_config_leaves_tokenizer_json_in_charge(tmp_path: Path, flag: bool) -> None:
    tokenizer = FileTokenizer(copy_checkpoint("byte_level", tmp_path, add_bos_token=flag))
    assert tokenizer.encode("the") == tokenizer_named("byte_level").encode("the")
    assert tokenizer.encode("the").count(0) == 1


def test_config_token_as_object_is_read(tmp_path: Path) -> None:
    directory = copy_checkpoint("byte_level", tmp_path, bos_token={"content": "<s>"}, eos_token={"content": "</s>"})
    assert FileTokenizer(directory).eos_token_ids == (1,)


def test_config_absent_or_token_unknown_means_no_such_token(tmp_path: Path) -> None:
    directory = copy_checkpoint("byte_level", tmp_path, bos_token="<nowhere>", eos_token=None)
    assert FileTokenizer(directory).eos_token_ids == ()
    (directory / "tokenizer_config.json").unlink()
    assert FileTokenizer(directory).eos_token_ids == ()


@pytest.mark.parametrize("extra", [["he"], {"thing": {"content": "he"}}])
def test_config_names_an_ordinary_token_special_decode_leaves_it_out(tmp_path: Path, extra: object) -> None:
    tokenizer = FileTokenizer(copy_checkpoint("metaspace", tmp_path, extra_special_tokens=extra, pad_token="re"))
    he, re = (tokenizer_named("metaspace").encode_plain(text)[-1] for text in ("ahe", "are"))
    assert {he, re} < tokenizer.special_token_ids
    assert tokenizer.decode([he, re]) == ""
    assert tokenizer.token_text(he) == "he"
    assert tokenizer.vocab_size == tokenizer_named("metaspace").vocab_size


def test_truncation_and_padding_in_file_are_turned_off(tmp_path: Path) -> None:
    file = copy_checkpoint("byte_level", tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    assert FileTokenizer(tmp_path).encode("xyzxyz") == tokenizer_named("byte_level").encode("xyzxyz")
    assert FileTokenizer(tmp_path).encode("x") == tokenizer_named("byte_level").encode("x")


def test_token_text_special_and_unknown_ids() -> None:
    tokenizer = tokenizer_named("byte_level")
    assert [tokenizer.token_text(i) for i in (0, 1, 319, 9999)] == ["<s>", "</s>", tokenizer.decode([319]), ""]
    assert [tokenizer_named("bytes").token_text(i) for i in (65, 200, 256, 257, 300)] == [
        "A",
        "\ufffd",
        "<s>",
        "</s>",
        "",
    ]


@given(st.text(max_size=20))
def test_byte_tokenizer_any_text_survives_the_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert ByteTokenizer(add_bos=True).encode(text) == [256, *tokenizer.encode_plain(text)]


def test_load_tokenizer_by_what_the_directory_holds(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.model: expected a sentencepiece model"):
        load_tokenizer(tmp_path)
    copy_checkpoint("byte_level", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), FileTokenizer)


def test_missing_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        FileTokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_broken_file_names_the_file(tmp_path: Path, file: str, content: bytes) -> None:
    (copy_checkpoint("byte_level", tmp_path) / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        FileTokenizer(tmp_path)


def test_special_token_of_wrong_type_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*got 7"):
        FileTokenizer(copy_checkpoint("byte_level", tmp_path, bos_token=7))


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool, size: int = 1) -> list[str]:
    """What push and finish return when the output comes in groups of `size` tokens; checks `text` on the way."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    deltas = [detokenizer.push(output[i : i + size]) for i in range(0, len(output), size)]
    assert detokenizer.text == "".join(deltas)
    deltas.append(detokenizer.finish())
    assert detokenizer.text == "".join(deltas)
    assert detokenizer.finish() == ""
    return deltas


def whole(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool) -> str:
    """The definition: decode(prompt + output) with decode(prompt) taken off the front."""
    prompt_text = tokenizer.decode(prompt, skip_special_tokens=skip)
    return tokenizer.decode(prompt + output, skip_special_tokens=skip)[len(prompt_text) :]


def is_rewritten(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool) -> bool:
    """Whether a later token changes whole characters that an earlier prefix had (ByteFallback's malformed runs)."""
    text = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    ends = range(len(prompt), len(prompt) + len(output))
    prefixes = (tokenizer.decode((prompt + output)[:end], skip_special_tokens=skip) for end in ends)
    return not all(text.startswith(prefix.rstrip("\ufffd")) for prefix in prefixes)


def token_lists(vocab_size: int, max_size: int) -> st.SearchStrategy[list[int]]:
    """Random ids, among them ids beyond the vocabulary, and runs of one id."""
    ids = st.integers(0, vocab_size + 2)
    runs = st.tuples(ids, st.integers(1, 30)).map(lambda run: [run[0]] * run[1])
    pieces = st.lists(ids.map(lambda i: [i]) | runs, max_size=max_size)
    return pieces.map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans(), size=st.integers(1, 4))
def test_incremental_random_tokens_equal_whole_decode(name: str, data: st.DataObject, skip: bool, size: int) -> None:
    tokenizer = tokenizer_named(name)
    prompt = data.draw(token_lists(tokenizer.vocab_size, 40))
    output = data.draw(token_lists(tokenizer.vocab_size, 60))
    assume(not tokenizer.decode(prompt, skip_special_tokens=skip).endswith("\ufffd"))
    assume(not is_rewritten(tokenizer, prompt, output, skip=skip))
    assert "".join(stream(tokenizer, prompt, output, skip=skip, size=size)) == whole(
        tokenizer, prompt, output, skip=skip
    )


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=30, deadline=None)
@given(prompt=st.text(max_size=8), output=st.text(max_size=80))
@example(prompt="", output=" leading space")
@example(prompt="a", output=" leading space")
@example(prompt="", output="🙂" * 100)
@example(prompt="\ufffd", output="\ufffd" * 100)
def test_incremental_text_arrives_whole_and_in_time(name: str, prompt: str, output: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode_plain(output)
    deltas = stream(tokenizer, tokenizer.encode(prompt), ids, skip=True)
    assert "".join(deltas) == whole(tokenizer, tokenizer.encode(prompt), ids, skip=True)
    if "\ufffd" not in output:
        assert "\ufffd" not in "".join(deltas)
        assert deltas[-1] == ""


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_incremental_any_prompt_never_takes_text_back(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = tokenizer_named(name)
    prompt, output = (data.draw(token_lists(tokenizer.vocab_size, 20)) for _ in range(2))
    stream(tokenizer, prompt, output, skip=skip)  # checks that the deltas make the text


@pytest.mark.parametrize("name", ALL)
def test_incremental_cut_off_character_appears_at_finish(name: str) -> None:
    tokenizer = tokenizer_named(name)
    cut_off = tokenizer.encode_plain("a日本")[:-1]
    deltas = stream(tokenizer, tokenizer.encode("x"), cut_off, skip=True)
    assert "\ufffd" not in "".join(deltas[:-1])
    assert set(deltas[-1]) == {"\ufffd"}
    if name != "metaspace":  # ByteFallback writes one for each byte
        assert deltas[-1] == "\ufffd"


@pytest.mark.parametrize("name", ALL)
def test_incremental_prompt_ends_in_half_a_character_output_begins_behind_it(name: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode_plain("x日y")
    assert "".join(stream(tokenizer, ids[:-3], ids[-3:], skip=True)) == "y"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("letter", ["日", "🦄"])
def test_incremental_prompt_is_one_long_run_of_bytes_nothing_is_lost(name: str, letter: str) -> None:
    """A window that began inside a character would make ByteFallback call the whole run malformed."""
    tokenizer = tokenizer_named(name)
    for num_letters in range(20, 60):
        prompt, output = tokenizer.encode(letter * num_letters), tokenizer.encode_plain("x" + letter)[-5:]
        assert "".join(stream(tokenizer, prompt, output, skip=True)) == whole(tokenizer, prompt, output, skip=True)


def test_incremental_malformed_byte_run_keeps_what_was_given_out() -> None:
    tokenizer = tokenizer_named("metaspace")
    prompt, day = tokenizer.encode("x"), tokenizer.encode_plain("日")[1:]
    lone, letter = 3 + 0xFF, tokenizer.encode_plain("xy")[-1]
    assert tokenizer.decode([*prompt, *day, lone, letter]) == "x" + 4 * "\ufffd" + "y"
    assert stream(tokenizer, prompt, [*day, lone, letter], skip=True) == ["", "", "日", "", "\ufffdy", ""]
    assert stream(tokenizer, prompt, [*day, *day], skip=True) == ["", "", "日", "", "", "日", ""]
    assert stream(tokenizer, prompt, [*day, lone], skip=True) == ["", "", "日", "", "\ufffd"]


def test_incremental_replacement_characters_are_not_held_for_ever() -> None:
    deltas = stream(ByteTokenizer(), [], [0xFF] * 500, skip=True)
    assert all(delta == "\ufffd" for delta in deltas[3:-1])
    assert deltas[-1] == 3 * "\ufffd"


class Overlapping(ByteTokenizer):
    """Every token is the end of one character and the beginning of the next."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return (b"\xbd\xa0\xe4" * len(token_ids)).decode(errors="replace")


def test_incremental_tokens_that_all_end_inside_a_character_still_give_text() -> None:
    deltas = stream(Overlapping(), [0], [0] * 300, skip=True)
    assert deltas[1:] == [*["你"] * 299, "\ufffd"]


@pytest.mark.parametrize("name", ALL)
def test_incremental_cost_does_not_grow_with_the_text(name: str) -> None:
    """Without a table of fixed texts, the longest window that is ever decoded stays at MAX_WINDOW."""
    tokenizer, lens = tokenizer_named(name), []

    class Counting(ByteTokenizer):
        special_token_ids = tokenizer.special_token_ids

        def __init__(self) -> None:
            self.fixed_texts = None

        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            lens.append(len(token_ids))
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    text = "The fisher's 日本語 🙂🙂 naïve   house ⵣⴰⵎ\n" * 20
    ids = tokenizer.encode_plain(text) + [3 + 0xF0] * 200
    detokenizer = IncrementalDetokenizer(Counting(), ids, skip_special_tokens=True)
    for token_id in ids:
        detokenizer.push([token_id])
    assert max(lens) <= MAX_WINDOW + MAX_HELD
    assert sum(lens) < 400 * len(ids)
