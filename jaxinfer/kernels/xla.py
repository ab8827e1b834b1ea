"""Paged attention in plain JAX operations: a loop over live pages with an online softmax, several rows at a time.

Owns: the backend that is fast on CPUs and right on every platform.
Does not know: when it is chosen (kernels/paged_attention.py does).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_LEAST = -1e30  # finite: exp(_LEAST - _LEAST) is 1, where -inf would give NaN
# Rows and queries of one group, by measurement. With fewer, the cost of starting each XLA operation dominates; with
# more rows, a long row makes its short neighbours wait for steps in which they do nothing.
_MAX_ROWS = 32
_MAX_QUERIES = 1024


def paged_attention_xla(
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
) -> Float[Array, "R Q N H"]:
    """Attends page by page: those of the sink tokens, then from the first page inside the window to the last live one.

    Rows are sorted by their number of pages and cut into groups. Each step of the loop takes the next page of every row
    of one group, so a group takes as many steps as its longest row has pages; after sorting, the rows of a group differ
    little. Grouping changes a row's result by rounding only.

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

    size = min(num_rows, _MAX_ROWS, max(1, _MAX_QUERIES // num_queries))  # rows of a group, B below
    num_groups = -(-num_rows // size)
    num_sinks = 0 if window is None else -(-sink_tokens // page_size)  # pages
    first = jnp.zeros_like(kv_len)  # the first page behind those of the sinks
    if window is not None:
        first = jnp.maximum(jnp.maximum(kv_len - q_len - window + 1, 0) // page_size, num_sinks)
    num_live = -(-kv_len // page_size)
    num_pages = jnp.minimum(num_sinks, num_live) + jnp.maximum(num_live - first, 0)
    order = jnp.arange(num_rows) if num_groups == 1 else jnp.argsort(num_pages)
    slot = jnp.argsort(order)
    order = jnp.pad(order, (0, num_groups * size - num_rows), mode="edge")
    q_packed = q.reshape(num_rows, num_queries, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q_packed = q_packed.reshape(num_rows, num_kv_heads, group * num_queries, head_dim)
    rows = tuple(x[order] for x in (q_packed, page_table, first, kv_len, q_len))
    num_steps = num_pages[order].reshape(num_groups, size).max(axis=1)
    last_step = jnp.cumsum(num_steps)

    def attend_page(step, carry):
        index = jnp.sum(step >= last_step) if num_groups > 1 else 0  # the group at work
        group_rows = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * size, size), (rows, carry))
        (q, table, first, kv_len, q_len), (top, total, out) = group_rows
        number = step - (last_step - num_steps)[index]
        page = first + number  # [B]
        if window is not None:
            page = jnp.where(number < num_sinks, number, page - num_sinks)
        page_id = jnp.take_along_axis(table, jnp.minimum(page, table.shape[1] - 1)[:, None], axis=1)[:, 0]
        page_id = jnp.where(page * page_size < kv_len, page_id, 0)
        k = k_pages.at[page_id].get(mode="promise_in_bounds")  # [B, K, C, H]
        v = v_pages.at[page_id].get(mode="promise_in_bounds")
        position = page[:, None] * page_size + jnp.arange(page_size)  # [B, C]
        live = position < kv_len[:, None]
        query_position = (kv_len - q_len)[:, None] + query  # [B, G*Q]
        visible = live[:, None] & (position[:, None] <= query_position[..., None])
        visible &= (query < q_len[:, None])[..., None]
        if window is not None:
            near = position[:, None] > query_position[..., None] - window
            visible &= near | (position < sink_tokens)[:, None]
        visible = visible[:, None]  # [B, 1, G*Q, C]
        order = "bkch,bkqh->bkcq" if num_queries == 1 else "bkqh,bkch->bkqc"
        lhs, rhs = (k, q) if num_queries == 1 else (q, k)
        # For one query, XLA's dot with keys first takes half the time of the other order; for many, queries first wins.
        score = jnp.einsum(order, lhs, rhs, precision=precision, preferred_element_type=jnp.float32) * scale
        score = score.swapaxes(2, 3) if num_queries == 1 else score  # [B, K, G*Q, C]
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
        new = (new_top, total * decay + weight.sum(axis=-1), out * decay[..., None] + gain)
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, index * size, axis=0), carry, new)

    top = jnp.broadcast_to(top0, (num_groups * size, *top0.shape))
    total = jnp.full_like(top, 0.0 if sinks is None else 1.0)
    out = jnp.zeros((*top.shape, head_dim), jnp.float32)
    _, total, out = lax.fori_loop(0, last_step[-1], attend_page, (top, total, out))
    out = (out * jnp.where(total > 0, 1.0 / total, 0.0)[..., None])[slot]
    out = out.reshape(num_rows, num_kv_heads, group, num_queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)
