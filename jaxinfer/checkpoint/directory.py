"""A checkpoint directory in Hugging Face format: where it is and what its JSON files say.

Owns: finding the directory of a path or hub id, reading config.json and generation_config.json, the list of weight
files, and a fingerprint of all these files.
Does not know: what the tensors hold, models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.config.validation import require_int
from jaxinfer.sampling_params import SamplingParams

DEMO = "demo"
"""The name of the bundled model."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_FINGERPRINT_BYTES = 2**16
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve(model: str | Path, *, name: str = "model") -> Path:
    """The local directory of a checkpoint; a hub id is downloaded (or found in the cache) first.

    Args:
      model: "demo" for the bundled model, a directory, or "owner/name" on the Hugging Face hub. HF_HUB_OFFLINE and
        HF_HOME are honoured. To use a directory of your own that is named demo, pass "./demo".
      name: of the argument that it comes from, for messages.

    Raises:
      TypeError: model is neither a string nor a path.
      ValueError: it is the empty string.
      FileNotFoundError: there is no such directory or hub id, or the hub cannot be reached; a message of one line.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"{name} must be a checkpoint directory or a hub id, got {model!r} of type {type(model).__name__}"
        )
    if model == "":
        raise ValueError(
            f"{name} must be a checkpoint directory or a hub id, got {model!r}; pass '.' for this directory"
        )
    if model == DEMO:
        return Path(str(files("jaxinfer"))) / "demo" / "model"
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # no home directory is known
        raise FileNotFoundError(f"no such checkpoint directory: {model} ({error})") from error
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{model} is a file; expected a checkpoint directory or a hub id")
    if not _HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(f"no such checkpoint directory: {model} (a hub id looks like owner/name)")
    return _download(str(model))


def _download(hub_id: str) -> Path:
    # Imported here, not at the top: the hub's client brings an HTTP library, which no local directory needs.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise FileNotFoundError(f"no such checkpoint directory or hub id: {hub_id} ({error})") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"no directory {hub_id}; as a hub id it is not in the local cache and the hub cannot be reached; "
            f"check the path, the network or HF_HUB_OFFLINE"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"hub id {hub_id} cannot be downloaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it does not hold a JSON object; the message names the file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint in Hugging Face format") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
      FileNotFoundError: there are none, or one that the index names is missing.
      ValueError: there are pickled weights only, or the index is wrong or names a file outside the directory.
    """
    if (directory / INDEX_FILE).exists():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{directory / INDEX_FILE} has no weight_map")
        names = list(weight_map.values())
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{directory / INDEX_FILE} names {name!r}, expected a .safetensors file beside it")
            if not (directory / name).exists():
                raise FileNotFoundError(f"{directory / name} is missing; {INDEX_FILE} names it")
        return [directory / name for name in sorted(set(names))]
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory} holds only pickled weights ({pickles[0]}), which can run code and are never opened; "
            f"convert them to safetensors"
        )
    raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def fingerprint(directory: Path) -> str:
    """A checkpoint's identity in 32 hexadecimal digits, from a few small reads, however large the checkpoint is.

    It covers config.json, generation_config.json and, for every weight file, the name, the size and the last 64 KiB,
    which training changes. Checkpoints whose weights differ elsewhere only get the same fingerprint.

    Raises:
      FileNotFoundError, ValueError: as weight_files.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        digest.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            file.seek(max(size - _FINGERPRINT_BYTES, 0), os.SEEK_SET)
            digest.update(file.read())
    return digest.hexdigest()[:32]


def generation_defaults(directory: Path, config_fields: Mapping[str, Any]) -> GenerationDefaults:
    """The sampling defaults and end tokens of generation_config.json; greedy unless its do_sample is true.

    Args:
      directory: the checkpoint's; generation_config.json may be missing.
      config_fields: config.json, whose eos_token_id counts where generation_config.json has none.

    Raises:
      ValueError: a field is of the wrong kind or outside its range; the message names the file and the field.
    """
    path = directory / "generation_config.json"
    fields = read_json(path) if path.exists() else {}
    sampled = False if fields.get("do_sample") is None else fields["do_sample"]
    if not isinstance(sampled, bool):
        raise ValueError(f"{path}: do_sample must be true or false, got {sampled!r}")
    try:
        params = SamplingParams(**_sampling_fields(fields) if sampled else {"temperature": 0.0})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if fields.get("eos_token_id") is None:
        ids = end_token_ids(f"{directory / 'config.json'}: eos_token_id", config_fields.get("eos_token_id"))
    else:
        ids = end_token_ids(f"{path}: eos_token_id", fields["eos_token_id"])
    return GenerationDefaults(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, eos_token_ids=ids)


def _sampling_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: fields[name] for name in ("temperature", "top_k", "top_p") if fields.get(name) is not None}
    top_k = given.get("top_k")
    if isinstance(top_k, float) and top_k.is_integer():  # some files have 50.0
        given["top_k"] = int(top_k)
    return given


def end_token_ids(name: str, value: object) -> tuple[int, ...]:
    """The token ids of a field eos_token_id, which holds one, a list of them, or None for none.

    Args:
      name: where the field stands and what it is called, for messages.
      value: the field's.

    Raises:
      ValueError: it is something else.
    """
    ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    try:
        return tuple(require_int(name, entry, 0) for entry in ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an integer >= 0 or a list of such, got {value!r}") from error
