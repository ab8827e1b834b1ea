"""Ready-made interventions, for SamplingParams(interventions=[...]).

Owns: the functions that they call for each token.
Does not know: sites, how an intervention is put into a program.

Each is bound to a site and to parameters by `at`: `add.at("layers.3.residual", vector=direction, scale=4.0)`. The
parameters may differ from request to request; a hundred requests with different vectors run in one program.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.interventions import intervention
from jaxinfer.layers.taps import InterventionContext

Value = Float[Array, "..."]


@intervention
def add(x: Value, context: InterventionContext, *, vector: Value, scale: Float[Array, ""] | float = 1.0) -> Value:
    """x + scale * vector; steering, where the vector is a direction in the residual stream.

    Source: Turner et al. 2023, "Activation Addition"; Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation
    Addition".
    """
    return x + scale * vector


@intervention
def scale(x: Value, context: InterventionContext, *, factor: Value) -> Value:
    """x * factor, where the factor is a number, or has an entry for each head or feature."""
    return x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))


@intervention
def ablate(x: Value, context: InterventionContext, *, index: Int[Array, "..."], value: Value | float = 0.0) -> Value:
    """Sets some heads (at a site of heads) or features to a value: zeros, or a mean that was measured.

    Parameters:
      index: numbers along the first axis of a token's value, one or several. Numbers below 0 or beyond the end name
        nothing.
      value: for all of them, or of x's shape, from which their entries are taken.
    """
    chosen = (jnp.arange(x.shape[0])[:, None] == jnp.atleast_1d(index)).any(axis=1)
    return jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), value, x)


@intervention
def project_out(x: Value, context: InterventionContext, *, direction: Value) -> Value:
    """x without its component along a direction (along the last axis of both), whatever the direction's length.

    Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction".
    """
    unit = direction / jnp.maximum(jnp.linalg.norm(direction, axis=-1, keepdims=True), 1e-12)
    return x - (x * unit).sum(axis=-1, keepdims=True) * unit


@intervention(per_token=("source", "mask"))
def patch(x: Value, context: InterventionContext, *, source: Value, mask: Bool[Array, ""] | bool = True) -> Value:
    """Puts captured values in the place of x: those of another prompt, say, to see what they carry over.

    Parameters:
      source: [tokens, ...], what out.captures[site] has; its first entry takes the place of the first token chosen by
        `tokens`.
      mask: bool[tokens], which of these tokens are changed.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (causal tracing).
    """
    if source.shape != x.shape:
        raise ValueError(f"source must be [tokens, ...] of values like x, {x.shape}, got {source.shape} for a token")
    return jnp.where(mask, source, x)


@intervention
def clamp_feature(
    x: Float[Array, " D"],
    context: InterventionContext,
    *,
    encoder: Float[Array, "D F"],
    encoder_bias: Float[Array, " F"],
    decoder: Float[Array, "F D"],
    feature: Int[Array, ""],
    value: Float[Array, ""],
    input_bias: Float[Array, " D"] | float = 0.0,
) -> Float[Array, " D"]:
    """Sets a feature of a sparse autoencoder to a value, and leaves what the autoencoder does not explain as it is.

    The feature's activation is relu((x - input_bias) . encoder[:, feature] + encoder_bias[feature]); x moves along
    decoder[feature] by as much as is missing to the value. Give the weights once, for all requests:
    `sae = clamp_feature.with_constants(encoder=.., encoder_bias=.., decoder=..)`, then `sae.at(site, feature=7,
    value=10.0)`.

    Source: Templeton et al. 2024, "Scaling Monosemanticity", section on feature steering.
    """
    activation = jnp.maximum((x - input_bias) @ encoder[:, feature] + encoder_bias[feature], 0.0)
    return x + (value - activation) * decoder[feature]
