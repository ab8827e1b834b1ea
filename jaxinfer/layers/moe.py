"""Mixture of experts: every token goes to a few of many feed-forward blocks.

Owns: the router, the experts (each shard of the "tensor" axis holds some of them whole) and how their products are
computed.
Does not know: the norms around the block and the residual stream; models/decoder.py applies them.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.communication.collectives import sum_over_tensor, tensor_shard
from jaxinfer.communication.sharding import COLUMN_PARALLEL, PER_STAGE
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.layers.linear import FusedPart, project
from jaxinfer.layers.mlp import activate

_FEW = 8
"""If an expert gets fewer tokens than this on average, expert_loop multiplies tokens one by one, else in blocks."""
_BLOCK = 16
"""Tokens of one expert in a block of expert_loop."""
EXPERT_BLOCK = 256
"""Tokens that expert_batched takes at a time. It bounds the memory of the hidden activations, [E, block, F]."""


class MixtureOfExperts(nnx.Module):
    """The weighted sum of a token's most likely experts, each of them down(act(gate(x)) * up(x)).

    Each shard holds num_experts / tp whole experts and computes them for the tokens that chose them; one psum adds the
    shards' results.

    Args:
      config: the model's numbers.
      num_stages, num_shards: pipeline stages and tensor shards.
      dtype: of the parameters.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; the router as in transformers' Mixtral and
    Qwen3-MoE: a softmax in float32 over all experts, of which the most likely are kept; their probabilities are scaled
    to a sum of 1 if config.normalise_experts says so.
    """

    def __init__(self, config: ModelConfig, *, num_stages: int, num_shards: int, dtype: jnp.dtype):
        self.activation = config.activation
        self.num_chosen = config.experts_per_token
        self.normalise = config.normalise_experts
        count, size, ffn_size = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.num_local = count // num_shards

        def experts(out_size: int, in_size: int, num_parts: int) -> nnx.Param:
            parts = (FusedPart(out_size),) * num_parts * count
            shape = (num_stages, out_size * num_parts * count, in_size)
            return nnx.Param(jnp.zeros(shape, dtype), spec=COLUMN_PARALLEL, parts=parts, whole_parts=True)

        self.router = nnx.Param(jnp.zeros((num_stages, count, size), dtype), spec=PER_STAGE)
        self.gate_up = experts(ffn_size, size, 2)
        self.down = experts(size, ffn_size, 1)

    def __call__(self, x: Float[Array, "T D"], live: Bool[Array, " T"]) -> Float[Array, "T D"]:
        """Maps [T, D] to [T, D]; tokens that are not live (padding) cost no expert and come out as zeros."""
        shares, expert_ids = self._routes(x)
        local = expert_ids - tensor_shard() * self.num_local
        here = (local >= 0) & (local < self.num_local) & live[:, None]
        gate_up = self.gate_up[0].reshape(self.num_local, -1, x.shape[1])
        down = self.down[0].reshape(self.num_local, x.shape[1], -1)
        y = lax.platform_dependent(
            x,
            jnp.where(here, local, self.num_local),
            jnp.where(here, shares, 0.0),
            gate_up,
            down,
            cpu=functools.partial(expert_loop, activation=self.activation),
            default=functools.partial(expert_batched, activation=self.activation),
        )
        return sum_over_tensor(y.astype(x.dtype))

    def _routes(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
        """The K most likely experts of every token, and the factor (share) of each one's output."""
        probabilities = nnx.softmax(project(x, self.router[0]).astype(jnp.float32), axis=-1)
        shares, expert_ids = lax.top_k(probabilities, self.num_chosen)
        if self.normalise:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        return shares, expert_ids


def expert_dense(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Float[Array, "E G D"],
    down: Float[Array, "E D F"],
    *,
    activation: str,
) -> Float[Array, "T D"]:
    """Computes every expert for every token; the plain oracle of the two functions below.

    Args:
      x: tokens.
      expert_ids: the K experts of each token, as indices into E; E itself stands for no expert.
      shares: float32, the factor of each of these experts' outputs.
      gate_up, down: the experts' weights, G = 2 F.
      activation: of the gate, a name in config.ACTIVATIONS.

    Returns:
      float32[T, D], each token's sum of shares times expert outputs.
    """
    weights = jnp.zeros((x.shape[0], gate_up.shape[0]), jnp.float32)
    weights = weights.at[jnp.arange(x.shape[0])[:, None], expert_ids].add(shares, mode="drop")
    outputs = [project(activate(project(x, g), activation), d) for g, d in zip(gate_up, down, strict=True)]
    return jnp.einsum("etd,te->td", jnp.stack(outputs).astype(jnp.float32), weights)


