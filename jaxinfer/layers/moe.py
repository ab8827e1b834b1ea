"""Mixture of experts: every token goes to a few of many feed-forward blocks.

Owns: the router, the experts (each shard of the "tensor" axis holds some of them whole) and how their products are
computed.
Does not know: the norms around the block and the residual stream; models/decoder.py applies them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from jaxinfer.communication.collectives import sum_over_tensor, tensor_shard
from jaxinfer.communication.sharding import COLUMN_PARALLEL, PER_STAGE
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.kernels.pallas_experts import ExpertScales, expert_groups
from jaxinfer.layers.linear import FusedPart, gated, project
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.taps import NO_TAPS, SiteTaps
from jaxinfer.layers.weight import weight_params

_FEW = 8
"""If an expert gets fewer tokens than this on average, expert_loop multiplies tokens one by one, else in blocks."""
_BLOCK = 16
"""Tokens of one expert in a block of expert_loop."""


class MixtureOfExperts(nnx.Module):
    """The weighted sum of a token's most likely experts, each of them down(act(gate(x)) * up(x)).

    Each shard holds num_experts / tp whole experts and computes them for the tokens that chose them; one psum adds the
    shards' results.

    Args:
      config: the model's numbers.
      num_stages, num_shards: pipeline stages and tensor shards.
      dtype: of the parameters.
      quantization: of the experts' matrices; "int8" or None.
      backend: name of the kernel backend; "pallas" computes the experts with kernels for GPUs, "xla" in a loop, and
        "reference" computes every expert for every token, which can be differentiated.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; the router as in transformers' Mixtral and
    Qwen3-MoE: a softmax in float32 over all experts, of which the most likely are kept; their probabilities are scaled
    to a sum of 1 if config.normalise_experts says so.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_stages: int,
        num_shards: int,
        dtype: jnp.dtype,
        quantization: str | None = None,
        backend: str = "xla",
    ):
        self.activation = config.activation
        self.backend = backend
        self.num_chosen = config.experts_per_token
        self.normalise = config.normalise_experts
        count, size, ffn_size = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.num_local = count // num_shards

        def experts(out_size: int, in_size: int, num_parts: int) -> tuple[nnx.Param, nnx.Param | None]:
            return weight_params(
                (num_stages, out_size * num_parts * count, in_size),
                dtype,
                quantization=quantization,
                spec=COLUMN_PARALLEL,
                parts=(FusedPart(out_size),) * num_parts * count,
                whole_parts=True,
            )

        self.router = nnx.Param(jnp.zeros((num_stages, count, size), dtype), spec=PER_STAGE)
        self.gate_up, self.gate_up_scale = experts(ffn_size, size, 2)
        self.down, self.down_scale = experts(size, ffn_size, 1)

    def __call__(
        self, x: Float[Array, "T D"], live: Bool[Array, " T"], taps: SiteTaps = NO_TAPS
    ) -> Float[Array, "T D"]:
        """Maps [T, D] to [T, D]; tokens that are not live (padding) cost no expert and come out as zeros.

        Site of the layer's taps: "mlp.router" [T, E], the probabilities of all experts before any is chosen.
        """
        shares, expert_ids = self._routes(x, taps)
        local = expert_ids - tensor_shard() * self.num_local
        here = (local >= 0) & (local < self.num_local) & live[:, None]
        gate_up = self.gate_up[0].reshape(self.num_local, -1, x.shape[1])
        down = self.down[0].reshape(self.num_local, x.shape[1], -1)
        scales = None
        if self.gate_up_scale is not None and self.down_scale is not None:
            scales = ExpertScales(
                *(scale[0].reshape(self.num_local, -1) for scale in (self.gate_up_scale, self.down_scale))
            )
        compute = {"pallas": expert_groups, "reference": expert_dense}.get(self.backend, expert_loop)
        y = compute(
            x,
            jnp.where(here, local, self.num_local),
            jnp.where(here, shares, 0.0),
            gate_up,
            down,
            gate=ACTIVATIONS[self.activation],
            scales=scales,
        )
        return sum_over_tensor(y.astype(x.dtype))

    def _routes(self, x: Float[Array, "T D"], taps: SiteTaps) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
        """The K most likely experts of every token, and the factor (share) of each one's output."""
        probabilities = nnx.softmax(project(x, self.router[0]).astype(jnp.float32), axis=-1)
        shares, expert_ids = lax.top_k(taps("mlp.router", probabilities), self.num_chosen)
        if self.normalise:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        return shares, expert_ids


