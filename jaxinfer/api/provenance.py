"""Collects the provenance of an LLM's outputs (model, settings, versions, device), once for each LLM.

Owns: which packages' versions are recorded, and how model and tokenizer are named in a record.
Does not know: what the provenance is used for.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import jax

from jaxinfer.checkpoint.directory import fingerprint
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.records.provenance import Provenance

PACKAGES = ("jaxinfer", "jax", "jaxlib", "flax", "numpy")


def find_provenance(
    config: EngineConfig, *, model: str | Path | None, tokenizer: object, directory: Path | None
) -> Provenance:
    """Collects the provenance of an LLM. It asks JAX for its devices, which starts JAX's backend.

    Args:
      config: the engine's settings.
      model, tokenizer: as given to LLM; model is None for weights in memory.
      directory: the checkpoint's folder, whose files are fingerprinted; None for weights in memory.
    """
    device = jax.devices()[0]
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    is_named = tokenizer is None or isinstance(tokenizer, (str, Path))
    return Provenance(
        model=None if model is None else str(model),
        fingerprint=None if directory is None else fingerprint(directory),
        tokenizer=None if tokenizer is None else str(tokenizer) if is_named else f"<{type(tokenizer).__name__}>",
        engine=config,
        versions={"python": platform.python_version(), **packages},
        platform=device.platform,
        device_kind=device.device_kind,
        mesh=(config.pipeline_parallel_size, config.tensor_parallel_size),
    )
