"""The parts of a decode step, each as a program of its own that takes as long as the part does within the step.

Owns: the parts, built from the functions that the step itself calls, at the step's own shapes.
Does not know: how they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.bench.session import Session
from jaxinfer.kernels.paged_attention import segmented_attention
from jaxinfer.kernels.segment import Segment
from jaxinfer.layers import kv_cache
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.layers.linear import project
from jaxinfer.layers.weight import SCALE
from jaxinfer.sampling import sampling
from jaxinfer.wrappers.step_shapes import pages_for

_LINK = 1e-30
"""What a part's result counts in the next part's input: nothing, but XLA has to run them one after the other."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step.

    Args:
      name: its name.
      run: runs it once and waits for it.
    """

    name: str
    run: Callable[[], object]


class StepParts:
    """The parts of a decode step of one model on one device.

    Args:
      session: the engine; its weights and KV pages are used, but no page is written.

    Raises:
      ValueError: the model has experts, the mesh is larger than one device, or the layers are computed by kernels that
        join several parts ("pallas").
    """

    def __init__(self, session: Session):
        decoder, config = session.decoder, session.model_config
        if config.num_experts:
            raise ValueError(f"the parts of a step are known for models without experts, got {config.num_experts}")
        if decoder.mesh.size != 1:
            raise ValueError(f"the parts of a step are timed on one device, got a mesh of {decoder.mesh.size}")
        if decoder.layout.attention_backend == "pallas":
            raise ValueError(
                'kernels of attention_backend "pallas" join the parts of a step; use bench roofline --profile, which '
                "shows the time of each kernel"
            )
        self._decoder = decoder
        self._config = config
        self._page_size = session.config.page_size
        self._rng = np.random.default_rng(0)

    def parts(self, num_rows: int, context: int) -> Iterator[Part]:
        """The parts of a step in which each of some rows reads `context` positions; compiles their programs."""
        yield Part("products", self._products(num_rows))
        yield Part("head", self._head(num_rows))
        yield Part("attention", self._attention(num_rows, context))
        yield Part("cache write", self._cache_write(num_rows))
        yield Part("sampler", self._sampler(num_rows))

    def _products(self, num_rows: int) -> Callable[[], object]:
        """All matrix products of the layers, one after the other."""
        params = self._decoder.held_params
        weights = [(array, params.get(name + SCALE)) for name, array in params.items() if array.ndim == 3]
        inputs_first = self._decoder.layout.inputs_first
        in_axis = -2 if inputs_first else -1
        inputs = {size: self._normal(num_rows, size) for size in {array.shape[in_axis] for array, _ in weights}}

        def products(weights: list[tuple[Array, Array | None]], inputs: dict[int, Array]) -> Array:
            link = jnp.zeros((1, 1), self._dtype)
            for weight, scale in weights:
                x, scale = inputs[weight.shape[in_axis]] + link, None if scale is None else scale[0]
                link = _LINK * project(x, weight[0], scale, inputs_first=inputs_first)[:1, :1]
            return link

        return self._program(products, weights, inputs)

    def _head(self, num_rows: int) -> Callable[[], object]:
        """The logits of all rows."""
        config = self._config
        head = nnx.eval_shape(
            lambda: VocabularyEmbedding(
                config.vocab_size,
                config.hidden_size,
                num_shards=1,
                dtype=self._dtype,
                logit_softcap=config.logit_softcap,
                quantization=self._decoder.layout.quantization,
            )
        )
        graph, state = nnx.split(head)
        place = "embedding" if config.tie_word_embeddings else "lm_head"
        names = [".".join(map(str, (place, *path))) for path, _ in nnx.to_flat_state(state)]

        def logits(parameters: list[Array], hidden: Array) -> Array:
            return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), parameters)).logits(hidden)

        parameters = [self._decoder.held_params[name] for name in names]
        return self._program(logits, parameters, self._normal(num_rows, config.hidden_size))

    def _attention(self, num_rows: int, context: int) -> Callable[[], object]:
        """Attention of all layers over the wrapper's own KV pages."""
        config, layout = self._config, self._decoder.layout
        width = pages_for(context, self._page_size)
        pages = np.resize(1 + self._rng.permutation(self._decoder.num_pages), (num_rows, width))
        table, kv_len = jnp.asarray(pages, jnp.int32), jnp.full(num_rows, context, jnp.int32)
        spans = [layout.spans(config, layer)[0] for layer in range(config.num_layers)]

        def attention(
            q: Float[Array, "T N H"], caches: list[tuple[Array, Array]], table: Array, kv_len: Array
        ) -> Array:
            segment = Segment(
                page_table=table,
                kv_len=kv_len,
                q_len=jnp.ones_like(kv_len),
                sequence_id=jnp.arange(num_rows),
                num_queries=1,
            )
            attend = functools.partial(
                segmented_attention,
                scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
                softcap=config.attention_softcap,
                backend=layout.attention_backend,
            )
            out = jnp.zeros_like(q)
            for (keys, values), span in zip(caches, spans, strict=True):
                seen = {"window": span.window, "sink_tokens": span.sink_tokens if span.window else 0}
                out = attend(q + _LINK * out, keys, values, (segment,), **seen)
            return out

        def caches() -> list[tuple[Array, Array]]:
            """The wrapper's at present, as every step replaces them."""
            return [(cache.keys, cache.values) for cache in self._decoder.caches]

        queries = self._normal(num_rows, config.num_heads, config.head_dim)
        program = self._compiled(attention, queries, caches(), table, kv_len)
        return lambda: jax.block_until_ready(program(queries, caches(), table, kv_len))

    def _cache_write(self, num_rows: int) -> Callable[[], object]:
        """The writes of all layers, into pages of the part's own: as the step's, they are donated."""
        config, layout = self._config, self._decoder.layout
        shape = layout.cache_shape(config, num_pages=1 + num_rows, page_size=self._page_size)
        new = self._normal(num_rows, config.num_kv_heads, config.head_dim)
        own, tree = jax.tree.flatten(kv_cache.empty(shape, self._dtype))

        def write(leaves: list[Array], new: Float[Array, "T K H"], pages: Int[Array, " T"]) -> list[Array]:
            caches, offsets = jax.tree.unflatten(tree, leaves), pages % self._page_size
            return jax.tree.leaves([kv_cache.write(cache, new, new, pages=pages, offsets=offsets) for cache in caches])

        pages = 1 + jnp.arange(num_rows)
        program = jax.jit(write, donate_argnums=0).lower(own, new, pages).compile()

        def run() -> None:
            nonlocal own
            own = jax.block_until_ready(program(own, new, pages))

        return run

    def _sampler(self, num_rows: int) -> Callable[[], object]:
        """The greedy sampler over the logits of all rows."""
        return self._program(sampling.greedy, self._normal(num_rows, self._config.vocab_size).astype(jnp.float32))

    @property
    def _dtype(self) -> Any:
        return self._decoder.layout.dtype

    def _normal(self, *dims: int) -> Array:
        return jnp.asarray(self._rng.standard_normal(dims), self._dtype)

    def _program(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
        program = self._compiled(function, *arguments)
        return lambda: jax.block_until_ready(program(*arguments))

    def _compiled(self, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
        spec = PartitionSpec()  # the collectives that some functions call need a mesh, here of one device
        mapped = jax.shard_map(function, mesh=self._decoder.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(mapped).lower(*arguments).compile()
