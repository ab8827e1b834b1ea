"""Builds a running wrapper from a checkpoint.

Owns: the order of construction (mesh, layout, abstract model, parameters, wrapper).
Does not know: engines, text.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.loader import load_parameters
from jaxinfer.checkpoint.store import TensorStore
from jaxinfer.communication.mesh import make_mesh, processes_of_replicas
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.kernels.paged_attention import choose_backend
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import find_family
from jaxinfer.wrappers.compilation_cache import enable_persistent_cache
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.holders import Holders
from jaxinfer.wrappers.memory import Footprint, activation_bytes
from jaxinfer.wrappers.step_shapes import StepShapes, pages_for
from jaxinfer.wrappers.xla_options import chosen_options

logger = logging.getLogger(__name__)

_MAX_TABLE_BYTES = 2**32
"""Limit of the table that names every slot's KV pages, int32[slots, W]. Only a mistaken context exceeds it."""


def context_length(config: EngineConfig, model: ModelConfig) -> int:
    """The limit on tokens of prompt and output together: max_model_len if it is set, else the model's own limit.

    Raises:
      ValueError: max_model_len exceeds what the model's positions cover, or the table of every slot's KV pages would
        take more than 4 GiB.
    """
    covered = model.max_position_embeddings
    if model.rope is not None and model.rope.kind != "default":
        covered = max(covered, int(model.rope.original_max_len * model.rope.factor))
    length = model.max_position_embeddings if config.max_model_len is None else config.max_model_len
    if config.max_model_len is not None and length > covered:
        raise ValueError(f"max_model_len must be <= {covered}, the model's context, got {length}")
    table_bytes = 4 * config.max_num_seqs * pages_for(length, config.page_size)
    if table_bytes > _MAX_TABLE_BYTES:
        raise ValueError(
            f"the table of KV pages would take {table_bytes / 2**30:.0f} GiB for max_num_seqs {config.max_num_seqs} "
            f"and a context of {length} tokens; lower max_model_len or max_num_seqs"
        )
    return length


def assemble(
    model_config: ModelConfig,
    store: TensorStore,
    config: EngineConfig,
    *,
    beside: Footprint | None = None,
    role: str = "model",
    replica: int = 0,
    progress: bool = True,
    holders: Holders | None = None,
) -> DecoderWrapper:
    """Builds the wrapper of a model whose tensors are in a store.

    Args:
      model_config: the model's numbers.
      store: its tensors, by checkpoint name.
      config: the engine's settings.
      beside: memory to leave for a second model (the draft model), which will be loaded on the same devices with as
        many pages.
      role: what the model is used as ("model", "draft model"), for the line in the log.
      replica: which of config.data_parallel_size replicas this is; those before it are loaded already.
      progress: whether to show a bar while loading.
      holders: the processes that hold this replica, all of which load their parts of it at the same time; None if this
        process runs alone.

    Raises:
      ValueError: the tensors do not fit the model, the model cannot be laid out on the mesh, there is no room for KV
        pages, or XLA refuses the settings' xla_options.
    """
    enable_persistent_cache()
    chosen_options(config.xla_options)  # a mistake is noticed before anything is loaded
    holders_of_replicas = processes_of_replicas(config)  # too few devices are noticed, too
    mesh = make_mesh(
        pipeline_parallel_size=config.pipeline_parallel_size,
        tensor_parallel_size=config.tensor_parallel_size,
        replica=replica,
    )
    if holders is None and any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise ValueError("the mesh has devices of other processes, which only an LLM can use; make an LLM on each")
    layout = lay_out(model_config, config, *platform_of(mesh.devices.flat[0]))
    model = abstract_model(model_config, layout)
    parameters = load_parameters(
        model,
        family=find_family(model_config.architecture),
        num_layers=model_config.num_layers,
        store=store,
        mesh=mesh,
        progress=progress,
    )
    wrapper = DecoderWrapper(
        model,
        parameters,
        model_config=model_config,
        config=config,
        layout=layout,
        mesh=mesh,
        beside=beside,
        num_alike=sum(jax.process_index() in ids for ids in holders_of_replicas[replica:]),
        holders=holders,
    )
    logger.info(
        "%s %s, %.1fM parameters, mesh %s on %s, %s, attention %s, weights %.0f MiB, "
        "KV %d pages of %d tokens (%.0f MiB)",
        role,
        model_config.architecture,
        model_config.num_parameters / 1e6,
        "x".join(map(str, mesh.devices.shape)),
        jax.devices()[0].device_kind,
        layout.weight_dtypes,
        layout.attention_backend,
        wrapper.weight_bytes / 2**20,
        wrapper.num_pages,
        config.page_size,
        wrapper.kv_bytes / 2**20,
    )
    return wrapper


def footprint(model_config: ModelConfig, config: EngineConfig) -> Footprint:
    """Estimates how much of a device's memory a model will take.

    Raises:
      ValueError: the model cannot be laid out on the mesh.
    """
    device = jax.devices()[0]
    layout = lay_out(model_config, config, *platform_of(device))
    shapes = StepShapes.on_platform(device.platform, config, max_model_len=layout.max_model_len)
    itemsize = layout.dtype.itemsize
    page = layout.cache_shape(model_config, num_pages=1, page_size=config.page_size)
    num_devices = layout.num_stages * layout.num_shards
    return Footprint(
        fixed_bytes=parameter_bytes(model_config, layout) // num_devices
        + activation_bytes(model_config, shapes, itemsize),
        page_bytes=page.page_bytes(itemsize) // num_devices,
    )


def lay_out(
    model_config: ModelConfig, config: EngineConfig, platform: str, compute_capability: str | None = None
) -> Layout:
    """The layout of a model on the mesh that the engine's settings ask for.

    Raises:
      ValueError: the model cannot be laid out on that mesh.
    """
    backend = choose_backend(config.attention_backend, platform, compute_capability)
    layout = Layout(
        num_stages=config.pipeline_parallel_size,
        num_shards=config.tensor_parallel_size,
        dtype=choose_dtype(config.dtype, platform),
        max_model_len=context_length(config, model_config),
        attention_backend=backend,
        span=config.span,
        quantization=config.quantization,
        inputs_first=platform == "cpu" and backend != "pallas" and config.quantization is None,
    )
    layout.check(model_config)
    return layout


def platform_of(device: jax.Device) -> tuple[str, str | None]:
    """A device's platform and, for a CUDA device, its compute capability (else None)."""
    return device.platform, getattr(device, "compute_capability", None)


def abstract_model(model_config: ModelConfig, layout: Layout) -> Any:
    """The model, an nnx module with the Decoder protocol, with shapes in place of arrays.

    Raises:
      ValueError: quantised weights are asked for, which the model's family does not have.
    """
    family = find_family(model_config.architecture)
    model = nnx.eval_shape(lambda: family.build(model_config, layout))
    if layout.quantization is not None and not any(
        leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(nnx.state(model))
    ):
        raise ValueError(
            f"{model_config.architecture} is registered without quantization: its `build` must pass "
            f"layout.quantization to its layers; leave out quantization={layout.quantization!r}"
        )
    return model


def parameter_bytes(model_config: ModelConfig, layout: Layout) -> int:
    """Bytes of a model's parameters over all devices, replicas counted once."""
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(abstract_model(model_config, layout)))
    )


def choose_dtype(requested: str, platform: str) -> jnp.dtype:
    """ "auto" is float32 on CPU, where XLA's bfloat16 products are many times slower, and bfloat16 elsewhere."""
    if requested == "auto":
        requested = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(requested)
