"""The one decoder that every model family is built as; families differ only in their ModelConfig.

Owns: the order of steps in a layer, and of embedding, positions, layers, final norm and head in the model.
Does not know: files, config.json, checkpoint names, who makes the batches, sampling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import stage_value
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.layers import rope
from jaxinfer.layers.attention import Attention, TokenBatch
from jaxinfer.layers.embedding import PositionEmbedding, VocabularyEmbedding
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.layers.linear import LinearOptions
from jaxinfer.layers.mlp import MLP, GatedMLP
from jaxinfer.layers.moe import MixtureOfExperts
from jaxinfer.layers.norm import LayerNorm, RMSNorm
from jaxinfer.layers.residual import Norm, Stream, added, settled, total
from jaxinfer.layers.rope import RotaryTables
from jaxinfer.layers.taps import NO_TAPS, SiteTaps, block_input
from jaxinfer.models.layout import Layout


class DecoderLayer(nnx.Module):
    """One layer: x = x + attention(norm(x)), then x + mlp(norm(x)).

    That is ModelConfig.norm_places "before". With "after" each block's output is normalised instead of its input, with
    "both" input and output. The feed-forward (mlp) has a gate or none, or is a mixture of experts.

    Args:
      config, layout: as TransformerDecoder's.
      index: number of the layer within its stage. The parameters of layer `index` of all stages are stacked in this
        module.
    """

    def __init__(self, config: ModelConfig, layout: Layout, index: int):
        linear: LinearOptions = {
            "num_stages": layout.num_stages,
            "dtype": layout.dtype,
            "quantization": layout.quantization,
            "inputs_first": layout.inputs_first,
            "backend": layout.attention_backend,
        }

        def norm(place: str) -> Norm | None:
            is_here = config.norm_places in (place, "both")
            return make_norm(config, layout, num_stages=layout.num_stages) if is_here else None

        self.windows = layout.windows(config, index)
        self.attention_norm, self.mlp_norm = norm("before"), norm("before")
        self.attention_post_norm, self.mlp_post_norm = norm("after"), norm("after")
        self.attention = Attention(
            config,
            num_shards=layout.num_shards,
            kv_copies=layout.kv_copies(config),
            spans=layout.spans(config, index),
            **linear,
        )
        if layout.has_experts(config, index):
            self.mlp = MixtureOfExperts(
                config,
                num_stages=layout.num_stages,
                num_shards=layout.num_shards,
                dtype=layout.dtype,
                quantization=layout.quantization,
                backend=layout.attention_backend,
            )
        else:
            self.mlp = (GatedMLP if config.mlp_gate else MLP)(
                config.hidden_size, config.ffn_size, bias=config.mlp_bias, activation=config.activation, **linear
            )

    def __call__(
        self,
        stream: Stream,
        cache: LayerCache,
        batch: TokenBatch,
        rotary: RotaryTables | None,
        taps: SiteTaps,
    ) -> tuple[Stream, LayerCache]:
        """Runs this stage's layer; returns the new residual stream and the written cache.

        Args:
          stream: residual stream.
          cache: this layer's keys and values.
          batch: the tokens of the step.
          rotary: cos and sin of every token's angles; None for no rotation.
          taps: the layer's. Its own site is "residual" [T, D], the stream behind the layer; blocks have others.
        """
        stream, cache = self.attention(
            stream, cache, batch, rotary, norm=self.attention_norm, post_norm=self.attention_post_norm, taps=taps
        )
        if isinstance(self.mlp, MixtureOfExperts):
            x, fed, norm = settled(stream, self.mlp_norm)
            fed, norm = block_input(taps, "mlp.input", fed, norm)
            y = _normalised(self.mlp(_normalised(fed, norm), batch.live, taps), self.mlp_post_norm)
            stream = added(x, taps("mlp.output", y), backend=self.mlp.backend)
        else:
            stream = self.mlp(stream, norm=self.mlp_norm, post_norm=self.mlp_post_norm, taps=taps)
        return (taps("residual", total(stream)) if taps.touches("residual") else stream), cache


class TransformerDecoder(nnx.Module):
    """A decoder-only transformer, its layers divided among pipeline stages.

    layers[j] holds the j-th layer of every stage, stacked: with 8 layers on 2 stages, layers[1] holds layers 1 and 5 of
    the model.

    Args:
      config: the model's numbers; none of its fields is ignored.
      layout: mesh sizes, dtype, context length and attention backend.
    """

    def __init__(self, config: ModelConfig, layout: Layout):
        self.config = config
        self.max_model_len = layout.max_model_len
        num_devices = layout.num_stages * layout.num_shards

        def table() -> VocabularyEmbedding:
            return VocabularyEmbedding(
                config.vocab_size,
                config.hidden_size,
                num_shards=num_devices,
                dtype=layout.dtype,
                logit_softcap=config.logit_softcap,
                quantization=layout.quantization,
                backend=layout.attention_backend,
            )

        self.embedding = table()
        learned = config.rope is None
        self.positions = (
            PositionEmbedding(config.max_position_embeddings, config.hidden_size, dtype=layout.dtype)
            if learned
            else None
        )
        self.layers = nnx.List(
            [DecoderLayer(config, layout, index) for index in range(layout.layers_per_stage(config))]
        )
        self.norm = make_norm(config, layout, num_stages=None)
        self.lm_head = None if config.tie_word_embeddings else table()

    def embed(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Turns token ids into the residual stream, adding the position's vector where positions are learned."""
        x = self.embedding.embed(token_ids)
        # The scale is rounded to x's dtype before the product, as it was when the checkpoints were trained.
        x = x if self.config.embedding_scale == 1 else x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x if self.positions is None else x + self.positions(positions)

    def run_layers(
        self, x: Float[Array, "T D"], caches: Sequence[LayerCache], batch: TokenBatch
    ) -> tuple[Float[Array, "T D"], list[LayerCache]]:
        """Runs this stage's layers.

        Equal layers are traced and lowered once, as a function that is called for each of them. For 30 layers, that
        takes a quarter of the time. XLA inlines the calls before it optimises the program. With taps, which differ from
        layer to layer and keep what they see, every layer is traced by itself.

        Args:
          x: residual stream.
          caches: one per local layer.
          batch: the tokens of the step.

        Returns:
          The new residual stream and the written caches.
        """

        @functools.partial(jax.jit, static_argnums=0)
        def run_layer(structure: nnx.GraphDef, parameters: nnx.State, *arguments: Any) -> tuple[Stream, LayerCache]:
            return nnx.merge(structure, parameters)(*arguments, NO_TAPS)

        rotary, written = self._rotary(batch.positions), []
        stream: Stream = x
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            arguments = (stream, cache, batch, rotary(layer.windows))
            if batch.taps.are_active:
                stream, cache = layer(*arguments, batch.taps.layer(index))
            else:
                stream, cache = run_layer(*nnx.split(layer), *arguments)
            written.append(cache)
        return total(stream), written

    def _rotary(self, positions: Int[Array, " T"]) -> Callable[[Sequence[int | None]], RotaryTables | None]:
        """A function from a layer's windows (one per stage) to its rotary tables, or to None for learned positions.

        The tables are computed once here: a model has at most two rules, for layers without and with a window.
        """
        if self.config.rope is None:
            return lambda windows: None
        rules = list(dict.fromkeys([self.config.rope_for(None), self.config.rope_for(1)]))  # 1 stands for any window
        tables = [
            rope.rotary_tables(
                positions, *rope.rotary_frequencies(rule, self.config.head_dim, max_model_len=self.max_model_len)
            )
            for rule in rules
        ]

        def of(windows: Sequence[int | None]) -> RotaryTables:
            chosen = stage_value([rules.index(self.config.rope_for(window)) for window in windows])
            if isinstance(chosen, int):
                return tables[chosen]
            return jax.tree.map(lambda *options: jnp.stack(options)[chosen], *tables)

        return of

    def final_norm(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """Applies the norm between the last layer and the head."""
        return self.norm(x)

    @property
    def head(self) -> VocabularyEmbedding:
        """The module that scores hidden states: lm_head, or the embedding itself when they are tied."""
        return self.embedding if self.lm_head is None else self.lm_head


def make_norm(config: ModelConfig, layout: Layout, *, num_stages: int | None) -> RMSNorm | LayerNorm:
    """A norm over the hidden size, of the kind that config.norm_kind names; num_stages as RMSNorm's."""
    options = {"eps": config.norm_eps, "num_stages": num_stages, "dtype": layout.dtype}
    if config.norm_kind == "layer":
        return LayerNorm(config.hidden_size, **options)
    return RMSNorm(config.hidden_size, offset=config.norm_offset, **options)


def _normalised(x: Float[Array, "T D"], norm: Norm | None) -> Float[Array, "T D"]:
    return x if norm is None else norm(x)
