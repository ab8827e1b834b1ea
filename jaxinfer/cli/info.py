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

from jaxinfer.api.loaded_engine import find_draft
from jaxinfer.checkpoint import directory
from jaxinfer.communication.mesh import abstract_mesh
from jaxinfer.communication.volume import CollectiveVolume
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import known_architectures, parse_model_config
from jaxinfer.wrappers.assembly import abstract_model, context_length, lay_out
from jaxinfer.wrappers.jax_start import start_jax
from jaxinfer.wrappers.memory import free_bytes
from jaxinfer.wrappers.step_batch import SamplerVariant, StepShapes
from jaxinfer.wrappers.step_programs import StepPrograms

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
    """A model as one engine's settings would serve it.

    Args:
      architecture, dtype: by name.
      num_parameters: tied ones counted once.
      num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size: of the model.
      max_model_len: tokens of prompt and output together.
      weight_bytes: of all parameters.
      kv_bytes_per_token: over all layers, with a mesh's copies of kv heads and padding layers.
      kv_tokens: positions for which keys and values fit beside the weights; negative when the weights do not fit.
      full_requests: requests of max_model_len tokens that fit at once.
      mesh: facts of the mesh it is spread over; None for one device.
      draft: the model that drafts for it, whose weights and pages kv_tokens leaves room for; None without.
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
    mesh: MeshFacts | None
    draft: DraftFacts | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftFacts:
    """A draft model beside the model.

    Args:
      architecture: by name.
      num_parameters: tied ones counted once.
      held_bytes: of its weights over all devices, a mesh's copies and padding included.
      kv_bytes_per_token: as ModelFacts'; it has as many pages as the model.
    """

    architecture: str
    num_parameters: int
    held_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshFacts:
    """A model on a mesh.

    Args:
      num_stages, num_shards: pipeline stages and tensor shards of each.
      weight_bytes: of the parameters that one device holds, copies and padding included.
      kv_bytes_per_token: that one device holds.
      rows: sequences of a full decode step.
      volumes: what such a step sends between devices, sampling with filters included.
    """

    num_stages: int
    num_shards: int
    weight_bytes: int
    kv_bytes_per_token: float
    rows: int
    volumes: tuple[CollectiveVolume, ...]


def system_facts(config: EngineConfig) -> SystemFacts:
    """Facts of this machine; starts JAX as an LLM with these settings would."""
    start_jax(gpu_memory_utilization=config.gpu_memory_utilization)
    devices = jax.devices()
    return SystemFacts(
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        devices=tuple(device.device_kind for device in devices),
        platform=devices[0].platform,
        free_bytes=free_bytes(devices[0], gpu_memory_utilization=config.gpu_memory_utilization),
        architectures=tuple(known_architectures()),
    )


def context(model: str | Path, config: EngineConfig) -> int:
    """Tokens of prompt and output together that a checkpoint takes with these settings; errors as model_facts'."""
    fields = directory.read_json(directory.resolve(model) / "config.json")
    return context_length(config, parse_model_config(fields))


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
    layout = lay_out(model_config, config, system.platform)
    mesh = _mesh_facts(model_config, layout, config)
    held, page_bytes = _memory(model_config, layout, config, mesh)
    draft = _draft_facts(model_config, layout, config, system)
    num_devices = layout.num_stages * layout.num_shards
    # CPU devices share one memory.
    free = system.free_bytes * (1 if system.platform == "cpu" else num_devices)
    all_held, all_page_bytes = held, page_bytes
    if draft is not None:
        all_held, all_page_bytes = held + draft.held_bytes, page_bytes + draft.kv_bytes_per_token * config.page_size
    kv_tokens = (free - all_held) // all_page_bytes * config.page_size
    return ModelFacts(
        architecture=model_config.architecture,
        dtype=layout.dtype.name,
        num_parameters=model_config.num_parameters,
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        vocab_size=model_config.vocab_size,
        max_model_len=layout.max_model_len,
        weight_bytes=model_config.num_parameters * layout.dtype.itemsize,
        kv_bytes_per_token=page_bytes // config.page_size,
        kv_tokens=kv_tokens,
        full_requests=max(kv_tokens, 0) // layout.max_model_len,
        mesh=mesh,
        draft=draft,
    )


def _memory(model_config: ModelConfig, layout: Layout, config: EngineConfig, mesh: MeshFacts | None) -> tuple[int, int]:
    """Bytes of a model's weights and of one of its KV pages, over all devices."""
    page = layout.cache_shape(model_config, num_pages=1, page_size=config.page_size)
    num_devices = layout.num_stages * layout.num_shards
    weights = model_config.num_parameters * layout.dtype.itemsize if mesh is None else mesh.weight_bytes * num_devices
    return weights, page.page_bytes(layout.dtype.itemsize)


def _draft_facts(
    model_config: ModelConfig, layout: Layout, config: EngineConfig, system: SystemFacts
) -> DraftFacts | None:
    draft = find_draft(config, model_config, max_model_len=layout.max_model_len)
    if draft is None:
        return None
    layout = lay_out(draft.model_config, draft.config, system.platform)
    held, page_bytes = _memory(
        draft.model_config, layout, draft.config, _mesh_facts(draft.model_config, layout, draft.config)
    )
    return DraftFacts(
        architecture=draft.model_config.architecture,
        num_parameters=draft.model_config.num_parameters,
        held_bytes=held,
        kv_bytes_per_token=page_bytes // config.page_size,
    )


def _mesh_facts(model_config: ModelConfig, layout: Layout, config: EngineConfig) -> MeshFacts | None:
    """Facts of the mesh, from a trace of the step; it takes no devices."""
    if layout.num_stages == layout.num_shards == 1:
        return None
    shapes = StepShapes(config, max_model_len=layout.max_model_len)
    cache_shape = layout.cache_shape(model_config, num_pages=2, page_size=config.page_size)
    programs = StepPrograms(
        abstract_model(model_config, layout),
        shapes=shapes,
        cache_shape=cache_shape,
        dtype=layout.dtype,
        mesh=abstract_mesh(layout.num_stages, layout.num_shards),
    )
    full = shapes.shape(num_decode=shapes.max_decode, num_prefill=0, num_logits=0)
    page_bytes = cache_shape.page_bytes(layout.dtype.itemsize)
    return MeshFacts(
        num_stages=layout.num_stages,
        num_shards=layout.num_shards,
        weight_bytes=programs.parameter_bytes,
        kv_bytes_per_token=page_bytes / config.page_size / (layout.num_stages * layout.num_shards),
        rows=shapes.max_decode,
        volumes=tuple(programs.volumes(full, SamplerVariant.CANDIDATES)),
    )
