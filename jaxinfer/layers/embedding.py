"""Token embedding and language-model head, both sharded by vocabulary over the whole mesh; learned positions.

Owns: the slice arithmetic of the vocabulary and the mask over its padding, the table of positions.
Does not know: sampling.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import sum_over_vocabulary, vocabulary_shard
from jaxinfer.communication.sharding import REPLICATED, VOCABULARY_PARALLEL, padded_vocabulary
from jaxinfer.layers.linear import Rows, project


class VocabularyEmbedding(nnx.Module):
    """One row of weights a token, used to embed ids or to score hidden states (or both, when tied).

    Args:
      vocab_size: tokens; rows beyond them are padding and score -inf.
      hidden_size: D.
      num_shards: devices of the mesh, pipe x tensor.
      dtype: of the weight.
      logit_softcap: logits become cap * tanh(logits / cap); None leaves them.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        num_shards: int,
        dtype: jnp.dtype,
        logit_softcap: float | None = None,
    ):
        self.vocab_size = vocab_size
        self.logit_softcap = logit_softcap
        rows = padded_vocabulary(vocab_size, num_shards)
        self.weight = nnx.Param(
            jnp.zeros((rows, hidden_size), dtype), spec=VOCABULARY_PARALLEL, parts=(Rows(vocab_size),)
        )

    def embed(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Rows of the ids; every device adds those it owns (one psum over the mesh)."""
        weight = self.weight[...]
        local = token_ids - vocabulary_shard() * weight.shape[0]
        owned = (local >= 0) & (local < weight.shape[0])
        rows = weight.at[jnp.where(owned, local, 0)].get(mode="promise_in_bounds")
        return sum_over_vocabulary(jnp.where(owned[:, None], rows, 0))

    def logits(self, hidden: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """float32 logits of this device's slice of the vocabulary, -inf on padding rows."""
        weight = self.weight[...]
        logits = project(hidden, weight, out_dtype=jnp.dtype(jnp.float32))
        if self.logit_softcap is not None:
            logits = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
        token_ids = vocabulary_shard() * weight.shape[0] + jnp.arange(weight.shape[0])
        return jnp.where(token_ids < self.vocab_size, logits, -jnp.inf)


class PositionEmbedding(nnx.Module):
    """One learned vector a position, the same table on every device.

    Args:
      num_positions: rows.
      hidden_size: D.
      dtype: of the weight.
    """

    def __init__(self, num_positions: int, hidden_size: int, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros((num_positions, hidden_size), dtype), spec=REPLICATED)

    def __call__(self, positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Rows of the positions; those beyond the table, which only padding has, get the last one."""
        return self.weight[...].at[positions].get(mode="clip")
