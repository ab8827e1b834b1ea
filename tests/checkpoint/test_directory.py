"""Checkpoint directories: found or refused in one line, their JSON read, nothing in them executed."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from jaxinfer.checkpoint.directory import generation_defaults, read_json, resolve, weight_files
from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.models.registry import parse_model_config

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch) -> Path:
    """An empty hub cache and no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_resolve_directory_returns_it(tmp_path: Path, monkeypatch) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path


def test_resolve_cached_hub_id_returns_snapshot(offline_hub: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_hub / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(GOLDEN / "gqa", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve("owner/tiny").samefile(snapshot)
    assert weight_files(resolve("owner/tiny"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/place", "no such checkpoint directory: /no/such/place"),
        ("tiny", "no such checkpoint directory: tiny .a hub id looks like owner/name"),
        ("./tiny", "no such checkpoint directory or hub id: ./tiny"),
        ("~nobodyhere/x", "no such checkpoint directory: ~nobodyhere/x .*home directory"),
        ("owner/absent", "no directory owner/absent; .* not in the local cache .* HF_HUB_OFFLINE"),
        (GOLDEN / "make.py", "make.py is a file; expected a checkpoint directory or a hub id"),
    ],
)
def test_resolve_unknown_raises_one_line(model, message: str, offline_hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        resolve(model)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "error", "got"),
    [(None, TypeError, "None of type NoneType"), (5, TypeError, "5 of type int"), ("", ValueError, "''; pass '.' for")],
)
def test_resolve_what_names_no_directory_raises(model, error: type[Exception], got: str) -> None:
    for name in ("model", "tokenizer"):
        with pytest.raises(error, match=f"{name} must be a checkpoint directory or a hub id, got {got}"):
            resolve(model, name=name)


def test_weight_files_single_and_index_in_order() -> None:
    assert weight_files(GOLDEN / "gqa") == [GOLDEN / "gqa" / "model.safetensors"]
    files = weight_files(GOLDEN / "sharded")
    assert files == sorted((GOLDEN / "sharded").glob("*.safetensors")) and len(files) > 1


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({"a": "absent.safetensors"}, FileNotFoundError, f"absent.safetensors is missing; {INDEX} names it"),
        ({"a": "../model.safetensors"}, ValueError, f"{INDEX} names '../model.safetensors'"),
        ({"a": "/etc/model.safetensors"}, ValueError, f"{INDEX} names '/etc/model.safetensors'"),
        ({"a": "b/model.safetensors"}, ValueError, f"{INDEX} names 'b/model.safetensors'"),
        ({"a": "model.bin"}, ValueError, f"{INDEX} names 'model.bin'"),
        ({"a": 3, "b": "x.safetensors"}, ValueError, f"{INDEX} names 3"),
        ({"a": ["x.safetensors"]}, ValueError, f"{INDEX} names"),
        ({}, ValueError, f"{INDEX} has no weight_map"),
        ([], ValueError, f"{INDEX} has no weight_map"),
        (None, ValueError, f"{INDEX} has no weight_map"),
    ],
)
def test_weight_files_wrong_index_raises(index, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.bin").touch()
    with pytest.raises(error, match=message):
        weight_files(tmp_path)


class Touch:
    """Unpickles by touching a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "model.pkl"])
def test_weight_files_pickles_only_refused_unopened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    with pytest.raises(ValueError, match=f"{tmp_path} holds only pickled weights .{name}.*convert them to safetensors"):
        weight_files(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_weight_files_empty_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has neither model.safetensors nor {INDEX}"):
        weight_files(tmp_path)


def test_parse_model_config_remote_code_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    fields = read_json(GOLDEN / "gqa" / "config.json") | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="remote code"):
        parse_model_config(read_json(tmp_path / "config.json"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        pytest.param(b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON: Exceeds the limit", id="digits"),
        pytest.param(b'{"a": ' + b"[" * 200_000, "is nested too deeply to be read", id="depth"),
        (b"[1, 2]", "must hold a JSON object, got list"),
    ],
)
def test_read_json_broken_names_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} {message}"):
        read_json(path)


def test_read_json_absent_names_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'config.json'} does not exist"):
        read_json(tmp_path / "config.json")


NUMBERS = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, {}),
        (None, {"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_ids": (2,)}),
        (NUMBERS, {}, {}),
        (NUMBERS | {"do_sample": False}, {}, {}),
        (NUMBERS | {"do_sample": None}, {}, {}),
        (NUMBERS | {"do_sample": True}, {}, NUMBERS),
        ({"do_sample": True}, {}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0, "top_k": 50.0, "top_p": 1}, {}, {"top_k": 50}),
        ({"temperature": -1, "top_p": 0}, {}, {}),
        ({"do_sample": True, "top_k": None, "top_p": 0.5}, {}, {"temperature": 1.0, "top_p": 0.5}),
        ({"eos_token_id": 3}, {"eos_token_id": 2}, {"eos_token_ids": (3,)}),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, {"eos_token_ids": (0,)}),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 2}, {"eos_token_ids": (3, 4)}),
        ({"eos_token_id": None}, {"eos_token_id": [2, 5]}, {"eos_token_ids": (2, 5)}),
    ],
)
def test_generation_defaults_fields_become_defaults(generation, config, expected, tmp_path: Path) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert generation_defaults(tmp_path, config) == GenerationDefaults(**expected)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": "false"}, "do_sample must be true or false, got 'false'"),
        ({"do_sample": 0}, "do_sample must be true or false, got 0"),
        ({"do_sample": True, "temperature": "0.5"}, "temperature must be a number >= 0, got '0.5'"),
        ({"do_sample": True, "temperature": -1}, "temperature must be >= 0, got -1"),
        ({"do_sample": True, "temperature": math.nan}, "temperature must be >= 0, got nan"),
        ({"do_sample": True, "top_k": True}, "top_k must be an int"),
        ({"do_sample": True, "top_k": -5}, "top_k must be >= -1, got -5"),
        ({"do_sample": True, "top_k": 2.5}, "top_k must be an int >= -1, got 2.5"),
        ({"do_sample": True, "top_k": math.inf}, "top_k must be an int >= -1, got inf"),
        ({"do_sample": True, "top_k": math.nan}, "top_k must be an int >= -1, got nan"),
        ({"do_sample": True, "top_p": [1]}, r"top_p must be a number in \(0, 1], got \[1\]"),
        ({"do_sample": True, "top_p": 0}, r"top_p must be in \(0, 1], got 0"),
        ({"eos_token_id": "2"}, "eos_token_id must be an integer >= 0"),
        ({"eos_token_id": [2, None]}, "eos_token_id must be"),
        ({"eos_token_id": True}, "eos_token_id must be"),
        ({"eos_token_id": -1}, "eos_token_id must be"),
    ],
)
def test_generation_defaults_wrong_value_names_file_and_field(generation, message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(ValueError, match=f"{tmp_path}/generation_config.json: {message}"):
        generation_defaults(tmp_path, {})


def test_generation_defaults_wrong_end_token_of_config_json_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: eos_token_id must be .* got 'x'"):
        generation_defaults(tmp_path, {"eos_token_id": "x"})
