"""The feed-forward blocks, with and without a gate.

Owns: down(act(gate(x)) * up(x)), with gate and up fused into one product, and down(act(up(x))).
Does not know: which norms and residual stream it is given; the linear layers apply them.
"""

from __future__ import annotations

import functools
from typing import Unpack

import jax
from flax import nnx

from jaxinfer.layers.linear import ColumnParallelLinear, FusedPart, LinearOptions, RowParallelLinear, gated
from jaxinfer.layers.residual import Norm, Stream, settled
from jaxinfer.layers.taps import NO_TAPS, SiteTaps, block_input, block_output

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """Gated feed-forward: one column-parallel product for gate and up, one row-parallel product for down.

    Args:
      hidden_size, ffn_size: D and F, summed over all shards.
      activation: of the gate, a name in config.ACTIVATIONS.
      **linear: of both linear layers.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, hidden_size: int, ffn_size: int, *, activation: str = "silu", **linear: Unpack[LinearOptions]):
        self.activation = activation
        self.gate_up = ColumnParallelLinear(hidden_size, (FusedPart(ffn_size), FusedPart(ffn_size)), **linear)
        self.down = RowParallelLinear(ffn_size, hidden_size, **linear)

    def __call__(
        self,
        stream: Stream,
        *,
        norm: Norm | None = None,
        post_norm: Norm | None = None,
        taps: SiteTaps = NO_TAPS,
    ) -> Stream:
        """Returns x + post_norm(mlp(norm(x))), where x is the residual stream and a norm that is None is left out.

        Sites of the layer's taps: "mlp.input" [T, D], after the norm; "mlp.gate" [T, F], after the activation;
        "mlp.neurons" [T, F], what goes into the last product; "mlp.output" [T, D], what is added to x.
        """
        x, fed, norm = settled(stream, norm)
        fed, norm = block_input(taps, "mlp.input", fed, norm)
        activation = ACTIVATIONS[self.activation]
        if taps.touches("mlp.gate"):
            gate_up = self.gate_up(fed, norm=norm)
            hidden = gated(gate_up, lambda gate: taps("mlp.gate", activation(gate), is_sharded=True))
        else:
            hidden = self.gate_up(fed, norm=norm, gate=activation)
        hidden = taps("mlp.neurons", hidden, is_sharded=True)
        return self.down(hidden, residual=x, norm=post_norm, tap=block_output(taps, "mlp.output"))


class MLP(nnx.Module):
    """Feed-forward without a gate: one column-parallel product, the activation, one row-parallel product.

    The arguments are those of GatedMLP.

    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, hidden_size: int, ffn_size: int, *, activation: str, **linear: Unpack[LinearOptions]):
        self.activation = activation
        self.up = ColumnParallelLinear(hidden_size, (FusedPart(ffn_size),), **linear)
        self.down = RowParallelLinear(ffn_size, hidden_size, **linear)

    def __call__(
        self,
        stream: Stream,
        *,
        norm: Norm | None = None,
        post_norm: Norm | None = None,
        taps: SiteTaps = NO_TAPS,
    ) -> Stream:
        """Returns x + post_norm(mlp(norm(x))), where x is the residual stream and a norm that is None is left out.

        Sites of the layer's taps: GatedMLP's; "mlp.gate" and "mlp.neurons" are the same here.
        """
        x, fed, norm = settled(stream, norm)
        fed, norm = block_input(taps, "mlp.input", fed, norm)
        hidden = ACTIVATIONS[self.activation](self.up(fed, norm=norm))
        for site in ("mlp.gate", "mlp.neurons"):
            hidden = taps(site, hidden, is_sharded=True)
        return self.down(hidden, residual=x, norm=post_norm, tap=block_output(taps, "mlp.output"))
