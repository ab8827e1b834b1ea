"""Paged attention in plain JAX operations: a loop over live pages with an online softmax, several rows at a time.

Owns the speed on CPU and a right answer on every platform; knows nothing of who chose it.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_LEAST = -1e30  # finite: exp(_LEAST - _LEAST) is 1, where -inf would give NaN
_QUERIES_PER_STEP = 16  # measured: fewer leave XLA's calls dominant, more overflow the CPU's L2 cache


def paged_attention_xla(
    q: Float[Array, "R Q N H"],
    k_pages: Float[Array, "P K C H"],
    v_pages: Float[Array, "P K C H"],
    page_table: Int[Array, "R W"],
    kv_len: Int[Array, " R"],
    q_len: Int[Array, " R"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R Q N H"]:
    """Attends page by page, from the first page inside the window to the last live page.

    Rows are sorted by their number of pages and taken in groups, one page of every row of a group per step: a group
    stops at its longest row, and rows of a group differ little. A row's result does not depend on its group.

    Args: as in `jaxinfer.kernels.paged_attention.paged_attention`.

    Returns:
        Float[R, Q, N, H] in q's dtype.

    Source: online softmax, Milakov and Gimelshein 2018, algorithm 3.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    group = num_heads // num_kv_heads
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    top0 = jnp.full((num_heads,), _LEAST) if sinks is None else sinks.astype(jnp.float32)
    top0 = jnp.repeat(top0.reshape(num_kv_heads, group), num_queries, axis=1)  # [K, G*Q]
    query = jnp.tile(jnp.arange(num_queries), group)  # [G*Q]

    def attend_rows(rows):
        q, table, first, kv_len, q_len = rows
        size = q.shape[0]
        query_position = (kv_len - q_len)[:, None] + query  # [B, G*Q]
        end = -(-kv_len // page_size)

        def attend_page(i, carry):
            top, total, out = carry
            page = first + i  # [B]
            page_id = jnp.take_along_axis(table, jnp.minimum(page, table.shape[1] - 1)[:, None], axis=1)[:, 0]
            page_id = jnp.where(page < end, page_id, 0)
            k = k_pages.at[page_id].get(mode="promise_in_bounds")  # [B, K, C, H]
            v = v_pages.at[page_id].get(mode="promise_in_bounds")
            position = page[:, None] * page_size + jnp.arange(page_size)  # [B, C]
            live = position < kv_len[:, None]
            visible = live[:, None] & (position[:, None] <= query_position[..., None])
            visible &= (query < q_len[:, None])[..., None]
            if window is not None:
                visible &= position[:, None] > query_position[..., None] - window
            visible = visible[:, None]  # [B, 1, G*Q, C]
            # Keys first: XLA's dot takes half the time of the other order when the queries are few.
            score = jnp.einsum("bkch,bkqh->bkcq", k, q, precision=precision, preferred_element_type=jnp.float32)
            score = score.swapaxes(2, 3) * scale
            if softcap is not None:
                score = softcap * jnp.tanh(score / softcap)
            score = jnp.where(visible, score, _LEAST)
            new_top = jnp.maximum(top, score.max(axis=-1))
            weight = jnp.where(visible, jnp.exp(score - new_top[..., None]), 0.0)
            decay = jnp.exp(top - new_top)
            v = jnp.where(live[:, None, :, None], v, 0)  # 0 * NaN is NaN: values need the mask too
            gain = jnp.einsum(
                "bkqc,bkch->bkqh", weight.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
            )
            return new_top, total * decay + weight.sum(axis=-1), out * decay[..., None] + gain

        top = jnp.broadcast_to(top0, (size, *top0.shape))
        total = jnp.full_like(top, 0.0 if sinks is None else 1.0)
        out = jnp.zeros((*top.shape, head_dim), jnp.float32)
        _, total, out = lax.fori_loop(0, (end - first).max(), attend_page, (top, total, out))
        return out * jnp.where(total > 0, 1.0 / total, 0.0)[..., None]

    first = jnp.zeros_like(kv_len)
    if window is not None:
        first = jnp.maximum(kv_len - q_len - window + 1, 0) // page_size
    q_packed = q.reshape(num_rows, num_queries, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q_packed = q_packed.reshape(num_rows, num_kv_heads, group * num_queries, head_dim)
    rows = (q_packed, page_table, first, kv_len, q_len)

    size = min(num_rows, max(1, _QUERIES_PER_STEP // num_queries))
    if size == num_rows:
        out = attend_rows(rows)
    else:
        num_groups = -(-num_rows // size)
        order = jnp.argsort(-(-kv_len // page_size) - first)
        slot = jnp.argsort(order)
        order = jnp.pad(order, (num_groups * size - num_rows, 0))
        order = order.reshape(num_groups, size)
        out = lax.map(lambda ids: attend_rows(tuple(x[ids] for x in rows)), order)
        out = out.reshape(-1, *out.shape[2:])[slot + num_groups * size - num_rows]
    out = out.reshape(num_rows, num_kv_heads, group, num_queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)
