"""The wrapper for decoder-only models, which runs steps on the devices of a mesh.

Owns: the arrays on the devices (parameters, KV pages, decode state) and the compiled programs; turns a StepBatch into
launched programs and reads their results.
Does not know: requests, queues, text.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int32

from jaxinfer.config.attention_span import AttentionSpan
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.interventions import HookKind
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.models.layout import Layout
from jaxinfer.request import MAX_LOGPROBS
from jaxinfer.sites import Site, Sites
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.chains import ChainRule
from jaxinfer.wrappers.edit_upload import pack_allowed, pack_edits
from jaxinfer.wrappers.holders import Holders
from jaxinfer.wrappers.in_flight import InFlight, StepHandle
from jaxinfer.wrappers.launch_plans import Call, Exit, Tick
from jaxinfer.wrappers.memory import Footprint, fitting_pages, require_room
from jaxinfer.wrappers.parameters import swapped
from jaxinfer.wrappers.program_choice import ProgramChoice
from jaxinfer.wrappers.programs import ProgramCache, ProgramKey
from jaxinfer.wrappers.sample_step import SCORE_BLOCK
from jaxinfer.wrappers.step_arrays import HeadInputs
from jaxinfer.wrappers.step_batch import NO_TARGET, AllowedTokens, SlotEdits, StepBatch
from jaxinfer.wrappers.step_inputs import pack_inputs
from jaxinfer.wrappers.step_programs import StepPrograms
from jaxinfer.wrappers.step_result import LogprobArrays, RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape, StepShapes
from jaxinfer.wrappers.tapping import Tapping
from jaxinfer.wrappers.xla_options import chosen_options, compiler_options, tuned_alike

_LAUNCHING = threading.Lock()
"""Held while programs are enqueued. If two models share a mesh, all its devices must get their programs in the same
order, or collectives of the two wait for each other. Nothing is compiled under the lock, or all models would wait."""


class DecoderWrapper(AbstractModelInferenceWrapper):
    """Runs the steps of a decoder-only model.

    Args:
      model: abstract nnx module with the Decoder protocol (nnx.eval_shape).
      parameters: its state with arrays on the mesh, as the checkpoint loader returns it.
      model_config: the model's numbers.
      config: the engine's settings.
      layout: the layout that the model was built for.
      mesh: the devices that hold the parameters.
      beside: memory to leave for a second model (the draft model), which will have as many pages on the same devices.
      num_alike: replicas that have yet to be loaded, this one included; on CPUs they share one memory.
      holders: the processes that hold the model, which agree on the number of KV pages; None if this one runs alone.

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
        beside: Footprint | None = None,
        num_alike: int = 1,
        holders: Holders | None = None,
    ):
        platform = mesh.devices.flat[0].platform
        self._shapes = StepShapes.on_platform(platform, config, max_model_len=layout.max_model_len)
        self._vocab_size = model_config.vocab_size
        self._span = model_config.widest_span(config.span)
        self._in_flight = InFlight(self._shapes)
        page = layout.cache_shape(model_config, num_pages=1, page_size=config.page_size)
        self._page_bytes = page.page_bytes(layout.dtype.itemsize)
        if config.num_kv_pages is None:
            fitting = fitting_pages(
                mesh,
                config=config,
                model_config=model_config,
                shapes=self._shapes,
                page_bytes=self._page_bytes,
                itemsize=layout.dtype.itemsize,
                beside=beside or Footprint(),
                num_alike=num_alike,
            )
            self._num_pages = fitting if holders is None else holders.fewest_pages(fitting)
        else:
            self._num_pages = config.num_kv_pages
            require_room(mesh, num_pages=self._num_pages + 1, page_bytes=self._page_bytes)
        self._step_programs = StepPrograms(
            model,
            shapes=self._shapes,
            cache_shape=dataclasses.replace(page, num_pages=self._num_pages + 1),
            dtype=layout.dtype,
            mesh=mesh,
        )
        self._arrays = self._step_programs.allocate(parameters)
        self._edited_slots: set[int] = set()
        self._asleep: dict[str, np.ndarray] | None = None  # the parameters while they are not on the devices
        self._coming_shapes: Callable[[], Sequence[StepShape]] = lambda: ()
        self.layout = layout
        self.mesh = mesh
        traces = {
            "forward": self._step_programs.forward,
            "chain": self._step_programs.chain,
            "tapped": self._step_programs.tapped,
            "place": self._step_programs.place,
            "sample_by": self._step_programs.sample_by,
            "sample": self._step_programs.sample,
            "logits": self._step_programs.logits,
            "copy": self._step_programs.copy,
            "score": self._step_programs.score,
            "sample_edited": self._step_programs.sample_edited,
            "edit": self._step_programs.edit,
            "allow": self._step_programs.allow,
        }
        chosen = chosen_options(config.xla_options)
        options: dict[str, Callable[..., dict[str, bool | str]]] = {name: lambda *_: chosen for name in traces}
        options["forward"] = lambda shape: compiler_options(platform, shape.num_tokens) | chosen
        options["chain"] = lambda shape, *_: options["forward"](shape)
        options["tapped"] = lambda shape, _: compiler_options(platform, shape.num_tokens) | chosen
        in_order = holders is not None and holders.are_several
        if holders is not None:  # a run of several processes sends its steps one by one
            config = dataclasses.replace(config, steps_per_launch=1)
        self._programs = ProgramCache(traces, options, tuned_alike(platform), in_order=in_order)
        self.chains = ChainRule.of(config, platform=platform, weight_bytes=self._step_programs.parameter_bytes)
        self._choice = ProgramChoice(self._programs, self._shapes, self.chains)
        self._tapping = Tapping(
            self._programs,
            self._step_programs,
            self._shapes,
            num_layers=model_config.num_layers,
            vocab_size=model_config.vocab_size,
            max_bytes=config.max_research_bytes,
        )

    @property
    def shapes(self) -> StepShapes:
        """The shapes of the steps that this wrapper runs."""
        return self._shapes

    @property
    def num_pages(self) -> int:
        """KV pages, without the dump page."""
        return self._num_pages

    @property
    def span(self) -> AttentionSpan:
        """What tokens see in at least one layer; see the protocol."""
        return self._span

    @property
    def row_usage(self) -> RowUsage:
        """Rows of all steps launched so far, with and without padding."""
        return self._in_flight.usage

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return self._programs.num_compilations

    def chain_len(self, batch: StepBatch) -> int:
        """See the protocol."""
        return self.chains.chain_len(batch)

    def foresee(self, coming_shapes: Callable[[], Sequence[StepShape]]) -> None:
        """See the protocol."""
        self._coming_shapes = coming_shapes

    @property
    def is_compiling(self) -> bool:
        """Whether a program is being compiled now."""
        return self._programs.is_compiling

    def wait_for_programs(self) -> None:
        """Waits until no program is being compiled in the background."""
        self._programs.wait()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool over all devices, the dump page included."""
        return self._page_bytes * (self._num_pages + 1)

    @property
    def caches(self) -> list[LayerCache]:
        """The KV pages of every local layer, for reading; the next launch invalidates them."""
        return self._step_programs.caches(self._arrays.caches)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters over all devices, replicas counted once."""
        return sum(leaf.nbytes for leaf in self._arrays.leaves)

    @property
    def params(self) -> dict[str, jax.Array]:
        """The parameters by dotted name, matrices with their outputs first; they must not be donated.

        Raises:
          ValueError: the wrapper sleeps.
        """
        return self._swapped(self.held_params)

    @property
    def held_params(self) -> dict[str, jax.Array]:
        """The very arrays that steps read: as params, but matrices of linear layers as layout.inputs_first says.

        Raises:
          ValueError: the wrapper sleeps.
        """
        if self._asleep is not None:
            raise ValueError("the weights are not on the devices, since the LLM sleeps; call wake_up()")
        return dict(zip(self._step_programs.parameter_names, self._arrays.leaves, strict=True))

    @property
    def param_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of each of params."""
        return self._swapped(self._step_programs.parameter_shapes)

    def replace_params(self, new: dict[str, jax.Array]) -> None:
        """Lets all later steps read other arrays in the place of some of params; `replacements` has checked them."""
        leaves = self._step_programs.leaves(self.held_params | self._swapped(new))
        self._arrays.leaves, self._arrays.head_leaves = leaves["leaves"], leaves["head_leaves"]

    def sleep(self) -> None:
        """Copies the parameters to the host and frees all device memory; no step may be in flight."""
        if self._asleep is None:
            # A copy: on CPUs, np.asarray would give a view of the memory that is freed.
            self._asleep = {name: np.array(array) for name, array in self.held_params.items()}
            self._in_flight.clear()
            self._free()

    def wake_up(self) -> None:
        """Brings the parameters back, with an empty KV pool."""
        if self._asleep is not None:
            shapes = self._step_programs.parameter_shapes
            arrays = {name: jax.device_put(array, shapes[name].sharding) for name, array in self._asleep.items()}
            self._arrays, self._asleep = self._step_programs.allocate_with(arrays), None
            self._edited_slots.clear()

    def _swapped(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters, or their shapes, with the axes swapped of those that steps read with their inputs first."""
        names = self._step_programs.inputs_first
        return {name: swapped(array) if name in names else array for name, array in arrays.items()}

    def launch(self, batch: StepBatch) -> StepHandle:
        """Starts a step and returns without waiting for the device.

        Page copies come first, then the forward program, then the sampler for the step that leaves the pipeline, which
        is this one if there is one stage.
        """
        handle = StepHandle(batch)
        tick = self._plan_tick(handle)
        leaving = self._in_flight.leaving
        plan = None if leaving is None else self._plan_exit(leaving, tick.shape, batch.allowed)
        with _LAUNCHING:
            head_inputs = self._run_tick(tick)
            if leaving is not None and plan is not None:
                self._run_exit(leaving, plan, head_inputs)
        return handle

    def launch_chain(self, batches: Sequence[StepBatch]) -> list[StepHandle]:
        """See the protocol; steps are launched one by one while the program of their chain is being compiled.

        Raises:
          ValueError: a step cannot be in a chain.
        """
        if any(self.chains.chain_len(batch) != len(batches) for batch in batches):
            raise ValueError(f"a chain has {self.chains.length} steps that do nothing but decode plain requests")
        shape, variant = batches[0].shape, batches[0].variant
        if not self._choice.has_chain(shape, variant):
            return [self.launch(batch) for batch in batches]
        program = self._programs.get("chain", shape, len(batches), variant)
        handles = [StepHandle(batch, place=place) for place, batch in enumerate(batches)]
        for handle in handles:
            self._in_flight.enter(handle)
            self._in_flight.count_rows(shape)
        words = np.stack([pack_inputs(batch, shape, self._shapes) for batch in batches])
        arrays = self._arrays
        with _LAUNCHING:
            arrays.state, arrays.caches, arrays.ring, result = program(
                arrays.leaves, arrays.head_leaves, arrays.state, arrays.caches, arrays.ring, words
            )
            result.copy_to_host_async()
        for handle in handles:
            handle.result = result
        return handles

    def _plan_tick(self, handle: StepHandle) -> Tick:
        """Lets a step into the pipeline, moves the others on, and gets the programs for that; runs nothing yet."""
        shape = self._choice.shape(self._in_flight.enter(handle))
        self._in_flight.count_rows(shape)
        taps = self._tapping.upload(self._in_flight, shape)
        forward: ProgramKey = ("forward", shape) if taps is None else ("tapped", shape, taps.plan)
        batch = handle.batch
        if taps is None:
            self._choice.compile_ahead(
                shape, self._coming_shapes, batch.variant, _reported(batch.num_top), is_edited=batch.edited
            )
        return Tick(
            shape=shape,
            copy=self._plan_copies() if self._in_flight.num_page_copies else None,
            forward=Call(self._programs.get(*forward), pack_inputs(batch, shape, self._shapes)),
            taps=taps,
        )

    def _plan_copies(self) -> Call:
        size = self._choice.copy_size(self._in_flight.num_page_copies)
        return Call(self._programs.get("copy", size), self._in_flight.page_copies(size))

    def _run_tick(self, tick: Tick) -> HeadInputs:
        """Runs a tick; returns what the head needs to sample and score the step that leaves."""
        arrays = self._arrays
        if tick.copy is not None:
            arrays.caches = tick.copy.program(arrays.caches, tick.copy.words)
        arguments = (arrays.leaves, arrays.state, arrays.caches, arrays.ring, tick.forward.words)
        if tick.taps is None:
            arrays.state, arrays.caches, arrays.ring, head_inputs = tick.forward.program(*arguments)
            return head_inputs
        arrays.state, arrays.caches, arrays.ring, head_inputs, found = tick.forward.program(
            *arguments, tick.taps.rows, list(tick.taps.tables)
        )
        self._tapping.keep(found, tick.taps, self._in_flight, tick.shape)
        return head_inputs

    def _plan_exit(self, leaving: StepHandle, shape: StepShape, allowed: AllowedTokens) -> Exit:
        batch = leaving.batch
        samples = batch.has_logits
        functions = self._tapping.functions(leaving, shape.num_logits) if samples else None
        sample = None
        if functions is not None:
            sample = self._programs.get("sample_by", shape.num_logits, _reported(batch.num_top), functions.kinds)
        elif samples:
            sample = self._sampler(batch, shape.num_logits)
        return Exit(
            score=None if batch.targets is None else self._plan_score(batch.targets, shape),
            edits=self._plan_edits(batch.edits, allowed) if samples else (),
            sample=sample,
            functions=functions,
        )

    def _plan_score(self, wanted: Int32[np.ndarray, "P Q"], shape: StepShape) -> Call:
        targets = np.full(shape.num_prefill * PREFILL_BLOCK, NO_TARGET, np.int32)
        targets[: wanted.size] = wanted.ravel()
        return Call(self._programs.get("score", targets.size, MAX_LOGPROBS), targets)

    def _plan_edits(self, edits: SlotEdits, allowed: AllowedTokens) -> list[Call]:
        """Uploads of the logit edits of newly admitted sequences, and of the allowed tokens of constrained ones.

        A slot's edits are set right before its sequence is sampled for the first time. If they were set earlier, steps
        still in flight would count the tokens of the slot's previous sequence in them.
        """
        calls = []
        for row, (slot, is_edited) in enumerate(zip(edits.slots.tolist(), edits.is_edited.tolist(), strict=True)):
            if is_edited or slot in self._edited_slots:
                (self._edited_slots.add if is_edited else self._edited_slots.discard)(slot)
                calls += [Call(self._programs.get("edit"), words) for words in pack_edits(edits, row)]
        uploads = pack_allowed(allowed, self._step_programs.padded_vocab_size)
        return calls + [Call(self._programs.get("allow"), words) for words in uploads]

    def _sampler(self, batch: StepBatch, num_logits: int) -> jax.stages.Compiled:
        num_top = _reported(batch.num_top)
        return self._programs.get(*self._choice.sampler(num_logits, batch.variant, num_top, is_edited=batch.edited))

    def _run_exit(self, leaving: StepHandle, plan: Exit, inputs: HeadInputs) -> None:
        """Samples and scores the step that leaves, and starts copying its results to the host."""
        arrays = self._arrays
        if plan.score is not None:
            leaving.scores = plan.score.program(arrays.head_leaves, inputs.prompts, plan.score.words)
            leaving.scores.copy_to_host_async()
        if plan.sample is None:
            leaving.result = inputs.rows[0]  # no tokens, but an array for collect to wait for
            return
        for upload in plan.edits:
            arrays.edits = upload.program(arrays.edits or self._step_programs.allocate_edits(), upload.words)
        if leaving.batch.edited:
            functions = () if plan.functions is None else (plan.functions.rows, plan.functions.tables)
            arrays.state, arrays.edits, leaving.result = plan.sample(
                arrays.head_leaves, arrays.state, arrays.edits, inputs.hidden, inputs.rows, *functions
            )
        else:
            arrays.state, leaving.result = plan.sample(arrays.head_leaves, arrays.state, inputs.hidden, inputs.rows)
        leaving.result.copy_to_host_async()

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step that has left the pipeline and returns its results; see the protocol.

        Raises:
          ValueError: the step is still in the pipeline.
        """
        if handle.result is None:
            raise ValueError(
                f"the step is not through: {self._shapes.num_stages} pipeline stages need as many launches; launch "
                f"StepBatch.idle"
            )
        batch = handle.batch
        words = np.asarray(handle.result)  # with the next lines, the one place where the host reads the device
        words = words if handle.place is None else words[handle.place]
        scores = None if handle.scores is None else _logprobs(np.asarray(handle.scores))
        failed = None
        if batch.has_logits and batch.taps is not None and batch.taps.logit_kinds:
            words, failed = words[:, :-1], words[:, -1]
        captures = self._tapping.read(handle, failed)
        if not batch.has_logits:
            return StepResult(token_ids=np.zeros(0, np.int32), scores=scores, captures=captures)
        logprobs = None if batch.num_top is None else _logprobs(words[:, 1:])
        return StepResult(token_ids=words[:, 0], logprobs=logprobs, scores=scores, captures=captures)

    def logits(self, batch: StepBatch) -> Float[np.ndarray, "M V"]:
        """Computes a batch like launch, but returns the float32 logits of its logit rows and samples nothing.

        For research and tests: the logits are gathered on the host. No step that samples may be in flight.
        """
        shape, hidden = self._advance(batch)
        for _ in range(self._shapes.num_stages - 1):
            shape, hidden = self._advance(StepBatch.idle(self._shapes))
        program = self._programs.get("logits", shape.num_logits)
        return np.asarray(program(self._arrays.head_leaves, hidden))[: batch.shape.num_logits, : self._vocab_size]

    @property
    def sites(self) -> Sites:
        """See the protocol; the model is traced at the first use."""
        return self._tapping.sites

    def check_captures(self, sites: Sequence[Site]) -> None:
        """See the protocol."""
        self._tapping.check_captures(sites)

    def check_hooks(self, kinds: Collection[HookKind]) -> None:
        """See the protocol."""
        self._tapping.check_hooks(kinds)

    def head_logits(self, hidden: Float[np.ndarray, "M D"]) -> Float32[np.ndarray, "M V"]:
        """See the protocol."""
        blocks = []
        for start in range(0, len(hidden), SCORE_BLOCK):
            block = hidden[start : start + SCORE_BLOCK]
            size = 1 << (len(block) - 1).bit_length()
            padded = np.zeros((size, block.shape[1]), block.dtype)
            padded[: len(block)] = block
            program = self._programs.get("logits", size)
            with _LAUNCHING:
                logits = program(self._arrays.head_leaves, padded)
            blocks.append(np.asarray(logits)[: len(block), : self._vocab_size])
        return np.concatenate(blocks)

    def _advance(self, batch: StepBatch) -> tuple[StepShape, jax.Array]:
        """Runs a tick that samples nothing; returns its shape and the hidden states of the step that leaves."""
        tick = self._plan_tick(StepHandle(batch))
        with _LAUNCHING:
            return tick.shape, self._run_tick(tick).hidden

    def warmup(self, *, background: bool = False) -> None:
        """Compiles the programs that serving needs: forward, samplers, page copies, scoring, logit edits.

        Only the samplers of wide beam searches, with more than MAX_LOGPROBS candidates, are left to their first use.

        Args:
          background: whether to return when there are enough programs for every step, and to compile the others in the
            background, while steps run larger programs in their stead.
        """
        if not background:
            self._programs.compile_all(self._choice.all_programs())
            return
        self._programs.compile_all(self._choice.covering_programs())
        self._programs.compile_in_background(self._choice.all_programs())

    def close(self) -> None:
        """Frees weights, KV pages and state; the wrapper cannot be used afterwards."""
        self._free()
        self._programs.clear()

    def _free(self) -> None:
        self._tapping.close()
        for array in self._arrays.all:
            if not array.is_deleted():
                array.delete()

    def compiled(self, name: str, *arguments: Any) -> jax.stages.Compiled:
        """A program of StepPrograms by name, for reading its memory plan and text."""
        return self._programs.get(name, *arguments)


def _reported(num_top: int | None) -> int | None:
    """How many of the most likely tokens the program reports if num_top are asked for.

    One program with MAX_LOGPROBS of them serves all requests; only a wide beam search asks for more, and gets the next
    power of two. None, for no log-probabilities, stays None.
    """
    if num_top is None or num_top <= MAX_LOGPROBS:
        return None if num_top is None else MAX_LOGPROBS
    return 1 << (num_top - 1).bit_length()


def _logprobs(columns: Int32[np.ndarray, "M J"]) -> LogprobArrays:
    """Takes apart the columns that sample_step.score_step returns."""
    num_top = (columns.shape[1] - 2) // 2
    return LogprobArrays(
        logprob=np.ascontiguousarray(columns[:, 0]).view(np.float32),
        rank=columns[:, 1],
        top_ids=columns[:, 2 : 2 + num_top],
        top_logprobs=np.ascontiguousarray(columns[:, 2 + num_top :]).view(np.float32),
    )
