"""The plain oracle of paged attention: gathers every page and takes one dense softmax in float32.

Owns: the meaning of paged_attention's contract, in the simplest code.
Does not know: speed. Its memory grows with R * W * C, so it serves small cases only: tests, `bench kernels`, and the
training of the demo model, since it can be differentiated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    sequence_id: Int[Array, " R"] | None = None,
) -> Float[Array, "R Q N H"]:
    """Attends over gathered pages with one dense float32 softmax.

    Args: as in `jaxinfer.kernels.paged_attention.paged_attention`.

    Returns:
        Float[R, Q, N, H] in q's dtype.

    Source: Vaswani et al. 2017, section 3.2.1; sinks as in transformers' `gpt_oss/modeling_gpt_oss.py`.
    """
    num_queries, num_heads = q.shape[1:3]
    num_kv_heads, page_size = k_pages.shape[1:3]
    position = jnp.arange(page_table.shape[1] * page_size)  # [S]
    live = position < kv_len[:, None]  # [R, S]

    def gathered(pages: Float[Array, "P K C H"]) -> Float[Array, "R S N H"]:
        rows = pages[page_table].astype(jnp.float32).swapaxes(2, 3)  # [R, W, C, K, H]
        rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])  # [R, S, K, H]
        rows = jnp.where(live[:, :, None, None], rows, 0.0)  # 0 * NaN is NaN: values need the mask too
        return jnp.repeat(rows, num_heads // num_kv_heads, axis=2)

    query = jnp.arange(num_queries)
    query_position = (kv_len - q_len)[:, None] + query  # [R, Q]
    visible = live[:, None, :] & (position <= query_position[..., None])  # [R, Q, S]
    if window is not None:
        visible &= position > query_position[..., None] - window
    visible &= (query < q_len[:, None])[..., None]

    highest = jax.lax.Precision.HIGHEST
    score = jnp.einsum("rqnh,rsnh->rnqs", q.astype(jnp.float32), gathered(k_pages), precision=highest) * scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    score = jnp.where(visible[:, None], score, -jnp.inf)
    top = score.max(axis=-1, keepdims=True, initial=-1e30)  # finite, so that a query which sees nothing gives zeros
    sink = jnp.full((1, 1, 1), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)[:, None, None]
    top = jnp.maximum(top, sink)
    weight = jnp.exp(score - top)
    total = weight.sum(axis=-1, keepdims=True) + jnp.exp(sink - top)
    weight = jnp.where(total > 0, weight / total, 0.0)
    return jnp.einsum("rnqs,rsnh->rqnh", weight, gathered(v_pages), precision=highest).astype(q.dtype)
