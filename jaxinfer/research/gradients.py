"""Gradients through the weights that an LLM serves.

Owns: a pure, differentiable function of weights and tokens on the engine's own arrays and mesh.
Does not know: optimisers, requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import stage_index
from jaxinfer.communication.sharding import REPLICATED
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.kernels.paged_attention import is_built_in
from jaxinfer.sites import split_layer
from jaxinfer.wrappers.assembly import abstract_model
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.parameters import by_name
from jaxinfer.wrappers.whole_texts import whole_text_logprobs

LogprobFunction = Callable[[Mapping[str, Any], Any], Array]


def make_logprob_fn(decoder: DecoderWrapper, config: ModelConfig, *, max_len: int) -> LogprobFunction:
    """The function that jaxinfer.logprob_fn describes.

    Args:
      decoder: the wrapper whose mesh and layout it is for.
      config: the model's numbers.
      max_len: tokens of the longest text.

    Raises:
      ValueError: shards outnumber the model's kv heads, or the weights are quantised.
    """
    mesh = decoder.mesh
    layout = decoder.layout
    if layout.quantization is not None:
        raise ValueError(f"logprob_fn needs float weights, got quantization {layout.quantization!r}; leave it out")
    layout = dataclasses.replace(layout, inputs_first=False)  # as llm.params
    if is_built_in(layout.attention_backend):  # the fast backends cannot be differentiated
        layout = dataclasses.replace(layout, attention_backend="reference")
    if layout.kv_copies(config) > 1:
        raise ValueError(
            f"logprob_fn needs tensor_parallel_size <= {config.num_kv_heads}, the model's kv heads, got "
            f"{layout.num_shards}: the copies of a head would be trained apart"
        )
    graph, abstract = nnx.split(abstract_model(config, layout))
    variables = nnx.to_flat_state(abstract)
    names = [".".join(map(str, path)) for path, _ in variables]
    shapes = {name: variable.shape for name, (_, variable) in zip(names, variables, strict=True)}
    tree = jax.tree.structure(abstract)
    per_stage = layout.layers_per_stage(config)

    def on_a_shard(leaves: list[Array], token_ids: Int[Array, "R L"]) -> Float[Array, "R M"]:
        def used(name: str, array: Array) -> Array:
            """The array; where its layer only pads a stage, its gradient is zero."""
            local = split_layer(name)[0]
            if local is None or per_stage * layout.num_stages == config.num_layers:
                return array
            is_layer = stage_index() * per_stage + local < config.num_layers
            return jnp.where(is_layer, array, lax.stop_gradient(array))

        own = [used(name, array) for name, array in zip(names, leaves, strict=True)]
        model = nnx.merge(graph, jax.tree.unflatten(tree, own))
        return whole_text_logprobs(model, token_ids, config=config, layout=layout)

    specs = [variable.spec for _, variable in variables]
    mapped = jax.shard_map(on_a_shard, mesh=mesh, in_specs=(specs, REPLICATED), out_specs=REPLICATED, check_vma=False)

    @jax.jit
    def compiled(leaves: list[Array], token_ids: Array) -> Array:
        return mapped(leaves, token_ids)

    def logprobs(weights: Mapping[str, Any], tokens: Any) -> Float[Array, "R M"]:
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not 2 <= tokens.shape[1] <= max_len or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers of shape [texts, tokens], 2 to {max_len} tokens, got "
                f"{tokens.dtype.name}{list(tokens.shape)}"
            )
        if not isinstance(tokens, jax.core.Tracer) and not bool(((tokens >= 0) & (tokens < config.vocab_size)).all()):
            raise ValueError(f"tokens must be in 0..{config.vocab_size - 1}; use any of these as padding")
        arrays = by_name(weights)
        unlike = sorted(set(names) ^ set(arrays))
        if unlike:
            raise ValueError(f"weights must be a tree like llm.params; {unlike[0]} is in only one of them")
        for name, dims in shapes.items():
            if arrays[name].shape != dims:
                raise ValueError(f"weights {name} must have shape {list(dims)}, got {list(arrays[name].shape)}")
        return compiled([arrays[name] for name in names], tokens.astype(jnp.int32))

    return logprobs
