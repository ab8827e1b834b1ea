"""Writes the model of an LLM as a checkpoint in Hugging Face's format.

Owns: which files such a checkpoint has.
Does not know: how parameters are taken apart into tensors (checkpoint/exporter.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from safetensors.flax import save_file

from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.checkpoint.directory import SINGLE_FILE
from jaxinfer.checkpoint.exporter import export_parameters
from jaxinfer.models.registry import find_family
from jaxinfer.wrappers.assembly import abstract_model

_LEFT_OUT = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt", ".md")
"""Ends of file names that are not copied: other weights, and the card of the model before it was changed."""
_MOST_BYTES = 64 * 2**20
"""Larger files than that are no part of a tokenizer."""


def export_checkpoint(
    directory: str | Path, loaded: LoadedEngine, config_fields: Mapping[str, Any], *, source: Path | None
) -> None:
    """Writes config.json, the weights in one file, and what else is in the directory that the model came from.

    Args:
      directory: a new directory.
      loaded: the engine with the weights.
      config_fields: of the model's config.json.
      source: the checkpoint's directory, whose small files (tokenizer, generation config, templates) are copied; None
        if the weights came from memory.

    Raises:
      FileExistsError: the directory exists.
      ValueError: several processes hold the model.
    """
    target = Path(directory)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another directory for the checkpoint or remove it")
    decoder, config = loaded.decoder, loaded.model_config
    params = decoder.held_params
    variables = nnx.to_flat_state(nnx.state(abstract_model(config, decoder.layout)))
    state = nnx.from_flat_state({path: var.replace(params[".".join(map(str, path))]) for path, var in variables})
    tensors = export_parameters(
        state,
        family=find_family(config.architecture),
        num_layers=config.num_layers,
        num_shards=decoder.layout.num_shards,
    )
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()) if source is not None else ():
        is_small = file.is_file() and file.stat().st_size <= _MOST_BYTES
        if is_small and file.name != "config.json" and not file.name.endswith(_LEFT_OUT):
            shutil.copyfile(file, target / file.name)
    fields = {name: value for name, value in config_fields.items() if name not in ("torch_dtype", "dtype")}
    fields["dtype"] = decoder.layout.dtype.name
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    arrays: dict[str, Any] = dict(tensors)  # numpy arrays do as well as JAX's
    save_file(arrays, target / SINGLE_FILE, metadata={"format": "pt"})
    (target / SINGLE_FILE).chmod(0o644)  # safetensors writes files that only their owner can read