def expert_dense(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Num[Array, "E G D"],
    down: Num[Array, "E D F"],
    *,
    gate: Callable[[Array], Array],
    scales: ExpertScales | None = None,
) -> Float[Array, "T D"]:
    """Computes every expert for every token; the plain oracle of expert_loop and of kernels/pallas_experts.py.

    Args:
      x: tokens.
      expert_ids: the K experts of each token, as indices into E; E itself stands for no expert.
      shares: float32, the factor of each of these experts' outputs.
      gate_up, down: the experts' weights, G = 2 F.
      gate: activation of the gate.
      scales: of int8 weights; None for other weights.

    Returns:
      float32[T, D], each token's sum of shares times expert outputs.
    """
    weights = jnp.zeros((x.shape[0], gate_up.shape[0]), jnp.float32)
    weights = weights.at[jnp.arange(x.shape[0])[:, None], expert_ids].add(shares, mode="drop")
    compute = functools.partial(_expert_output, gate_up=gate_up, down=down, gate=gate, scales=scales)
    outputs = [compute(x, expert) for expert in range(gate_up.shape[0])]
    return jnp.einsum("etd,te->td", jnp.stack(outputs).astype(jnp.float32), weights)


def expert_loop(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Num[Array, "E G D"],
    down: Num[Array, "E D F"],
    *,
    gate: Callable[[Array], Array],
    scales: ExpertScales | None = None,
) -> Float[Array, "T D"]:
    """Computes expert_dense in a loop over blocks of tokens that share an expert, with no work for idle experts.

    With 32 experts of 512 x 1024, four of them per token, two CPU cores take 0.7, 11 and 47 ms for 1, 32 and 256
    tokens, where jax.lax.ragged_dot takes 97, 163 and 636 ms. Arguments and result are those of expert_dense.
    """
    num_tokens, num_chosen = expert_ids.shape
    num_experts = gate_up.shape[0]
    compute = functools.partial(_expert_output, gate_up=gate_up, down=down, gate=gate, scales=scales)
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
        added = compute(x[rows], expert).astype(jnp.float32) * factor[:, None]
        own = (start + jnp.arange(size) < counts[expert])[:, None]  # the rest of the block is the next expert's tokens
        return y.at[rows].add(jnp.where(own, added, 0.0))

    return lax.fori_loop(0, ends[-1], add_block, jnp.zeros(x.shape, jnp.float32))


def _expert_output(
    x: Float[Array, "T D"],
    expert: int | Int[Array, ""],
    *,
    gate_up: Num[Array, "E G D"],
    down: Num[Array, "E D F"],
    gate: Callable[[Array], Array],
    scales: ExpertScales | None,
) -> Float[Array, "T D"]:
    """One expert's output for all tokens."""
    gate_up_scale, down_scale = (None, None) if scales is None else (scale[expert] for scale in scales)
    hidden = gated(project(x, gate_up[expert], gate_up_scale), gate)
    return project(hidden, down[expert], down_scale)


def _by_expert(expert_ids: Int[Array, "T K"], num_experts: int) -> tuple[Int[Array, " J"], Int[Array, " E"]]:
    """Flat indices of the (token, choice) pairs sorted by expert, pairs without one last; and each expert's count."""
    flat = expert_ids.ravel()
    return jnp.argsort(flat, stable=True), jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
