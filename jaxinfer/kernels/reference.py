"""The plain oracle of paged attention: gathers every page and takes one dense softmax in float32.

Owns: the meaning of paged_attention's contract, in the simplest code.
Does not know: speed. Its memory grows with R * W * C, so it serves small cases only: tests, `bench kernels`, and the
training of the demo model, since it can be differentiated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Visibility = Callable[[Array, Array], Array]
"""(positions of queries, positions of keys) -> bool, by broadcasting: which keys a query sees."""


def paged_attention_reference(
    q: Float[Array, "R Q N H"],
    k_pages: Float[Array, "P K C H"],
    v_pages: Float[Array, "P K C H"],
    page_table: Int[Array, "R W"],
    kv_len: Int[Array, " R"],
    q_len: Int[Array, " R"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    sink_tokens: int | Int[Array, ""] = 0,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    sequence_id: Int[Array, " R"] | None = None,
    visible: Visibility | None = None,
) -> Float[Array, "R Q N H"]:
    """Attends over gathered pages with one dense float32 softmax.

    Args: as in `jaxinfer.kernels.paged_attention.paged_attention`, and
        visible: a rule about which of the positions up to its own a query sees; None for all.

    Returns:
        Float[R, Q, N, H] in q's dtype.

    Source: Vaswani et al. 2017, section 3.2.1; sinks as in transformers' `gpt_oss/modeling_gpt_oss.py`.
    """
    weights = attention_weights_reference(
        q,
        k_pages,
        page_table,
        kv_len,
        q_len,
        scale=scale,
        window=window,
        sink_tokens=sink_tokens,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
    )
    values = _gathered(v_pages, page_table, kv_len, num_heads=q.shape[2])
    values = jnp.where(weights.any(axis=(1, 2))[..., None, None], values, 0.0)  # 0 * NaN is NaN
    return jnp.einsum("rnqs,rsnh->rqnh", weights, values, precision=jax.lax.Precision.HIGHEST).astype(q.dtype)


def attention_weights_reference(
    q: Float[Array, "R Q N H"],
    k_pages: Float[Array, "P K C H"],
    page_table: Int[Array, "R W"],
    kv_len: Int[Array, " R"],
    q_len: Int[Array, " R"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    sink_tokens: int | Int[Array, ""] = 0,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    visible: Visibility | None = None,
) -> Float[Array, "R N Q S"]:
    """The weights with which each query takes the values of all positions.

    Args: as paged_attention_reference's.

    Returns:
        Float32[R, N, Q, S], S = W * C; zeros where a query sees nothing.
    """
    num_queries, num_heads = q.shape[1:3]
    position = jnp.arange(page_table.shape[1] * k_pages.shape[2])  # [S]
    live = position < kv_len[:, None]  # [R, S]
    query = jnp.arange(num_queries)
    query_position = (kv_len - q_len)[:, None] + query  # [R, Q]
    seen = live[:, None, :] & (position <= query_position[..., None])  # [R, Q, S]
    if window is not None:
        seen &= (position > query_position[..., None] - window) | (position < sink_tokens)
    if visible is not None:
        seen &= visible(query_position[..., None], position)
    seen &= (query < q_len[:, None])[..., None]

    keys = _gathered(k_pages, page_table, kv_len, num_heads=num_heads)
    score = jnp.einsum("rqnh,rsnh->rnqs", q.astype(jnp.float32), keys, precision=jax.lax.Precision.HIGHEST) * scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    score = jnp.where(seen[:, None], score, -jnp.inf)
    top = score.max(axis=-1, keepdims=True, initial=-1e30)  # finite, so that a query which sees nothing gives zeros
    sink = jnp.full((1, 1, 1), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)[:, None, None]
    top = jnp.maximum(top, sink)
    weight = jnp.exp(score - top)
    total = weight.sum(axis=-1, keepdims=True) + jnp.exp(sink - top)
    return jnp.where(total > 0, weight / total, 0.0)


def _gathered(
    pages: Float[Array, "P K C H"], page_table: Int[Array, "R W"], kv_len: Int[Array, " R"], *, num_heads: int
) -> Float[Array, "R S N H"]:
    """The keys or values of each row's positions, for every query head; zeros from kv_len on."""
    rows = pages[page_table].astype(jnp.float32).swapaxes(2, 3)  # [R, W, C, K, H]
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])  # [R, S, K, H]
    live = jnp.arange(rows.shape[1]) < kv_len[:, None]
    rows = jnp.where(live[:, :, None, None], rows, 0.0)  # 0 * NaN is NaN: values need the mask too
    return jnp.repeat(rows, num_heads // pages.shape[1], axis=2)
