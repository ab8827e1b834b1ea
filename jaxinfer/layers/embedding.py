"""The token embedding and the language-model head, both sharded by vocabulary over the whole mesh; learned positions.

Owns: which token ids a device's slice of the vocabulary holds, the mask over its padding, and the table of positions.
Does not know: how tokens are sampled from the logits.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import sum_over_vocabulary, vocabulary_shard
from jaxinfer.communication.sharding import REPLICATED, VOCABULARY_PARALLEL, padded_vocabulary
from jaxinfer.layers.linear import FusedPart, project
from jaxinfer.layers.weight import dequantize, weight_params


class VocabularyEmbedding(nnx.Module):
    """A table with one row of weights per token, used to embed ids or to score hidden states (or both, when tied).

    Args:
      vocab_size: number of tokens. The table is padded to a multiple of num_shards rows; padding scores -inf.
      hidden_size: D.
      num_shards: devices of the whole mesh, pipeline stages times tensor shards.
      dtype: of the weight.
      quantization: of the table; "int8" or None.
      logit_softcap: logits become cap * tanh(logits / cap); None leaves them as they are.
      backend: name of the kernel backend with which tokens are to be sampled from the logits.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        num_shards: int,
        dtype: jnp.dtype,
        logit_softcap: float | None = None,
        quantization: str | None = None,
        backend: str = "xla",
    ):
        self.vocab_size = vocab_size
        self.backend = backend
        self.logit_softcap = logit_softcap
        rows = padded_vocabulary(vocab_size, num_shards)
        self.dtype = dtype
        self.weight, self.weight_scale = weight_params(
            (rows, hidden_size),
            dtype,
            quantization=quantization,
            spec=VOCABULARY_PARALLEL,
            parts=(FusedPart(vocab_size),),
        )

    def embed(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Looks up the rows of the ids, each on the device that holds it; a psum gives all rows to all devices."""
        weight = self.weight[...]
        local = token_ids - vocabulary_shard() * weight.shape[0]
        owned = (local >= 0) & (local < weight.shape[0])
        place = jnp.where(owned, local, 0)
        rows = weight.at[place].get(mode="promise_in_bounds")
        if self.weight_scale is not None:
            rows = dequantize(rows, self.weight_scale[...].at[place].get(mode="promise_in_bounds"), self.dtype)
        return sum_over_vocabulary(jnp.where(owned[:, None], rows, 0))

    def logits(self, hidden: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """Scores hidden states against this device's slice of the vocabulary: float32 logits, -inf for padding."""
        weight = self.weight[...]
        scale = None if self.weight_scale is None else self.weight_scale[...]
        logits = project(hidden, weight, scale, out_dtype=jnp.dtype(jnp.float32))
        if self.logit_softcap is not None:
            logits = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
        token_ids = vocabulary_shard() * weight.shape[0] + jnp.arange(weight.shape[0])
        return jnp.where(token_ids < self.vocab_size, logits, -jnp.inf)


class PositionEmbedding(nnx.Module):
    """One learned vector per position; every device holds the whole table.

    Args:
      num_positions: rows of the table.
      hidden_size: D.
      dtype: of the weight.
    """

    def __init__(self, num_positions: int, hidden_size: int, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros((num_positions, hidden_size), dtype), spec=REPLICATED)

    def __call__(self, positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """The rows of the positions. A position beyond the table, which only padding tokens have, gets the last row."""
        return self.weight[...].at[positions].get(mode="clip")
