"""The wrapper for decoder-only models: parameters, KV pages and decode state on the mesh, one program a shape.

Owns: device memory and the compiled programs; turns a StepBatch into launched programs and reads their result.
Does not know: requests, queues, text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from jaxinfer.communication.mesh import PIPE, TENSOR
from jaxinfer.communication.sharding import KV_PAGES, PER_STAGE, REPLICATED
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.layers import kv_cache
from jaxinfer.layers.kv_cache import CacheShape, LayerCache
from jaxinfer.models.layout import Layout
from jaxinfer.wrappers import pipeline
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.decoder_step import (
    DecoderStep,
    DecodeState,
    num_input_words,
    pack_inputs,
    sample_step,
    unpack_inputs,
)
from jaxinfer.wrappers.in_flight import InFlight, StepHandle
from jaxinfer.wrappers.memory import free_bytes, num_kv_pages
from jaxinfer.wrappers.pipeline import LogitRows
from jaxinfer.wrappers.programs import ProgramCache
from jaxinfer.wrappers.step_batch import (
    SAMPLING_FIELDS,
    LogprobArrays,
    RowUsage,
    SamplerVariant,
    StepBatch,
    StepResult,
    StepShape,
    StepShapes,
)


class DecoderWrapper(AbstractModelInferenceWrapper):
    """Runs a decoder-only model.

    Args:
      model: abstract nnx module with the Decoder protocol (nnx.eval_shape).
      parameters: its state with arrays on the mesh, as the checkpoint loader returns it.
      model_config: the model's numbers.
      config: the engine's settings.
      layout: what the model was built for.
      mesh: where it lies.

    Raises:
      ValueError: the KV pool does not fit into free memory.
    """

    def __init__(
        self,
        model: Any,
        parameters: nnx.State,
        *,
        model_config: ModelConfig,
        config: EngineConfig,
        layout: Layout,
        mesh: Mesh,
    ):
        self._mesh = mesh
        self._shapes = StepShapes(config, max_model_len=layout.max_model_len)
        self._programs = ProgramCache(
            {
                "forward": self._lower_forward,
                "sample": self._lower_sample,
                "logits": self._lower_logits,
                "copy": self._lower_copy,
            }
        )
        self._vocab_size = model_config.vocab_size
        self._in_flight = InFlight(self._shapes)
        step = DecoderStep(model, page_size=config.page_size, max_decode=self._shapes.max_decode)
        self._step_graph, self._step_tree, self._leaves, self._leaf_specs = _flattened(step, parameters, ("model",))
        self._head_graph, self._head_tree, self._head_leaves, self._head_specs = _flattened_head(model, parameters)
        cache_shape = functools.partial(
            CacheShape,
            num_layers=layout.layers_per_stage(model_config),
            num_stages=layout.num_stages,
            num_kv_heads=layout.num_kv_heads(model_config),
            page_size=config.page_size,
            head_dim=model_config.head_dim,
        )
        self._page_bytes = cache_shape(num_pages=1).page_bytes(layout.dtype.itemsize)
        self._num_pages = config.num_kv_pages or self._fitting_pages(config, model_config, layout.dtype.itemsize)
        # Programs take and return flat lists: flattening once is cheaper than at every call.
        caches = kv_cache.allocate(cache_shape(num_pages=self._num_pages + 1), layout.dtype, mesh)
        self._caches, self._cache_tree = jax.tree.flatten(caches)
        state = DecodeState.zeros(config.max_num_seqs, self._shapes.table_width)
        self._state, self._state_tree = jax.tree.flatten(state)
        self._state = jax.device_put(self._state, NamedSharding(mesh, REPLICATED))
        ring = pipeline.allocate(
            self._shapes.largest_shape(),
            hidden_size=model_config.hidden_size,
            dtype=layout.dtype,
            table_width=self._shapes.table_width,
            mesh=mesh,
        )
        self._ring, self._ring_tree = jax.tree.flatten(ring)
        self._ring_specs = [array.sharding.spec for array in self._ring]

    @property
    def shapes(self) -> StepShapes:
        """The shapes of steps this wrapper runs."""
        return self._shapes

    @property
    def num_pages(self) -> int:
        """KV pages, without the dump page."""
        return self._num_pages

    @property
    def row_usage(self) -> RowUsage:
        """Rows of all steps launched so far."""
        return self._in_flight.usage

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return self._programs.num_compilations

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool over all devices, the dump page included."""
        return self._page_bytes * (self._num_pages + 1)

    @property
    def caches(self) -> list[LayerCache]:
        """The KV pages of every local layer, for reading; the next launch invalidates them."""
        return jax.tree.unflatten(self._cache_tree, self._caches)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters over all devices, replicas counted once."""
        return sum(leaf.nbytes for leaf in self._leaves)

    def launch(self, batch: StepBatch) -> StepHandle:
        """Starts a step: page copies, then forward, then the sampler; nothing here waits for the device."""
        handle = StepHandle(batch)
        shape, hidden, rows = self._tick(handle)
        leaving = self._in_flight.leaving
        if leaving is not None and leaving.batch.has_logits:
            variant, logprobs = leaving.batch.variant, leaving.batch.logprobs
            program = self._programs.get("sample", shape.num_logits, variant, logprobs)
            self._state, leaving.result = program(self._head_leaves, self._state, hidden, rows)
            leaving.result.copy_to_host_async()
        elif leaving is not None:
            leaving.result = rows[0]  # something to wait for
        return handle

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step that is through and returns its tokens, none if it samples none.

        Raises:
          ValueError: the step is still in the pipeline.
        """
        if handle.result is None:
            raise ValueError(
                f"the step is not through: {self._shapes.num_stages} pipeline stages need as many launches; launch "
                f"StepBatch.idle"
            )
        words = np.asarray(handle.result)  # the one place where the host reads the device
        if not handle.batch.has_logits:
            return StepResult(token_ids=np.zeros(0, np.int32), logprobs=None)
        if not handle.batch.logprobs:
            return StepResult(token_ids=words[:, 0], logprobs=None)
        num_top = (words.shape[1] - 3) // 2
        logprobs = LogprobArrays(
            logprob=words[:, 1].view(np.float32),
            rank=words[:, 2],
            top_ids=words[:, 3 : 3 + num_top],
            top_logprobs=np.ascontiguousarray(words[:, 3 + num_top :]).view(np.float32),
        )
        return StepResult(token_ids=words[:, 0], logprobs=logprobs)

    def logits(self, batch: StepBatch) -> Float[np.ndarray, "M V"]:
        """Advances the slots like launch, but returns float32 logits of every logit position and samples nothing.

        For research and tests: the rows are gathered on the host, and a pipeline must not hold a step that samples.
        """
        shape, hidden, _ = self._tick(StepHandle(batch))
        for _ in range(self._shapes.num_stages - 1):
            shape, hidden, _ = self._tick(StepHandle(StepBatch.idle(self._shapes)))
        program = self._programs.get("logits", shape.num_logits)
        return np.asarray(program(self._head_leaves, hidden))[: batch.shape.num_logits, : self._vocab_size]

    def warmup(self) -> None:
        """Compiles the forward program of every shape and every sampler."""
        shapes = self._shapes.all_shapes()
        wanted = [("forward", shape) for shape in shapes]
        for num_logits in sorted({shape.num_logits for shape in shapes}):
            for variant in SamplerVariant:
                wanted += [("sample", num_logits, variant, logprobs) for logprobs in (False, True)]
        self._programs.compile_all(wanted)

    def close(self) -> None:
        """Frees weights, KV pages and state; the wrapper cannot be used afterwards."""
        for array in (*self._leaves, *self._caches, *self._state, *self._ring):
            if not array.is_deleted():
                array.delete()
        self._programs.clear()

    def compiled_forward(self, shape: StepShape) -> jax.stages.Compiled:
        """The forward program of a shape, for reading its memory plan and text."""
        return self._programs.get("forward", shape)

    def _fitting_pages(self, config: EngineConfig, model_config: ModelConfig, itemsize: int) -> int:
        device = self._mesh.devices.flat[0]
        free = free_bytes(device, gpu_memory_utilization=config.gpu_memory_utilization)
        if device.platform == "cpu":
            free //= self._mesh.size  # CPU devices share one memory
        else:
            free -= _activation_bytes(model_config, self._shapes, itemsize)
        return num_kv_pages(
            free=free,
            page_bytes=self._page_bytes // self._mesh.size,
            useful_pages=config.max_num_seqs * self._shapes.table_width,
        )

    def _tick(self, handle: StepHandle) -> tuple[StepShape, jax.Array, list[jax.Array]]:
        """Lets a step in and moves all on; returns the tick's shape and what the step that leaves has to sample."""
        shape = self._in_flight.enter(handle)
        copies = self._in_flight.page_copies()
        if copies is not None:
            self._caches = self._programs.get("copy", copies.shape[1])(self._caches, copies)
        program = self._programs.get("forward", shape)
        words = pack_inputs(handle.batch, shape, self._shapes)
        self._state, self._caches, self._ring, hidden, rows = program(
            self._leaves, self._state, self._caches, self._ring, words
        )
        return shape, hidden, rows

    def _lower_forward(self, shape: StepShape) -> jax.stages.Lowered:
        def forward(leaves, state, caches, ring, words):
            step = nnx.merge(self._step_graph, jax.tree.unflatten(self._step_tree, leaves))
            state = jax.tree.unflatten(self._state_tree, state)
            caches = jax.tree.unflatten(self._cache_tree, caches)
            ring = jax.tree.unflatten(self._ring_tree, ring)
            state, caches, ring, *outputs = step(state, caches, ring, unpack_inputs(words, shape, self._shapes))
            return *map(jax.tree.leaves, (state, caches, ring)), outputs[0], jax.tree.leaves(outputs[1])

        mapped = self._sharded(
            forward,
            in_specs=(self._leaf_specs, REPLICATED, KV_PAGES, self._ring_specs, REPLICATED),
            out_specs=(REPLICATED, KV_PAGES, self._ring_specs, REPLICATED, REPLICATED),
        )
        words = jax.ShapeDtypeStruct((num_input_words(shape, self._shapes),), jnp.int32)
        return jax.jit(mapped, donate_argnums=(1, 2, 3)).lower(
            self._leaves, self._state, self._caches, self._ring, words
        )

    def _lower_sample(self, num_logits: int, variant: SamplerVariant, logprobs: bool) -> jax.stages.Lowered:
        def sample(leaves, state, hidden, rows):
            head = nnx.merge(self._head_graph, jax.tree.unflatten(self._head_tree, leaves))
            state = jax.tree.unflatten(self._state_tree, state)
            rows = LogitRows(*rows)
            state, result = sample_step(head, state, hidden, rows, variant=variant, logprobs=logprobs)
            return jax.tree.leaves(state), result

        mapped = self._sharded(
            sample,
            in_specs=(self._head_specs, REPLICATED, REPLICATED, REPLICATED),
            out_specs=(REPLICATED, REPLICATED),
        )
        replicated = NamedSharding(self._mesh, REPLICATED)
        dims = [(num_logits,), (num_logits,), (num_logits, SAMPLING_FIELDS), (num_logits,)]
        rows = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated) for shape in dims]
        return jax.jit(mapped, donate_argnums=(1,)).lower(
            self._head_leaves, self._state, self._abstract_hidden(num_logits), rows
        )

    def _lower_logits(self, num_logits: int) -> jax.stages.Lowered:
        def logits(leaves, hidden):
            return nnx.merge(self._head_graph, jax.tree.unflatten(self._head_tree, leaves)).logits(hidden)

        mapped = self._sharded(
            logits, in_specs=(self._head_specs, REPLICATED), out_specs=PartitionSpec(None, (PIPE, TENSOR))
        )
        return jax.jit(mapped).lower(self._head_leaves, self._abstract_hidden(num_logits))

    def _lower_copy(self, num_copies: int) -> jax.stages.Lowered:
        def copy(caches, copies):
            caches = jax.tree.unflatten(self._cache_tree, caches)
            return jax.tree.leaves([kv_cache.copy_pages(cache, copies[0]) for cache in caches])

        mapped = self._sharded(copy, in_specs=(KV_PAGES, PER_STAGE), out_specs=KV_PAGES)
        copies = jax.ShapeDtypeStruct((self._shapes.num_stages, num_copies, 2), jnp.int32)
        return jax.jit(mapped, donate_argnums=(0,)).lower(self._caches, copies)

    def _abstract_hidden(self, num_logits: int) -> jax.ShapeDtypeStruct:
        weight = self._head_leaves[0]
        sharding = NamedSharding(self._mesh, REPLICATED)
        return jax.ShapeDtypeStruct((num_logits, weight.shape[1]), weight.dtype, sharding=sharding)

    def _sharded(self, function: Callable, *, in_specs, out_specs) -> Callable:
        # check_vma cannot see that a psum makes the outputs equal on all devices.
        return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _flattened(module: nnx.Module, parameters: nnx.State, prefix: tuple[str, ...]):
    """Graph definition, tree definition, leaves and specs of a module whose parameters are at hand."""
    graph, abstract = nnx.split(module)
    tree = jax.tree.structure(abstract)
    arrays = {prefix + path: variable for path, variable in nnx.to_flat_state(parameters)}
    found = [arrays[path] for path, _ in nnx.to_flat_state(abstract)]
    return graph, tree, [variable[...] for variable in found], [variable.spec for variable in found]


def _flattened_head(model: Any, parameters: nnx.State):
    """As _flattened, for the model's head alone; a tied head shares the embedding's array."""
    graph, abstract = nnx.split(model.head)
    path = next(path for path, module in nnx.iter_graph(model) if module is model.head)
    arrays = dict(nnx.to_flat_state(parameters))
    found = [arrays[(*path, *tail)] for tail, _ in nnx.to_flat_state(abstract)]
    tree = jax.tree.structure(abstract)
    return graph, tree, [variable[...] for variable in found], [variable.spec for variable in found]


def _activation_bytes(config: ModelConfig, shapes: StepShapes, itemsize: int) -> int:
    """A generous estimate of the largest step's temporaries: residual, QKV, feed-forward and float32 logits."""
    largest = shapes.all_shapes()[-1]
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_token = (4 * config.hidden_size + 2 * (q_size + 2 * kv_size) + 3 * config.ffn_size) * max(itemsize, 4)
    return largest.num_tokens * per_token + 4 * largest.num_logits * config.vocab_size * 4
