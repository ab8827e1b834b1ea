"""The log-probabilities of whole texts in one differentiable pass, for one shard.

Owns: whole texts as a batch without pages to share, the pass through all stages of a pipeline, one after the other.
Does not know: requests, the KV pool, optimisers.

The engine computes the same step by step, over pages and with kernels that cannot be differentiated. A model that goes
through here has to be built with the "reference" backend.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.communication import collectives
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.kernels.segment import Segment
from jaxinfer.layers.attention import TokenBatch
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.models.layout import Layout


def whole_texts(num_texts: int, length: int) -> TokenBatch:
    """Texts of equal length as one segment, each a row with one KV page of its own (from 1 on: 0 is the dump page)."""
    pages = 1 + jnp.arange(num_texts, dtype=jnp.int32)
    full = jnp.full(num_texts, length, jnp.int32)
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), num_texts)
    return TokenBatch(
        positions=positions,
        pages=jnp.repeat(pages, length),
        offsets=positions,
        segments=(Segment(pages[:, None], full, full, pages, num_queries=length),),
    )


def run_whole_texts(
    model: Any, x: Float[Array, "T D"], batch: TokenBatch, *, config: ModelConfig, layout: Layout
) -> Float[Array, "T D"]:
    """Takes embedded texts through the layers of all stages; returns the last stage's residual stream, on all devices.

    The stages work one after the other, each on what the one before has sent; what they compute meanwhile is dropped.

    Args:
      model: an nnx module with the Decoder protocol.
      x: the embedded tokens.
      batch: from whole_texts.
      config: the model's numbers.
      layout: the layout that the model was built for.
    """
    (segment,) = batch.segments
    num_texts = segment.kv_len.shape[0]
    shape = layout.cache_shape(config, num_pages=num_texts + 1, page_size=segment.num_queries)
    dims = (shape.num_pages, shape.num_kv_heads // layout.num_shards, shape.page_size, shape.head_dim)
    caches = [LayerCache(jnp.zeros(dims, x.dtype), jnp.zeros(dims, x.dtype)) for _ in range(shape.num_layers)]
    for stage in range(layout.num_stages):
        x = collectives.send_to_next_stage(x) if stage else x
        x, _ = model.run_layers(x, caches, batch)
    return collectives.share_from_last_stage(x)


def token_logprobs(logits: Float[Array, "T V"], token_ids: Int[Array, " T"]) -> Float[Array, " T"]:
    """The log-probability of a token in each row of logits, of which every device has its slice of the vocabulary.

    Args:
      logits: float32, this device's slice; padding of the vocabulary is -inf.
      token_ids: ids in the whole vocabulary.
    """
    most = collectives.max_over_vocabulary(lax.stop_gradient(logits.max(axis=1)))
    total = collectives.sum_over_vocabulary(jnp.exp(logits - most[:, None]).sum(axis=1))
    local = token_ids - collectives.vocabulary_shard() * logits.shape[1]
    owned = (local >= 0) & (local < logits.shape[1])
    own = jnp.take_along_axis(logits, jnp.where(owned, local, 0)[:, None], axis=1)[:, 0]
    chosen = collectives.sum_over_vocabulary(jnp.where(owned, own, 0.0))
    return chosen - most - jnp.log(total)


def whole_text_logprobs(
    model: Any, token_ids: Int[Array, "R L"], *, config: ModelConfig, layout: Layout
) -> Float[Array, "R M"]:
    """The log-probability of every token of each text but the first, given those in front of it: float32[R, L - 1]."""
    num_texts, length = token_ids.shape[0], token_ids.shape[1] - 1
    batch = whole_texts(num_texts, length)
    x = model.embed(token_ids[:, :-1].ravel(), batch.positions)
    x = run_whole_texts(model, x, batch, config=config, layout=layout)
    logits = model.head.logits(model.final_norm(x))
    return token_logprobs(logits, token_ids[:, 1:].ravel()).reshape(num_texts, length)