def expert_loop(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Float[Array, "E G D"],
    down: Float[Array, "E D F"],
    *,
    activation: str,
) -> Float[Array, "T D"]:
    """Computes expert_dense for CPUs: a loop over blocks of tokens that share an expert, with no work for idle experts.

    With 32 experts of 512 x 1024, four of them per token, two CPU cores take 0.7, 11 and 47 ms for 1, 32 and 256
    tokens, where jax.lax.ragged_dot takes 97, 163 and 636 ms. Arguments and result are those of expert_dense.
    """
    num_tokens, num_chosen = expert_ids.shape
    num_experts = gate_up.shape[0]
    size = 1 if num_tokens * num_chosen < _FEW * num_experts else _BLOCK
    order, counts = _by_expert(expert_ids, num_experts)
    blocks = -(-counts // size)
    ends, first = jnp.cumsum(blocks), jnp.cumsum(counts) - counts
    token = jnp.pad(order // num_chosen, (0, size))
    share = jnp.pad(shares.ravel()[order], (0, size))

    def add_block(i: Array, y: Array) -> Array:
        expert = jnp.sum(i >= ends)
        start = (i - (ends - blocks)[expert]) * size  # within the expert's tokens
        rows = lax.dynamic_slice_in_dim(token, first[expert] + start, size)
        factor = lax.dynamic_slice_in_dim(share, first[expert] + start, size)
        hidden = activate(project(x[rows], gate_up[expert]), activation)
        added = project(hidden, down[expert]).astype(jnp.float32) * factor[:, None]
        own = (start + jnp.arange(size) < counts[expert])[:, None]  # the rest of the block is the next expert's tokens
        return y.at[rows].add(jnp.where(own, added, 0.0))

    return lax.fori_loop(0, ends[-1], add_block, jnp.zeros(x.shape, jnp.float32))


def expert_batched(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Float[Array, "E G D"],
    down: Float[Array, "E D F"],
    *,
    activation: str,
) -> Float[Array, "T D"]:
    """Computes expert_dense for GPUs, without loops of unknown length and with sums in a fixed order.

    Up to E (token, expert) pairs read the weights of their own experts only. With more, every expert multiplies every
    token in one product, EXPERT_BLOCK tokens at a time. jax.lax.ragged_dot is not used, since XLA is reported to expand
    its tokens by the number of experts on GPUs (jaxlib 0.10.1 and 0.10.2, marin-community/marin issue 7012). Arguments
    and result are those of expert_dense.
    """
    compute = functools.partial(_by_token if expert_ids.size <= gate_up.shape[0] else _by_every_expert, activation)
    num_tokens, count = x.shape[0], -(-x.shape[0] // EXPERT_BLOCK)
    if count <= 1:
        return compute(gate_up, down, x, expert_ids, shares)
    padded = [jnp.pad(y, ((0, -num_tokens % EXPERT_BLOCK), (0, 0))) for y in (x, expert_ids, shares)]
    blocks = [y.reshape(count, EXPERT_BLOCK, -1) for y in padded]
    return lax.map(lambda block: compute(gate_up, down, *block), tuple(blocks)).reshape(-1, x.shape[1])[:num_tokens]


def _by_token(activation: str, gate_up: Array, down: Array, x: Array, expert_ids: Array, shares: Array) -> Array:
    """One matrix-vector product for every (token, chosen expert) pair.

    It is written as a sum of products, so that XLA can fuse the gather of the weights into it.
    """
    experts = jnp.minimum(expert_ids, gate_up.shape[0] - 1)
    wide = x.astype(jnp.float32)
    hidden = activate(jnp.sum(gate_up[experts] * wide[:, None, None], axis=-1).astype(x.dtype), activation)
    outputs = jnp.sum(down[experts] * hidden[:, :, None].astype(jnp.float32), axis=-1)
    chosen = (expert_ids < gate_up.shape[0])[:, :, None]
    return jnp.sum(jnp.where(chosen, outputs * shares[:, :, None], 0.0), axis=1)


def _by_every_expert(activation: str, gate_up: Array, down: Array, x: Array, expert_ids: Array, shares: Array) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    hidden = activate(jnp.einsum("td,egd->etg", x, gate_up, precision=precision), activation)
    outputs = jnp.einsum("etf,edf->etd", hidden, down, precision=precision)
    # The comparison is [E, T, K]: expert e is the token's choice k. Without any such k the weight is 0.
    weights = jnp.where(expert_ids == jnp.arange(gate_up.shape[0])[:, None, None], shares, 0.0).sum(axis=-1)
    return jnp.sum(jnp.where(weights[:, :, None] != 0, outputs * weights[:, :, None], 0.0), axis=0)


def _by_expert(expert_ids: Int[Array, "T K"], num_experts: int) -> tuple[Int[Array, " J"], Int[Array, " E"]]:
    """Flat indices of the (token, choice) pairs sorted by expert, pairs without one last; and each expert's count."""
    flat = expert_ids.ravel()
    return jnp.argsort(flat, stable=True), jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
