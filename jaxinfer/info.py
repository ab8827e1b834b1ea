"""What `jaxinfer info` tells: versions, devices, a model's size, and how much of it fits.

Owns: the facts and their arithmetic, from config.json alone; no weights are read.
Does not know: how they are shown.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxinfer.checkpoint import directory
from jaxinfer.config import EngineConfig
from jaxinfer.layers.kv_cache import CacheShape
from jaxinfer.models.registry import known_architectures, parse_model_config
from jaxinfer.wrappers.assembly import choose_dtype, context_length
from jaxinfer.wrappers.memory import free_bytes

PACKAGES = ("jaxinfer", "jax", "jaxlib", "flax", "numpy", "tokenizers", "sentencepiece", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemFacts:
    """This machine.

    Args:
      python: its version.
      versions: package -> version.
      devices: kinds of the devices that JAX uses, in order.
      platform: "cpu", "gpu" or "tpu".
      free_bytes: for weights, KV pages and activations on the first device.
      architectures: that a config.json may name.
    """

    python: str
    versions: dict[str, str]
    devices: tuple[str, ...]
    platform: str
    free_bytes: int
    architectures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """A model as one engine's settings would serve it on one device.

    Args:
      architecture, dtype: by name.
      num_parameters: tied ones counted once.
      num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size: of the model.
      max_model_len: tokens of prompt and output together.
      weight_bytes: of all parameters.
      kv_bytes_per_token: over all layers.
      kv_tokens: positions for which keys and values fit beside the weights; negative when the weights do not fit.
      full_requests: requests of max_model_len tokens that fit at once.
    """

    architecture: str
    dtype: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    full_requests: int


def system_facts(config: EngineConfig) -> SystemFacts:
    """Facts of this machine; starts JAX's backend."""
    devices = jax.devices()
    return SystemFacts(
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        devices=tuple(device.device_kind for device in devices),
        platform=devices[0].platform,
        free_bytes=free_bytes(devices[0], gpu_memory_utilization=config.gpu_memory_utilization),
        architectures=tuple(known_architectures()),
    )


def model_facts(model: str | Path, config: EngineConfig, system: SystemFacts) -> ModelFacts:
    """Facts of a checkpoint.

    Args:
      model: as LLM's.
      config: of the engine that would serve it.
      system: where.

    Raises:
      FileNotFoundError, TypeError, ValueError: as LLM.
    """
    model_config = parse_model_config(directory.read_json(directory.resolve(model) / "config.json"))
    dtype = choose_dtype(config.dtype, system.platform)
    max_model_len = context_length(config, model_config)
    page = CacheShape(
        num_layers=model_config.num_layers,
        num_stages=1,
        num_pages=1,
        num_kv_heads=model_config.num_kv_heads,
        page_size=config.page_size,
        head_dim=model_config.head_dim,
    )
    page_bytes = page.page_bytes(dtype.itemsize)
    weight_bytes = model_config.num_parameters * dtype.itemsize
    kv_tokens = (system.free_bytes - weight_bytes) // page_bytes * config.page_size
    return ModelFacts(
        architecture=model_config.architecture,
        dtype=dtype.name,
        num_parameters=model_config.num_parameters,
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        vocab_size=model_config.vocab_size,
        max_model_len=max_model_len,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=page_bytes // config.page_size,
        kv_tokens=kv_tokens,
        full_requests=max(kv_tokens, 0) // max_model_len,
    )
