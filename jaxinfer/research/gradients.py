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

from jaxinfer.api.llm import LLM
from jaxinfer.communication.collectives import stage_index
from jaxinfer.communication.sharding import REPLICATED
from jaxinfer.sites import split_layer
from jaxinfer.wrappers.assembly import abstract_model
from jaxinfer.wrappers.parameters import by_name
from jaxinfer.wrappers.whole_texts import whole_text_logprobs

LogprobFunction = Callable[[Mapping[str, Any], Any], Array]


def logprob_fn(llm: LLM) -> LogprobFunction:
    """A function that gives the log-probabilities of texts under given weights, for jax.grad, jax.jvp and jax.jit.

    It computes what the engine does, in the same dtype and on the same mesh, so that it equals what the sampler saw as
    far as rounding allows, but keeps no pages and takes whole texts. With it, the weights that serve can be trained:

      logprobs = jaxinfer.logprob_fn(llm)
      loss = lambda weights: -logprobs(weights, tokens).mean()
      gradients = jax.grad(loss)(llm.params)
      llm.update_weights(jax.tree.map(lambda w, g: w - 1e-3 * g, llm.params, gradients))

    Args:
      llm: gives model, mesh and layout; the function does not keep its weights.

    Returns:
      (weights, tokens) -> float32[R, L - 1]. weights: a tree like llm.params. tokens: int32[R, L], R texts of L tokens,
      2 <= L <= max_model_len + 1; pad shorter texts on the right and ignore what comes out for the padding. The
      log-probability of tokens[:, i + 1], given those in front of it, before any temperature, is in column i. The
      gradient for the layers that only pad pipeline stages is zero.

    Raises:
      ValueError: several processes hold the model, or shards outnumber its kv heads: the copies of a head would be
        trained apart. The function raises it for other shapes of tokens.
    """
    decoder = llm.decoder
    config, mesh = llm.model_config, decoder.mesh
    # The fast backends cannot be differentiated.
    layout = dataclasses.replace(decoder.layout, attention_backend="reference")
    if layout.kv_copies(config) > 1:
        raise ValueError(
            f"logprob_fn needs tensor_parallel_size <= {config.num_kv_heads}, the model's kv heads, got "
            f"{layout.num_shards}: the copies of a head would be trained apart"
        )
    graph, abstract = nnx.split(abstract_model(config, layout))
    variables = nnx.to_flat_state(abstract)
    names = [".".join(map(str, path)) for path, _ in variables]
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

    max_len = llm.max_model_len + 1

    def logprobs(weights: Mapping[str, Any], tokens: Any) -> Float[Array, "R M"]:
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not 2 <= tokens.shape[1] <= max_len or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers of shape [texts, tokens], 2 to {max_len} tokens, got "
                f"{tokens.dtype.name}{list(tokens.shape)}"
            )
        arrays = by_name(weights)
        unlike = sorted(set(names) ^ set(arrays))
        if unlike:
            raise ValueError(f"weights must be a tree like llm.params; {unlike[0]} is in only one of them")
        return compiled([arrays[name] for name in names], tokens.astype(jnp.int32))

    return logprobs
