"""The paged KV cache: one array of keys and one of values per layer, written in place.

Owns: the layout of these arrays, [pp * P, K, C, H] with P pages for each of pp stages, the writes to them and copies of
pages. Page 0 of every stage is the dump page: padding tokens write there and nobody reads it.
Does not know: which request owns a page (engine/page_allocator.py does).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DUMP_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one local layer, each [pp * P, K, C, H]; per shard [P, K / tp, C, H].

    The pages of all stages share the first axis, one stage after the other. With a separate axis for stages, XLA's CPU
    backend copied the whole pool in steps of one token, since it fused the write with the removal of that axis.
    """

    keys: Float[Array, "P K C H"]
    values: Float[Array, "P K C H"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """Size of the whole cache.

    Args:
      num_layers: layers that each stage holds.
      num_stages: pipeline stages.
      num_pages: pages that each stage holds, the dump page included.
      num_kv_heads: K, summed over all shards.
      page_size: C, tokens in a page.
      head_dim: H.
    """

    num_layers: int
    num_stages: int
    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int

    def page_bytes(self, itemsize: int) -> int:
        """Bytes of one page number, keys and values, summed over all layers and devices.

        Args:
          itemsize: bytes of one number in the cache's dtype.
        """
        per_layer = self.num_stages * self.num_kv_heads * self.page_size * self.head_dim
        return 2 * self.num_layers * per_layer * itemsize


def empty(shape: CacheShape, dtype: jnp.dtype) -> list[LayerCache]:
    """A new cache, one LayerCache per local layer, filled with zeros."""
    pages = (shape.num_stages * shape.num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
    return [LayerCache(jnp.zeros(pages, dtype), jnp.zeros(pages, dtype)) for _ in range(shape.num_layers)]


def write(
    cache: LayerCache,
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    *,
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
) -> LayerCache:
    """Stores every token's key and value at its page and offset; in place when the cache is donated."""
    return LayerCache(
        keys=cache.keys.at[pages, :, offsets].set(keys, mode="promise_in_bounds"),
        values=cache.values.at[pages, :, offsets].set(values, mode="promise_in_bounds"),
    )


def copy_pages(cache: LayerCache, copies: Int[Array, "J 2"]) -> LayerCache:
    """Copies whole pages within a layer's cache.

    Args:
      cache: of one layer.
      copies: int32[J, 2], pairs (source page, destination page); (0, 0) is padding. All sources are read before any
        destination is written.
    """
    source, destination = copies[:, 0], copies[:, 1]

    def copied(pages: Array) -> Array:
        return pages.at[destination].set(pages[source], mode="promise_in_bounds")

    return LayerCache(keys=copied(cache.keys), values=copied(cache.values))
