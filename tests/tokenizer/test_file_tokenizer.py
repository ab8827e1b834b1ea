"""Tokenizers of files and of bytes against transformers (tests/golden/*/texts.json), and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_tools import DIRECTORIES, tokenizer_named

from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.file_tokenizer import FileTokenizer
from jaxinfer.tokenizer.load import load_tokenizer


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
