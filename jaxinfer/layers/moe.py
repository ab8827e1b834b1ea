"""Mixture of experts: every token goes to a few of many feed-forward blocks.

Owns: the router, the experts (split whole over the "tensor" axis) and how their products are computed.
Does not know: normalisation, residuals.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.communication.collectives import sum_over_tensor, tensor_shard
from jaxinfer.communication.sharding import COLUMN_PARALLEL, PER_STAGE
from jaxinfer.config import ModelConfig
from jaxinfer.layers.linear import Rows, project
from jaxinfer.layers.mlp import activate

_FEW = 8
"""Tokens an expert gets on average below which the CPU multiplies them one by one."""
_BLOCK = 16
EXPERT_BLOCK = 256
"""Tokens at a time where every expert multiplies all of them: bounds what lies between the two products."""


class MixtureOfExperts(nnx.Module):
    """Sum over a token's most likely experts of probability times down(act(gate(x)) * up(x)).

    Each shard holds num_experts / tp whole experts and adds what they make of the tokens sent to them; one psum.

    Args:
      config: the model's numbers.
      num_stages, num_shards: pipeline stages and tensor shards.
      dtype: of the parameters.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; the router as in transformers' Mixtral and
    Qwen3-MoE: softmax in float32 over all experts, then the most likely ones, scaled to a sum of 1 where config says.
    """

    def __init__(self, config: ModelConfig, *, num_stages: int, num_shards: int, dtype: jnp.dtype):
        self.activation = config.activation
        self.num_chosen = config.experts_per_token
        self.normalise = config.normalise_experts
        count, size, ffn_size = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.num_local = count // num_shards

        def experts(out_size: int, in_size: int, num_parts: int) -> nnx.Param:
            parts = (Rows(out_size),) * num_parts * count
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
        """What of each token goes to which experts."""
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
    """The plain oracle: every expert on every token.

    Args:
      x: tokens.
      expert_ids: which experts each goes to; E for none.
      shares: float32, the factor of each.
      gate_up, down: the experts' weights, G = 2 F.
      activation: of the gate.

    Returns:
      float32[T, D], weighted sums.
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
    """As expert_dense, in a loop over blocks of tokens of one expert, as many as the tokens need.

    On two CPU cores, 32 experts of 512 x 1024 and four of them a token: 0.7, 11 and 47 ms for 1, 32 and 256 tokens,
    where jax.lax.ragged_dot takes 97, 163 and 636 ms.
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
        own = (start + jnp.arange(size) < counts[expert])[:, None]  # behind them stand the next expert's tokens
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
    """As expert_dense, for GPUs: neither a loop of unknown length nor sums in an order that varies.

    Few tokens read the weights of their experts only; many go through every expert in one product, a block of tokens at
    a time. Not jax.lax.ragged_dot: on GPUs XLA is reported to expand its tokens by the number of experts (jaxlib 0.10.1
    and 0.10.2, marin-community/marin issue 7012).
    """
    compute = functools.partial(_by_token if expert_ids.size <= gate_up.shape[0] else _by_every_expert, activation)
    num_tokens, count = x.shape[0], -(-x.shape[0] // EXPERT_BLOCK)
    if count <= 1:
        return compute(gate_up, down, x, expert_ids, shares)
    padded = [jnp.pad(y, ((0, -num_tokens % EXPERT_BLOCK), (0, 0))) for y in (x, expert_ids, shares)]
    blocks = [y.reshape(count, EXPERT_BLOCK, -1) for y in padded]
    return lax.map(lambda block: compute(gate_up, down, *block), tuple(blocks)).reshape(-1, x.shape[1])[:num_tokens]


def _by_token(activation: str, gate_up: Array, down: Array, x: Array, expert_ids: Array, shares: Array) -> Array:
    """A product of one row for every token and expert; a sum of products, into which XLA can draw the gather."""
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
    # [E, T, K]: which of a token's choices an expert is; none of them where the expert is not asked.
    weights = jnp.where(expert_ids == jnp.arange(gate_up.shape[0])[:, None, None], shares, 0.0).sum(axis=-1)
    return jnp.sum(jnp.where(weights[:, :, None] != 0, outputs * weights[:, :, None], 0.0), axis=0)


def _by_expert(expert_ids: Int[Array, "T K"], num_experts: int) -> tuple[Int[Array, " J"], Int[Array, " E"]]:
    """The (token, choice) pairs sorted by expert, those of none last, and how many each expert has."""
    flat = expert_ids.ravel()
    return jnp.argsort(flat, stable=True), jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
