"""The facts that `jaxinfer info` shows: versions, devices, a model's size, and how many tokens fit beside its weights.

Owns: the facts and their arithmetic. Those of a model come from its config.json; no weights are read.
Does not know: how the facts are shown.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxinfer.api.loaded_engine import find_draft
from jaxinfer.checkpoint import directory
from jaxinfer.communication.mesh import abstract_mesh
from jaxinfer.communication.volume import CollectiveVolume
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.engine.pages_in_sight import PagesInSight
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import known_architectures, parse_model_config
from jaxinfer.wrappers.assembly import abstract_model, context_length, lay_out, parameter_bytes
from jaxinfer.wrappers.jax_start import start_jax
from jaxinfer.wrappers.memory import free_bytes
from jaxinfer.wrappers.step_batch import SamplerVariant
from jaxinfer.wrappers.step_programs import StepPrograms
from jaxinfer.wrappers.step_shapes import StepShapes

PACKAGES = ("jaxinfer", "jax", "jaxlib", "flax", "numpy", "tokenizers", "sentencepiece", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemFacts:
    """Facts of this machine and of the installed packages.

    Args:
      python: version of Python.
      versions: package -> version.
      devices: the kind of each device that JAX uses, in order.
      platform: "cpu", "gpu" or "tpu".
      free_bytes: memory for weights, KV pages and activations on the first device.
      architectures: names of architectures in a config.json that jaxinfer can load.
    """

    python: str
    versions: dict[str, str]
    devices: tuple[str, ...]
    platform: str
    free_bytes: int
    architectures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Facts of a model, served with given engine settings.

    Args:
      architecture: its name.
      dtypes: of the parameters, for people to read.
      num_parameters: number of parameters; tied ones are counted once.
      num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size: the model's dimensions.
      max_model_len: tokens of prompt and output together that a request may have.
      weight_bytes: size of all parameters, each counted once.
      kv_bytes_per_token: size of a token's keys and values over all layers and devices, including kv heads that a mesh
        holds several times and layers that pad its stages.
      kv_tokens: tokens whose keys and values fit beside the weights, and into num_kv_pages if that is given; negative
        if the weights alone do not fit.
      full_requests: number of requests of max_model_len tokens that fit at the same time.
      mesh: facts of the mesh that the model is spread over; None for one device.
      draft: facts of the draft model, None without one. kv_tokens leaves room for its weights and pages.
    """

    architecture: str
    dtypes: str
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
    """Facts of the draft model that is loaded beside a model.

    Args:
      architecture: its name.
      num_parameters: number of parameters; tied ones are counted once.
      held_bytes: size of its weights over all devices, including a mesh's copies and padding.
      kv_bytes_per_token: as ModelFacts'; the draft model has as many KV pages as the model.
    """

    architecture: str
    num_parameters: int
    held_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshFacts:
    """Facts of a model that is spread over a mesh.

    Args:
      num_stages, num_shards: number of pipeline stages, and of tensor shards in each stage.
      weight_bytes: size of the parameters that one device holds, copies and padding included.
      kv_bytes_per_token: the part of a token's keys and values that one device holds.
      rows: number of sequences in a full decode step.
      volumes: what such a step, including sampling with filters, sends between devices.
    """

    num_stages: int
    num_shards: int
    weight_bytes: int
    kv_bytes_per_token: float
    rows: int
    volumes: tuple[CollectiveVolume, ...]


def system_facts(config: EngineConfig) -> SystemFacts:
    """Collects the facts of this machine. It starts JAX in the way an LLM with these settings would."""
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
    """The max_model_len that a checkpoint has with these settings, in tokens; errors as model_facts'."""
    fields = directory.read_json(directory.resolve(model) / "config.json")
    return context_length(config, parse_model_config(fields))


def model_facts(model: str | Path, config: EngineConfig, system: SystemFacts) -> ModelFacts:
    """Collects the facts of a checkpoint.

    Args:
      model: as LLM's.
      config: settings of the engine that would serve it.
      system: facts of the machine that would serve it.

    Raises:
      FileNotFoundError, TypeError, ValueError: as LLM.
    """
    model_config = parse_model_config(directory.read_json(directory.resolve(model) / "config.json"))
    layout = lay_out(model_config, config, system.platform)
    mesh = _mesh_facts(model_config, layout, config, platform=system.platform)
    held, page_bytes = _memory(model_config, layout, config, mesh)
    draft = _draft_facts(model_config, layout, config, system)
    num_devices = layout.num_stages * layout.num_shards
    # All CPU devices share one memory; other devices have one each.
    free = system.free_bytes * (1 if system.platform == "cpu" else num_devices)
    all_held, all_page_bytes = held, page_bytes
    if draft is not None:
        all_held, all_page_bytes = held + draft.held_bytes, page_bytes + draft.kv_bytes_per_token * config.page_size
    span = model_config.widest_span(config.span)
    in_sight = PagesInSight(span, page_size=config.page_size, max_chunk=config.max_num_batched_tokens)
    fitting = (free - all_held) // all_page_bytes
    kv_tokens = min(fitting, config.num_kv_pages or fitting) * config.page_size
    return ModelFacts(
        architecture=model_config.architecture,
        dtypes=layout.weight_dtypes,
        num_parameters=model_config.num_parameters,
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        vocab_size=model_config.vocab_size,
        max_model_len=layout.max_model_len,
        weight_bytes=parameter_bytes(model_config, dataclasses.replace(layout, num_stages=1, num_shards=1)),
        kv_bytes_per_token=page_bytes // config.page_size,
        kv_tokens=kv_tokens,
        full_requests=max(kv_tokens, 0) // config.page_size // in_sight.most(layout.max_model_len),
        mesh=mesh,
        draft=draft,
    )


def _memory(model_config: ModelConfig, layout: Layout, config: EngineConfig, mesh: MeshFacts | None) -> tuple[int, int]:
    """Bytes of a model's weights and of one of its KV pages, each summed over all devices."""
    page = layout.cache_shape(model_config, num_pages=1, page_size=config.page_size)
    num_devices = layout.num_stages * layout.num_shards
    weights = parameter_bytes(model_config, layout) if mesh is None else mesh.weight_bytes * num_devices
    return weights, page.page_bytes(layout.dtype.itemsize)


def _draft_facts(
    model_config: ModelConfig, layout: Layout, config: EngineConfig, system: SystemFacts
) -> DraftFacts | None:
    draft = find_draft(config, model_config, max_model_len=layout.max_model_len)
    if draft is None:
        return None
    layout = lay_out(draft.model_config, draft.config, system.platform)
    held, page_bytes = _memory(
        draft.model_config,
        layout,
        draft.config,
        _mesh_facts(draft.model_config, layout, draft.config, platform=system.platform),
    )
    return DraftFacts(
        architecture=draft.model_config.architecture,
        num_parameters=draft.model_config.num_parameters,
        held_bytes=held,
        kv_bytes_per_token=page_bytes // config.page_size,
    )


def _mesh_facts(model_config: ModelConfig, layout: Layout, config: EngineConfig, *, platform: str) -> MeshFacts | None:
    """Facts of the mesh, found by tracing the step program, which needs no devices; None for one device."""
    if layout.num_stages == layout.num_shards == 1:
        return None
    shapes = StepShapes.on_platform(platform, config, max_model_len=layout.max_model_len)
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
