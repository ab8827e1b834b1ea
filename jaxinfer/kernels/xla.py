"""Paged attention in plain JAX operations: a loop over live pages with an online softmax, several rows at a time.

Owns: the backend that is fast on CPUs and right on every platform.
Does not know: when it is chosen (kernels/paged_attention.py does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_LEAST = -1e30  # finite: exp(_LEAST - _LEAST) is 1, where -inf would give NaN
# Rows and queries of one group, by measurement. With fewer, the cost of starting each XLA operation dominates; with
# more rows, a long row makes its short neighbours wait for steps in which they do nothing.
_MAX_ROWS = 32
_MAX_QUERIES = 1024


class _Rows(NamedTuple):
    """Rows that walk over their pages in step, B of them.

    Args:
      queries: [B, K, J, H], the J = G * Q queries of each kv head, those of its first query head first.
      last_seen: [B, J], the last position that a query sees; -1 for a padding query, which sees nothing.
      page_ids: [B, S], the id of the page that a row takes in each step; page 0 behind its last one.
      skipped: [B], how many pages of its text a row skips: those behind the sink tokens and in front of the window.
      num_pages: [B], the pages that a row takes.
      kv_len: [B], positions of the row.
    """

    queries: Float[Array, "B K J H"]
    last_seen: Int[Array, "B J"]
    page_ids: Int[Array, "B S"]
    skipped: Int[Array, " B"]
    num_pages: Int[Array, " B"]
    kv_len: Int[Array, " B"]


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

    Each step of the loop takes the next page of every row, so there are as many steps as the longest row has pages.
    Many rows are cut into groups of about the same length, each with a loop of its own; that changes a row's result by
    rounding only.

    Args: as in `jaxinfer.kernels.paged_attention.paged_attention`.

    Returns:
        Float[R, Q, N, H] in q's dtype.

    Source: online softmax, Milakov and Gimelshein 2018, algorithm 3.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    group = num_heads // num_kv_heads
    num_sinks = 0 if window is None else -(-sink_tokens // page_size)  # pages
    top = jnp.full(num_heads, _LEAST) if sinks is None else sinks.astype(jnp.float32)
    top = jnp.repeat(top.reshape(num_kv_heads, group), num_queries, axis=1)  # [K, J]

    def sees(position: Int[Array, "#B C"], last_seen: Int[Array, "B J"]) -> Bool[Array, "B J C"]:
        position, last = position[:, None], last_seen[..., None]
        if window is None:
            return position <= last
        return (position <= last) & ((position > last - window) | (position < sink_tokens))

    def attend(rows: _Rows) -> Float[Array, "B K J H"]:
        def take_page(step: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
            page_id, top, total, out = carry
            # The next page is looked up one step ahead: in the same step, XLA's CPU backend would repeat the lookup
            # for every number that it gathers, which then takes twice as long.
            next_id = lax.dynamic_index_in_dim(rows.page_ids, step + 1, 1, keepdims=False)
            k, v = (pages.at[page_id].get(mode="promise_in_bounds") for pages in (k_pages, v_pages))  # [B, K, C, H]
            page = step if window is None else jnp.where(step < num_sinks, step, step + rows.skipped)
            position = page.reshape(-1, 1) * page_size + jnp.arange(page_size)  # [1, C] or [B, C]
            visible = sees(position, rows.last_seen)[:, None]
            score = _scores(rows.queries, k, scale=scale, keys_first=num_queries == 1)
            score = score if softcap is None else softcap * jnp.tanh(score / softcap)
            score = jnp.where(visible, score, _LEAST)
            new_top = jnp.maximum(top, score.max(axis=-1))
            weight = jnp.where(visible, jnp.exp(score - new_top[..., None]), 0.0)
            decay = jnp.exp(top - new_top)
            v = jnp.where((position < rows.kv_len[:, None])[:, None, :, None], v, 0)  # 0 * NaN is NaN
            gain = _product("bkjc,bkch->bkjh", weight.astype(v.dtype), v)
            return next_id, new_top, total * decay + weight.sum(axis=-1), out * decay[..., None] + gain

        tops = jnp.broadcast_to(top, (rows.kv_len.size, *top.shape))
        totals = jnp.full_like(tops, 0.0 if sinks is None else 1.0)
        out = jnp.zeros((*tops.shape, head_dim), jnp.float32)
        carry = (rows.page_ids[:, 0], tops, totals, out)
        *_, totals, out = lax.fori_loop(0, rows.num_pages.max(), take_page, carry)
        return out * jnp.where(totals > 0, 1.0 / totals, 0.0)[..., None]

    queries = q.reshape(num_rows, num_queries, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(num_rows, num_kv_heads, group * num_queries, head_dim)
    first = jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - q_len - window + 1, 0) // page_size
    sizes = {"page_size": page_size, "num_queries": num_queries, "num_sinks": num_sinks}
    rows = _rows(queries, page_table, kv_len, q_len, first=first, **sizes)
    size = min(num_rows, _MAX_ROWS, max(1, _MAX_QUERIES // num_queries))
    out = attend(rows) if size == num_rows else _by_groups(attend, rows, size)
    out = out.reshape(num_rows, num_kv_heads, group, num_queries, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)


def _rows(
    queries: Float[Array, "R K J H"],
    page_table: Int[Array, "R W"],
    kv_len: Int[Array, " R"],
    q_len: Int[Array, " R"],
    *,
    page_size: int,
    num_queries: int,
    num_sinks: int | Int[Array, ""],
    first: Int[Array, " R"],
) -> _Rows:
    """The rows with the pages that each of them takes: those of the sink tokens, then all from `first` on."""
    num_live = -(-kv_len // page_size)
    skipped = jnp.maximum(first - num_sinks, 0)
    step = jnp.arange(page_table.shape[1] + 1)  # one more than the most, since each step looks up the next one's page
    page = jnp.where(step < num_sinks, step, step + skipped[:, None])
    page_id = jnp.take_along_axis(page_table, jnp.minimum(page, page_table.shape[1] - 1), axis=1)
    query = jnp.tile(jnp.arange(num_queries), queries.shape[2] // num_queries)  # [J]
    return _Rows(
        queries=queries,
        last_seen=jnp.where(query < q_len[:, None], (kv_len - q_len)[:, None] + query, -1),
        page_ids=jnp.where(page < num_live[:, None], page_id, 0),
        skipped=skipped,
        num_pages=jnp.minimum(num_sinks, num_live) + jnp.maximum(num_live - num_sinks - skipped, 0),
        kv_len=kv_len,
    )


def _by_groups(attend: Callable[[_Rows], Array], rows: _Rows, size: int) -> Float[Array, "R K J H"]:
    """Sorts the rows by their number of pages and attends `size` at a time, so that few wait for a longer neighbour."""
    num_rows = rows.kv_len.shape[0]
    num_groups = -(-num_rows // size)
    order = jnp.argsort(rows.num_pages)
    padded = jnp.pad(order, (0, num_groups * size - num_rows), mode="edge")
    out = lax.map(attend, jax.tree.map(lambda x: x[padded].reshape(num_groups, size, *x.shape[1:]), rows))
    return out.reshape(num_groups * size, *out.shape[2:])[jnp.argsort(order)]


def _scores(
    q: Float[Array, "B K J H"], k: Float[Array, "B K C H"], *, scale: float, keys_first: bool
) -> Float[Array, "B K J C"]:
    """The scaled products of queries and keys. With one query, XLA's CPU backend takes half the time keys first.

    The scaling stands before the exchange of axes, which XLA would otherwise undo by exchanging the operands.
    """
    if keys_first:
        return (scale * _product("bkch,bkjh->bkcj", k, q)).swapaxes(2, 3)
    return scale * _product("bkjh,bkch->bkjc", q, k)


def _product(dims: str, a: Array, b: Array) -> Float[Array, "..."]:
    """An einsum with a float32 result; float32 is multiplied in full float32 on every platform."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(dims, a, b, precision=precision, preferred_element_type=jnp.float32)
