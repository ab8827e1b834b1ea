"""The programs of a step on a mesh, traced from shapes alone, without any weights.

Owns: what the programs take, return and carry from step to step, how these arrays lie on the mesh, and the tracing.
Does not know: the values of weights, batches, which program runs when.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfer.communication.sharding import KV_PAGES, PER_STAGE, REPLICATED, VOCABULARY_COLUMNS
from jaxinfer.communication.volume import CollectiveVolume, collective_volumes
from jaxinfer.interventions import HookKind, HookTable
from jaxinfer.layers import kv_cache
from jaxinfer.layers.kv_cache import CacheShape, LayerCache
from jaxinfer.layers.taps import TapPlan
from jaxinfer.sampling.logit_edits import EditState, set_allowed, set_slot
from jaxinfer.sampling.user_functions import call_logits_function
from jaxinfer.wrappers import pipeline
from jaxinfer.wrappers.decode_state import DecodeState
from jaxinfer.wrappers.decoder_step import DecoderStep, StepHooks
from jaxinfer.wrappers.edit_upload import NUM_WORDS, num_allowed_words, unpack_allowed, unpack_edits
from jaxinfer.wrappers.flat_module import FlatModule, dotted
from jaxinfer.wrappers.pipeline import LogitRows
from jaxinfer.wrappers.sample_step import FunctionsOfLogits, sample_step, score_step
from jaxinfer.wrappers.step_arrays import HeadInputs, StepArrays, TapResults
from jaxinfer.wrappers.step_batch import SAMPLING_FIELDS, SamplerVariant
from jaxinfer.wrappers.step_inputs import num_input_words, unpack_inputs
from jaxinfer.wrappers.step_shapes import StepShape, StepShapes


class StepPrograms:
    """Traces the programs of a model; the caller lowers and compiles them.

    The first line of each method that returns a Traced shows the arguments and results of the program.

    Args:
      model: abstract nnx module with the Decoder protocol (nnx.eval_shape).
      shapes: the shapes of steps.
      cache_shape: shape of the KV pool, the dump page included.
      dtype: dtype of activations, keys and values.
      mesh: the mesh that the programs run on; an AbstractMesh is enough for tracing.
    """

    def __init__(
        self, model: Any, *, shapes: StepShapes, cache_shape: CacheShape, dtype: jnp.dtype, mesh: Mesh | AbstractMesh
    ):
        self._shapes = shapes
        self._mesh = mesh
        step = DecoderStep(model, page_size=cache_shape.page_size, max_decode=shapes.max_decode)
        self._step = FlatModule(step)
        self._head = FlatModule(model.head)
        self._head_path = next(path for path, module in nnx.iter_graph(model) if module is model.head)
        self._head_backend = model.head.backend
        weight = model.head.weight
        self._hidden_size, self._hidden_dtype = weight.shape[1], model.head.dtype
        self._state, self._state_tree = _flat(lambda: DecodeState.zeros(shapes.num_slots, shapes.table_width))
        self._caches, self._cache_tree = _flat(lambda: kv_cache.empty(cache_shape, dtype))
        self._ring, self._ring_tree = _flat(
            lambda: pipeline.idle(
                shapes.largest_shape(),
                num_stages=shapes.num_stages,
                hidden_size=self._hidden_size,
                dtype=dtype,
                table_width=shapes.table_width,
            )
        )
        self._ring_specs = pipeline.specs(len(self._ring))
        self._edits, self._edit_tree = _flat(lambda: EditState.zeros(shapes.num_slots + 1, weight.shape[0]))
        self._edit_specs = EditState.specs()

    @property
    def padded_vocab_size(self) -> int:
        """Tokens of the vocabulary with the padding that makes all slices equal, over all devices."""
        return self._edits[0].shape[1]

    @property
    def parameter_bytes(self) -> int:
        """Bytes of parameters that one device holds."""
        placed = self._placed(self._step.leaves, self._step.specs)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in placed)

    def volumes(self, shape: StepShape, variant: SamplerVariant) -> list[CollectiveVolume]:
        """The collectives of one step, the sampler included, and how much each sends between devices."""
        traces = (self.forward(shape), self.sample(shape.num_logits, variant, None))
        sizes = self._mesh.shape
        return [volume for traced in traces for volume in collective_volumes(traced.jaxpr.jaxpr, sizes)]

    def allocate(self, parameters: nnx.State) -> StepArrays:
        """The arrays for a first step: parameters, which lie on the mesh already, an empty cache, nothing in flight."""
        arrays = {dotted(path): variable[...] for path, variable in nnx.to_flat_state(parameters)}
        return self.allocate_with({name: arrays[name] for name in self.parameter_names})

    def allocate_with(self, arrays: dict[str, jax.Array]) -> StepArrays:
        """As allocate, with the parameters by name."""
        return StepArrays(
            **self.leaves(arrays),
            state=[jax.device_put(np.zeros(x.shape, x.dtype), self._on_mesh(REPLICATED)) for x in self._state],
            caches=[jnp.zeros(x.shape, x.dtype, device=self._on_mesh(KV_PAGES)) for x in self._caches],
            ring=[
                jax.device_put(np.zeros(x.shape, x.dtype), self._on_mesh(spec))
                for x, spec in zip(self._ring, self._ring_specs, strict=True)
            ],
        )

    def leaves(self, arrays: dict[str, jax.Array]) -> dict[str, list[jax.Array]]:
        """The fields of StepArrays that hold parameters, from the parameters by name."""
        head = [dotted((*self._head_path, *path)) for path in self._head.paths]
        return {
            "leaves": [arrays[name] for name in self.parameter_names],
            "head_leaves": [arrays[name] for name in head],
        }

    @property
    def parameter_names(self) -> list[str]:
        """The names of StepArrays.leaves, such as "layers.0.mlp.down.weight"."""
        return [dotted(path[1:]) for path in self._step.paths]  # without the step's own name for its model

    @property
    def parameter_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of each of StepArrays.leaves, by name."""
        return dict(zip(self.parameter_names, self._placed(self._step.leaves, self._step.specs), strict=True))

    @property
    def inputs_first(self) -> set[str]:
        """The names of matrices that are kept as [in, out]."""
        marks = (variable.get_metadata().get("inputs_first", False) for variable in self._step.variables)
        return {name for name, marked in zip(self.parameter_names, marks, strict=True) if marked}

    def allocate_edits(self) -> list[jax.Array]:
        """The leaves of an EditState for all slots, made on demand, since only some requests have logit edits."""
        return [
            jax.device_put(np.zeros(x.shape, x.dtype), self._on_mesh(spec))  # unlike jnp.zeros, compiles nothing
            for x, spec in zip(self._edits, self._edit_specs, strict=True)
        ]

    def caches(self, leaves: list[jax.Array]) -> list[LayerCache]:
        """The KV caches of every local layer, from their leaves."""
        return jax.tree.unflatten(self._cache_tree, leaves)

    def forward(self, shape: StepShape) -> jax.stages.Traced:
        """(leaves, state, caches, ring, words) -> (state, caches, ring, HeadInputs); donates state, caches and ring."""
        return self._forward(shape, None)

    def tapped(self, shape: StepShape, plan: TapPlan) -> jax.stages.Traced:
        """(leaves, state, caches, ring, words, rows, tables) -> (state, caches, ring, HeadInputs, TapResults).

        Like forward, with what a plan says at the sites. rows: int32[S, J, R + P], for each stage and each hook of the
        plan; tables: a HookTable for each of them.
        """
        return self._forward(shape, plan)

    def _forward(self, shape: StepShape, plan: TapPlan | None) -> jax.stages.Traced:
        def forward(leaves, state, caches, ring, words, *hooks):
            step_hooks = None if plan is None else StepHooks(plan=plan, rows=hooks[0][0], tables=hooks[1])
            carried = self._unflat(state, caches, ring)
            state, caches, ring, leaving, taps = self._step.merge(leaves)(
                *carried, unpack_inputs(words, shape, self._shapes), scored=shape.scored, hooks=step_hooks
            )
            head_inputs = HeadInputs(leaving.hidden, jax.tree.leaves(leaving.rows), leaving.prompts)
            found = () if taps is None else (TapResults(taps.captured, taps.failed),)
            return (*map(jax.tree.leaves, (state, caches, ring)), head_inputs, *found)

        in_specs = (self._step.specs, REPLICATED, KV_PAGES, self._ring_specs, REPLICATED)
        out_specs = (REPLICATED, KV_PAGES, self._ring_specs, REPLICATED)
        arguments: list[Any] = [
            self._placed(self._step.leaves, self._step.specs),
            *self._carried(),
            jax.ShapeDtypeStruct((num_input_words(shape, self._shapes),), jnp.int32),
        ]
        if plan is not None:
            in_specs, out_specs = (*in_specs, PER_STAGE, REPLICATED), (*out_specs, PER_STAGE)
            rows = (self._shapes.num_stages, len(plan.hooks), shape.num_decode + shape.num_prefill)
            arguments += [jax.ShapeDtypeStruct(rows, jnp.int32), [self._table(hook.kind) for hook in plan.hooks]]
        mapped = self._sharded(forward, in_specs=in_specs, out_specs=out_specs)
        return jax.jit(mapped, donate_argnums=(1, 2, 3)).trace(*arguments)

    def chain(self, shape: StepShape, num_steps: int, variant: SamplerVariant) -> jax.stages.Traced:
        """(leaves, head_leaves, state, caches, ring, words) -> (state, caches, ring, results).

        Several decode steps, each with its sampler, in a loop; donates state, caches and ring. words: int32[num_steps,
        J], the upload of each step; results: int32[num_steps, M, 1].
        """

        def chain(leaves, head_leaves, state, caches, ring, words):
            step, head = self._step.merge(leaves), self._head.merge(head_leaves)

            def one(carried, words):
                inputs = unpack_inputs(words, shape, self._shapes)
                state, caches, ring, leaving, _ = step(*carried, inputs, scored=False, hooks=None)
                state, _, result = sample_step(
                    head, state, None, leaving.hidden, leaving.rows, variant=variant, num_top=None
                )
                return (state, caches, ring), result

            carried, results = lax.scan(one, self._unflat(state, caches, ring), words)
            return (*map(jax.tree.leaves, carried), results)

        carried_specs = (REPLICATED, KV_PAGES, self._ring_specs)
        mapped = self._sharded(
            chain,
            in_specs=(self._step.specs, self._head.specs, *carried_specs, REPLICATED),
            out_specs=(*carried_specs, REPLICATED),
        )
        return jax.jit(mapped, donate_argnums=(2, 3, 4)).trace(
            self._placed(self._step.leaves, self._step.specs),
            self._placed(self._head.leaves, self._head.specs),
            *self._carried(),
            jax.ShapeDtypeStruct((num_steps, num_input_words(shape, self._shapes)), jnp.int32),
        )

    def _carried(self) -> list[list[jax.ShapeDtypeStruct]]:
        """State, caches and ring, which every step takes and returns."""
        return [
            self._placed(self._state, [REPLICATED] * len(self._state)),
            self._placed(self._caches, [KV_PAGES] * len(self._caches)),
            self._placed(self._ring, self._ring_specs),
        ]

    def _unflat(self, state: list[Any], caches: list[Any], ring: list[Any]) -> tuple[Any, Any, Any]:
        """State, caches and ring from their leaves."""
        trees = (self._state_tree, self._cache_tree, self._ring_tree)
        state, caches, ring = map(jax.tree.unflatten, trees, (state, caches, ring))
        return state, caches, ring

    def sites(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The sites of a stage, with the numbers that layers have there, and what a token has at each of them."""
        shape = self._shapes.all_shapes()[0]
        captured = self.tapped(shape, TapPlan(captured=None)).out_info[-1].captured
        return {name: jax.ShapeDtypeStruct(found.shape[1:], found.dtype) for name, found in captured.items()}

    @property
    def num_table_rows(self) -> int:
        """Rows of a HookTable: one for every sequence that may be in a stage of the pipeline, and the first, nobody's.

        A sequence that has lost its slot stays in the pipeline until its last step has left it.
        """
        return self._shapes.num_slots * self._shapes.num_stages + 1

    def allocate_table(self, kind: HookKind) -> HookTable:
        """A table without any parameters yet, and without constants."""
        shapes = self._table(kind)._replace(constants={})
        return jax.tree.map(lambda entry: self.replicated(np.zeros(entry.shape, entry.dtype)), shapes)

    def replicated(self, array: np.ndarray) -> jax.Array:
        """An array on all devices of the mesh."""
        return jax.device_put(array, self._on_mesh(REPLICATED))

    def place(self, kind: HookKind) -> jax.stages.Traced:
        """(table, numbers, values) -> table, with the parameters of a request in a row; donates the table.

        The table is one without constants.

        numbers: int32[4], the row, start, stop and prompt_len; values: the parameters by name.
        """

        def place(table, numbers, values):
            row = numbers[0]
            parameters = {name: table.parameters[name].at[row].set(value) for name, value in values.items()}
            return HookTable(
                start=table.start.at[row].set(numbers[1]),
                stop=table.stop.at[row].set(numbers[2]),
                prompt_len=table.prompt_len.at[row].set(numbers[3]),
                parameters=parameters,
                constants={},
            )

        values = {name: jax.ShapeDtypeStruct(dims, dtype) for name, dims, dtype in kind.signature}
        numbers = jax.ShapeDtypeStruct((4,), jnp.int32)
        table = self._table(kind)._replace(constants={})
        return jax.jit(place, donate_argnums=(0,)).trace(table, numbers, values)

    def _table(self, kind: HookKind) -> HookTable:
        """The shapes of a kind's table."""
        count, on_mesh = self.num_table_rows, self._on_mesh(REPLICATED)

        def entry(dims: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=on_mesh)

        return HookTable(
            **{name: entry((count,), jnp.int32) for name in ("start", "stop", "prompt_len")},
            parameters={name: entry((count, *dims), dtype) for name, dims, dtype in kind.signature},
            constants={name: entry(array.shape, array.dtype) for name, array in kind.intervention.constants.items()},
        )

    def sample(self, num_logits: int, variant: SamplerVariant, num_top: int | None) -> jax.stages.Traced:
        """(head_leaves, state, hidden, rows) -> (state, result); donates the state."""

        def sample(leaves, state, hidden, rows):
            state = jax.tree.unflatten(self._state_tree, state)
            head, rows = self._head.merge(leaves), LogitRows(*rows)
            state, _, result = sample_step(head, state, None, hidden, rows, variant=variant, num_top=num_top)
            return jax.tree.leaves(state), result

        mapped = self._sharded(
            sample,
            in_specs=(self._head.specs, REPLICATED, REPLICATED, REPLICATED),
            out_specs=(REPLICATED, REPLICATED),
        )
        return jax.jit(mapped, donate_argnums=(1,)).trace(
            self._placed(self._head.leaves, self._head.specs),
            self._placed(self._state, [REPLICATED] * len(self._state)),
            self._hidden(num_logits),
            self._rows(num_logits),
        )

    def sample_edited(self, num_logits: int, num_top: int | None) -> jax.stages.Traced:
        """(head_leaves, state, edits, hidden, rows) -> (state, edits, result); donates state and edits.

        It runs the full sampler, so that it serves every mixture of rows.
        """
        return self._sample_edited(num_logits, num_top, ())

    def sample_by(self, num_logits: int, num_top: int | None, kinds: tuple[HookKind, ...]) -> jax.stages.Traced:
        """(head_leaves, state, edits, hidden, rows, function_rows, tables) -> (state, edits, result).

        Like sample_edited, with the user's functions. function_rows: int32[I, M], the row of each logit row in the
        table of each function; tables: a HookTable for each of them.
        """
        return self._sample_edited(num_logits, num_top, kinds)

    def _sample_edited(self, num_logits: int, num_top: int | None, kinds: tuple[HookKind, ...]) -> jax.stages.Traced:
        def sample(leaves, state, edits, hidden, rows, *hooks):
            state = jax.tree.unflatten(self._state_tree, state)
            edits = jax.tree.unflatten(self._edit_tree, edits)
            head, rows = self._head.merge(leaves), LogitRows(*rows)
            functions = FunctionsOfLogits(kinds=kinds, rows=hooks[0], tables=hooks[1]) if kinds else None
            full = SamplerVariant.FULL
            state, edits, result = sample_step(
                head, state, edits, hidden, rows, variant=full, num_top=num_top, functions=functions
            )
            return jax.tree.leaves(state), jax.tree.leaves(edits), result

        hooks: list[Any] = []
        if kinds:
            hooks = [jax.ShapeDtypeStruct((len(kinds), num_logits), jnp.int32), [self._table(kind) for kind in kinds]]
        mapped = self._sharded(
            sample,
            in_specs=(
                self._head.specs,
                REPLICATED,
                self._edit_specs,
                REPLICATED,
                REPLICATED,
                *[REPLICATED] * len(hooks),
            ),
            out_specs=(REPLICATED, self._edit_specs, REPLICATED),
        )
        return jax.jit(mapped, donate_argnums=(1, 2)).trace(
            self._placed(self._head.leaves, self._head.specs),
            self._placed(self._state, [REPLICATED] * len(self._state)),
            self._placed(self._edits, self._edit_specs),
            self._hidden(num_logits),
            self._rows(num_logits),
            *hooks,
        )

    def lower_function(self, kind: HookKind) -> jax.stages.Lowered:
        """A program of one of the user's functions of logits with two rows of them; raises what the function raises.

        Raises:
          ValueError: it does not return one array of the logits' shape.
        """
        size = self.padded_vocab_size // self._mesh.size

        def call(values: dict[str, Any], constants: dict[str, Any]) -> Any:
            of_row = functools.partial(call_logits_function, kind, constants=constants, backend=self._head_backend)
            found = jax.vmap(of_row)(
                jnp.zeros((2, size), jnp.float32),
                jnp.zeros(2, jnp.int32),
                jnp.ones(2, jnp.int32),
                jnp.zeros((2, size), jnp.int32),
                jnp.zeros((2, 2), jnp.uint32),
                values,
            )
            dims = found.shape[1:] if hasattr(found, "shape") else type(found).__name__
            if dims != (size,):
                raise ValueError(f"{kind.intervention} must return an array of the logits' shape ({size},), got {dims}")
            return found

        values = {name: jax.ShapeDtypeStruct((2, *dims), dtype) for name, dims, dtype in kind.signature}
        constants = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in kind.intervention.constants.items()}
        program = jax.jit(self._sharded(call, in_specs=REPLICATED, out_specs=VOCABULARY_COLUMNS))
        return program.lower(values, constants)

    def score(self, num_tokens: int, num_top: int) -> jax.stages.Traced:
        """(head_leaves, hidden, targets) -> result, which is that of score_step."""

        def score(leaves, hidden, targets):
            return score_step(self._head.merge(leaves), hidden, targets, num_top=num_top)

        mapped = self._sharded(score, in_specs=(self._head.specs, REPLICATED, REPLICATED), out_specs=REPLICATED)
        return jax.jit(mapped).trace(
            self._placed(self._head.leaves, self._head.specs),
            self._hidden(num_tokens),
            jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
        )

    def edit(self) -> jax.stages.Traced:
        """(edits, words) -> edits, with the logit edits of one upload set; donates the edits."""

        def edit(edits, words):
            return jax.tree.leaves(set_slot(jax.tree.unflatten(self._edit_tree, edits), unpack_edits(words)))

        mapped = self._sharded(edit, in_specs=(self._edit_specs, REPLICATED), out_specs=self._edit_specs)
        words = jax.ShapeDtypeStruct((NUM_WORDS,), jnp.int32)
        return jax.jit(mapped, donate_argnums=(0,)).trace(self._placed(self._edits, self._edit_specs), words)

    def allow(self) -> jax.stages.Traced:
        """(edits, words) -> edits, with the allowed tokens of one upload set; donates the edits."""

        def allow(edits, words):
            return jax.tree.leaves(set_allowed(jax.tree.unflatten(self._edit_tree, edits), *unpack_allowed(words)))

        mapped = self._sharded(allow, in_specs=(self._edit_specs, REPLICATED), out_specs=self._edit_specs)
        words = jax.ShapeDtypeStruct((num_allowed_words(self.padded_vocab_size),), jnp.int32)
        return jax.jit(mapped, donate_argnums=(0,)).trace(self._placed(self._edits, self._edit_specs), words)

    def logits(self, num_logits: int) -> jax.stages.Traced:
        """(head_leaves, hidden) -> float32 logits, whose vocabulary axis is spread over the mesh."""

        def logits(leaves, hidden):
            return self._head.merge(leaves).logits(hidden)

        mapped = self._sharded(logits, in_specs=(self._head.specs, REPLICATED), out_specs=VOCABULARY_COLUMNS)
        return jax.jit(mapped).trace(self._placed(self._head.leaves, self._head.specs), self._hidden(num_logits))

    def copy(self, num_copies: int) -> jax.stages.Traced:
        """(caches, copies) -> caches, with pages copied; donates the caches."""

        def copy(caches, copies):
            caches = jax.tree.unflatten(self._cache_tree, caches)
            return jax.tree.leaves([kv_cache.copy_pages(cache, copies[0]) for cache in caches])

        mapped = self._sharded(copy, in_specs=(KV_PAGES, PER_STAGE), out_specs=KV_PAGES)
        copies = jax.ShapeDtypeStruct((self._shapes.num_stages, num_copies, 2), jnp.int32)
        caches = self._placed(self._caches, [KV_PAGES] * len(self._caches))
        return jax.jit(mapped, donate_argnums=(0,)).trace(caches, copies)

    def _on_mesh(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._mesh, spec)

    def _placed(self, leaves: list[Any], specs: list[PartitionSpec]) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._on_mesh(spec))
            for leaf, spec in zip(leaves, specs, strict=True)
        ]

    def _hidden(self, num_logits: int) -> jax.ShapeDtypeStruct:
        dims = (num_logits, self._hidden_size)
        return jax.ShapeDtypeStruct(dims, self._hidden_dtype, sharding=self._on_mesh(REPLICATED))

    def _rows(self, num_logits: int) -> list[jax.ShapeDtypeStruct]:
        """The leaves of LogitRows."""
        words = (num_logits, SAMPLING_FIELDS)
        dims = [words if name == "sampling" else words[:1] for name in LogitRows.__dataclass_fields__]
        return [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._on_mesh(REPLICATED)) for shape in dims]

    def _sharded(self, function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
        # check_vma cannot see that a psum makes the outputs equal on all devices.
        return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _flat(make: Callable[[], Any]) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """The abstract leaves and the tree structure of what a function would return, without running it."""
    trees = []

    def leaves() -> list[Any]:
        flat, tree = jax.tree.flatten(make())
        trees.append(tree)
        return flat

    return jax.eval_shape(leaves), trees[0]
