"""Grouped-query self-attention over the paged cache.

Owns: the projections, the rotation, the write to the cache.
Does not know: how attention is computed (kernels/ does), nor which requests the tokens belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.communication.collectives import stage_value
from jaxinfer.config.attention_span import MAX_WINDOW, AttentionSpan
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.kernels.paged_attention import is_built_in, segmented_attention, segmented_weights
from jaxinfer.kernels.pallas_heads import HeadNorm, rotate_and_write
from jaxinfer.kernels.segment import Segment
from jaxinfer.layers import kv_cache, rope
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.layers.linear import ColumnParallelLinear, FusedPart, LinearOptions, RowParallelLinear
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.residual import Norm, Stream, settled
from jaxinfer.layers.taps import NO_TAPS, SiteTaps, block_input, block_output


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenBatch:
    """The T tokens of one step, all segments concatenated, and the place of each token.

    Args:
      positions: int32[T], index of each token in its text.
      pages, offsets: int32[T], the page and the offset in it where each token's key and value are stored. Padding
        tokens have the dump page.
      segments: the segments, in the order in which their tokens are concatenated.
      taps: what happens at the sites of the model.
    """

    positions: Int[Array, " T"]
    pages: Int[Array, " T"]
    offsets: Int[Array, " T"]
    segments: tuple[Segment, ...]
    taps: SiteTaps = field(default=NO_TAPS, metadata={"static": True})

    @property
    def live(self) -> Bool[Array, " T"]:
        """Which tokens are real, that is, not padding."""
        return self.pages != kv_cache.DUMP_PAGE


class _Seen(TypedDict):
    """The keywords by which kernels know what a query sees."""

    window: int | Int[Array, ""] | None
    sink_tokens: int | Int[Array, ""]


class Attention(nnx.Module):
    """Self-attention with one fused product for queries, keys and values.

    Each of the tp tensor shards has N / tp query heads and K / tp kv heads. With more shards than kv heads, it has one
    kv head, of which tp / K shards hold a copy.

    Args:
      config: the model's numbers.
      num_shards: tensor shards.
      kv_copies: how many shards hold the same kv head; 1 unless shards outnumber the kv heads.
      spans: for every stage, which positions a query sees.
      **linear: of both linear layers; num_stages and dtype are those of the head norms as well, backend is
        paged_attention's as well.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_shards: int,
        kv_copies: int,
        spans: tuple[AttentionSpan, ...],
        **linear: Unpack[LinearOptions],
    ):
        self.head_dim = config.head_dim
        self.num_heads = config.num_heads // num_shards
        self.num_kv_heads = config.num_kv_heads * kv_copies // num_shards
        self.kv_copies = kv_copies
        self.spans = spans
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.softcap = config.attention_softcap
        self.backend = linear["backend"]
        q_size = config.num_heads * config.head_dim
        kv_part = FusedPart(config.num_kv_heads * config.head_dim, copies=kv_copies, unit=config.head_dim)
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            (FusedPart(q_size), kv_part, kv_part),
            bias=config.attention_bias,
            **linear,
        )
        self.out = RowParallelLinear(
            q_size,
            config.hidden_size,
            bias=config.attention_out_bias,
            **linear,
        )

        self.qk_norm = config.qk_norm

        def norm(projection: FusedPart) -> RMSNorm | None:
            if config.qk_norm == "none":
                return None
            whole = config.qk_norm == "projection"
            return RMSNorm(
                projection.size if whole else config.head_dim,
                eps=config.norm_eps,
                num_stages=linear["num_stages"],
                dtype=linear["dtype"],
                offset=config.norm_offset,
                sharded=projection if whole else None,
            )

        self.query_norm, self.key_norm = norm(FusedPart(q_size)), norm(kv_part)

    def __call__(
        self,
        stream: Stream,
        cache: LayerCache,
        batch: TokenBatch,
        rotary: rope.RotaryTables | None,
        *,
        norm: Norm | None = None,
        post_norm: Norm | None = None,
        taps: SiteTaps = NO_TAPS,
    ) -> tuple[Stream, LayerCache]:
        """Writes the tokens' keys and values to the cache, then lets every token attend to its row's cached positions.

        Args:
          stream: residual stream, x below.
          cache: this layer's keys and values.
          batch: the tokens of the step.
          rotary: cos and sin of every token's angles; None for no rotation.
          norm: applied to x before the block; None for none.
          post_norm: applied to the block's output before it is added to x; None for none.
          taps: of the layer. Sites: "attention.input" [T, D], after the norm; "attention.queries" [T, N, H] and
            "attention.keys", "attention.values" [T, K, H], as projected, before head norms and rotation;
            "attention.probs" [T, N, S], recomputed from the cache (but not with an attention function of the user's);
            "attention.heads" [T, N, H], each head's result; "attention.output" [T, D], what is added to x.

        Returns:
          x + post_norm(attention(norm(x))), equal on all shards, and the written cache. The cache is written in place
          where its arrays are donated.
        """
        x, fed, norm = settled(stream, norm)
        fed, norm = block_input(taps, "attention.input", fed, norm)
        heads = self._tapped(self.qkv(fed, norm=norm).reshape(x.shape[0], -1, self.head_dim), taps)
        queries, cache = self._prepared(heads, cache, batch, rotary)
        if is_built_in(self.backend) and taps.touches("attention.probs"):
            weights = segmented_weights(
                queries, cache.keys, batch.segments, scale=self.scale, softcap=self.softcap, **self._seen()
            )
            taps("attention.probs", weights, is_sharded=True)
        attended = segmented_attention(
            queries,
            cache.keys,
            cache.values,
            batch.segments,
            scale=self.scale,
            softcap=self.softcap,
            backend=self.backend,
            **self._seen(),
        )
        attended = taps("attention.heads", attended, is_sharded=True).reshape(x.shape[0], -1)
        return self.out(attended, residual=x, norm=post_norm, tap=block_output(taps, "attention.output")), cache

    def _tapped(self, heads: Float[Array, "T M H"], taps: SiteTaps) -> Float[Array, "T M H"]:
        """The fused product after its three sites."""
        if not taps.touches("attention.queries", "attention.keys", "attention.values"):
            return heads
        queries, keys, values = self._split(heads)
        parts = [
            taps("attention.queries", queries, is_sharded=True),
            taps("attention.keys", keys, is_sharded=True, copies=self.kv_copies),
            taps("attention.values", values, is_sharded=True, copies=self.kv_copies),
        ]
        return jnp.concatenate(parts, axis=1)

    def _split(self, heads: Float[Array, "T M H"]) -> list[Float[Array, "T N H"]]:
        """Queries, keys and values of the fused product."""
        return jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)

    def _prepared(
        self, heads: Float[Array, "T M H"], cache: LayerCache, batch: TokenBatch, rotary: rope.RotaryTables | None
    ) -> tuple[Float[Array, "T N H"], LayerCache]:
        """Splits the fused product: the queries, normed and rotated, and the cache with the new keys and values.

        Keys are normed and rotated like queries; values are stored as they are. The "pallas" backend does it all in one
        kernel, except where the norm spans all heads of a projection.
        """
        query_norm, key_norm = self.query_norm, self.key_norm
        if self.backend == "pallas" and self.qk_norm != "projection":
            norm = None
            if query_norm is not None and key_norm is not None:
                norm = HeadNorm(query_norm.weight[0], key_norm.weight[0], query_norm.eps, query_norm.offset)
            queries, keys, values = rotate_and_write(
                heads, cache.keys, cache.values, pages=batch.pages, offsets=batch.offsets, rotary=rotary, norm=norm
            )
            return queries, LayerCache(keys=keys, values=values)
        queries, keys, values = self._split(heads)
        if query_norm is not None and key_norm is not None:
            queries, keys = self._normalised(queries, query_norm), self._normalised(keys, key_norm)
        if rotary is not None:
            queries, keys = rope.rotate(queries, rotary), rope.rotate(keys, rotary)
        return queries, kv_cache.write(cache, keys, values, pages=batch.pages, offsets=batch.offsets)

    def _seen(self) -> _Seen:
        """What a query sees on this stage; the longest window stands for none where only other stages have one."""
        if all(span.window is None for span in self.spans):
            return _Seen(window=None, sink_tokens=0)
        return _Seen(
            window=stage_value([MAX_WINDOW if span.window is None else span.window for span in self.spans]),
            sink_tokens=stage_value([span.sink_tokens for span in self.spans]),
        )

    def _normalised(self, heads: Float[Array, "T N H"], norm: RMSNorm) -> Float[Array, "T N H"]:
        if self.qk_norm == "head":
            return norm(heads)
        return norm(heads.reshape(heads.shape[0], -1)).reshape(heads.shape)
