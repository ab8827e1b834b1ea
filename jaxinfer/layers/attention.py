"""Grouped-query self-attention over the paged cache.

Owns: projections, rotation, the cache write and the split of a step's tokens into its two segments.
Does not know: how a segment's attention is computed (kernels/), who the rows are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.communication.collectives import stage_value
from jaxinfer.config import ModelConfig
from jaxinfer.kernels.paged_attention import paged_attention
from jaxinfer.kernels.pallas_heads import HeadNorm, rotate_and_write
from jaxinfer.layers import kv_cache, rope
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.layers.linear import ColumnParallelLinear, Norm, RowParallelLinear, Rows
from jaxinfer.layers.norm import RMSNorm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segment:
    """One rectangle of tokens: R rows of Q queries each, the last q_len positions of every row.

    Args:
      page_table: int32[R, W] pages of each row in order.
      kv_len: int32[R] positions with keys once this step has written its own.
      q_len: int32[R] live queries; the rest of Q is padding.
      owner: int32[R] whose each row is; neighbouring rows of one owner are pieces of one prompt.
      num_queries: Q.
    """

    page_table: Int[Array, "R W"]
    kv_len: Int[Array, " R"]
    q_len: Int[Array, " R"]
    owner: Int[Array, " R"]
    num_queries: int = field(metadata={"static": True})

    @property
    def num_tokens(self) -> int:
        """R * Q."""
        return self.kv_len.shape[0] * self.num_queries


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenBatch:
    """The T tokens of one step, segment after segment, and where each belongs.

    Args:
      positions: int32[T], of each token in its text.
      pages, offsets: int32[T], where the token's key and value are stored; the dump page for padding.
      segments: the rectangles, in the order of the tokens.
    """

    positions: Int[Array, " T"]
    pages: Int[Array, " T"]
    offsets: Int[Array, " T"]
    segments: tuple[Segment, ...]

    @property
    def live(self) -> Bool[Array, " T"]:
        """Which tokens are no padding."""
        return self.pages != kv_cache.DUMP_PAGE


_ALL = 2**30
"""A window that no text exceeds, for stages without one beside stages with one."""


class Attention(nnx.Module):
    """Self-attention with fused QKV; per shard N / tp query heads and K / tp kv heads, or one that others hold too.

    Args:
      config: the model's numbers.
      num_stages, num_shards: pipeline stages and tensor shards.
      kv_copies: shards that hold the same kv head.
      windows: tokens each query sees, itself included, by stage; None for all.
      backend: of paged_attention and of the linear layers.
      dtype: of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_stages: int,
        num_shards: int,
        kv_copies: int,
        windows: tuple[int | None, ...],
        backend: str,
        dtype: jnp.dtype,
    ):
        self.head_dim = config.head_dim
        self.num_heads = config.num_heads // num_shards
        self.num_kv_heads = config.num_kv_heads * kv_copies // num_shards
        self.windows = windows
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.softcap = config.attention_softcap
        self.backend = backend
        q_size = config.num_heads * config.head_dim
        kv_rows = Rows(config.num_kv_heads * config.head_dim, copies=kv_copies, unit=config.head_dim)
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            (Rows(q_size), kv_rows, kv_rows),
            num_stages=num_stages,
            dtype=dtype,
            bias=config.attention_bias,
            backend=backend,
        )
        self.out = RowParallelLinear(
            q_size,
            config.hidden_size,
            num_stages=num_stages,
            dtype=dtype,
            bias=config.attention_out_bias,
            backend=backend,
        )

        self.qk_norm = config.qk_norm

        def norm(projection: Rows) -> RMSNorm | None:
            if config.qk_norm == "none":
                return None
            whole = config.qk_norm == "projection"
            return RMSNorm(
                projection.size if whole else config.head_dim,
                eps=config.norm_eps,
                num_stages=num_stages,
                dtype=dtype,
                offset=config.norm_offset,
                sharded=projection if whole else None,
            )

        self.query_norm, self.key_norm = norm(Rows(q_size)), norm(kv_rows)

    def __call__(
        self,
        x: Float[Array, "T D"],
        cache: LayerCache,
        batch: TokenBatch,
        rotary: rope.RotaryTables | None,
        *,
        norm: Norm | None = None,
        post_norm: Norm | None = None,
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """Attends every token to its row's cache, which first receives the tokens' own keys and values.

        Args:
          x: residual stream.
          cache: of this layer.
          batch: the tokens.
          rotary: cos and sin of every token; None rotates nothing.
          norm: of what the block sees.
          post_norm: of what it adds.

        Returns:
          x + post_norm(attention(norm(x))), equal on all shards, and the written cache (aliases the donated one).
        """
        queries, cache = self._prepared(
            self.qkv(x, norm=norm).reshape(x.shape[0], -1, self.head_dim), cache, batch, rotary
        )
        attended, start, window = [], 0, self._window()
        for segment in batch.segments:
            rows = queries[start : start + segment.num_tokens]
            start += segment.num_tokens
            attended.append(
                paged_attention(
                    rows.reshape(-1, segment.num_queries, self.num_heads, self.head_dim),
                    cache.keys,
                    cache.values,
                    segment.page_table,
                    segment.kv_len,
                    segment.q_len,
                    scale=self.scale,
                    window=window,
                    softcap=self.softcap,
                    owner=segment.owner,
                    backend=self.backend,
                ).reshape(rows.shape[0], -1)
            )
        return self.out(jnp.concatenate(attended), residual=x, norm=post_norm), cache

    def _prepared(
        self, heads: Float[Array, "T M H"], cache: LayerCache, batch: TokenBatch, rotary: rope.RotaryTables | None
    ) -> tuple[Float[Array, "T N H"], LayerCache]:
        """Queries ready to attend, and the cache with the tokens' keys and values; both normed and rotated."""
        query_norm, key_norm = self.query_norm, self.key_norm
        if self.backend == "pallas" and self.qk_norm != "projection":
            norm = None
            if query_norm is not None and key_norm is not None:
                norm = HeadNorm(query_norm.weight[0], key_norm.weight[0], query_norm.eps, query_norm.offset)
            queries, keys, values = rotate_and_write(
                heads, cache.keys, cache.values, pages=batch.pages, offsets=batch.offsets, rotary=rotary, norm=norm
            )
            return queries, LayerCache(keys=keys, values=values)
        queries, keys, values = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        if query_norm is not None and key_norm is not None:
            queries, keys = self._normalised(queries, query_norm), self._normalised(keys, key_norm)
        if rotary is not None:
            queries, keys = rope.rotate(queries, rotary), rope.rotate(keys, rotary)
        return queries, kv_cache.write(cache, keys, values, pages=batch.pages, offsets=batch.offsets)

    def _window(self) -> int | Int[Array, ""] | None:
        if all(window is None for window in self.windows):
            return None
        return stage_value([_ALL if window is None else window for window in self.windows])

    def _normalised(self, heads: Float[Array, "T N H"], norm: RMSNorm) -> Float[Array, "T N H"]:
        if self.qk_norm == "head":
            return norm(heads)
        return norm(heads.reshape(heads.shape[0], -1)).reshape(heads.shape)
