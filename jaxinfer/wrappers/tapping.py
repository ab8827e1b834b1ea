"""The taps of the steps in flight: which program they take, what it needs, and what comes back.

Owns: the plan of each tick, the uploaded rows of hooks, the captured arrays until they are read.
Does not know: what happens at a site (layers/taps.py), requests.

In a pipeline the batches in flight are in different stages. A program captures and changes what any of them wants; the
uploaded rows say for each stage which of its tokens a hook changes, and a captured array has a part for each stage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jaxtyping import Int32

from jaxinfer.config.sizes import size_text
from jaxinfer.interventions import HookKind, HookTable
from jaxinfer.layers.taps import LocalHook, TapPlan
from jaxinfer.logits_functions import LogitsFunction
from jaxinfer.sites import LOGITS, PROBS, Site, Sites
from jaxinfer.wrappers.hook_tables import HookTables
from jaxinfer.wrappers.in_flight import InFlight, StepHandle
from jaxinfer.wrappers.programs import ProgramCache
from jaxinfer.wrappers.site_map import SiteMap
from jaxinfer.wrappers.step_arrays import TapResults
from jaxinfer.wrappers.step_programs import StepPrograms
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape, StepShapes
from jaxinfer.wrappers.step_taps import StepCaptures, StepTaps

MAX_PROGRAMS = 256
"""Programs with taps that are kept, those used last."""
MAX_STAND_INS = 256
"""How many steps a program that does more than is wanted may run, before one of their own is compiled."""


@dataclass(frozen=True, slots=True)
class TapUpload:
    """What a tapped program takes beside the arguments of a plain one.

    Args:
      plan: what happens at the sites.
      rows: int32[S, J, R + P], for each stage and each hook of the plan the row of each row in the hook's table.
      tables: one for each hook of the plan.
    """

    plan: TapPlan
    rows: Int32[np.ndarray, "S J N"]
    tables: list[HookTable]


@dataclass(frozen=True, slots=True)
class FunctionUpload:
    """What a sampler with the user's functions of logits takes beside the arguments of sample_edited.

    Args:
      kinds: the functions.
      rows: int32[I, M], the row of each logit row in the table of each function, or 0.
      tables: one for each function.
    """

    kinds: tuple[HookKind, ...]
    rows: Int32[np.ndarray, "I M"]
    tables: list[HookTable]


@dataclass(frozen=True, slots=True)
class _Found:
    """What a tick has found for a step that was in a stage then."""

    results: TapResults
    plan: TapPlan
    shape: StepShape
    stage: int

    def part(self, array: jax.Array) -> np.ndarray:
        """The part of an array of TapResults that is the step's, one entry for each token."""
        size = self.shape.num_tokens
        return np.asarray(array)[self.stage * size : (self.stage + 1) * size]


class Tapping:
    """The taps of a model's steps.

    Args:
      programs: the compiled programs.
      step_programs: traces them.
      shapes: the shapes of steps.
      num_layers, vocab_size: of the model.
      max_bytes: limit of the captures of one step, and of the parameters of one kind of hook.
    """

    def __init__(
        self,
        programs: ProgramCache,
        step_programs: StepPrograms,
        shapes: StepShapes,
        *,
        num_layers: int,
        vocab_size: int,
        max_bytes: int,
    ):
        self._step_programs = step_programs
        self._shapes = shapes
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._map = SiteMap(num_layers, shapes.num_stages)
        self._tables = HookTables(programs, step_programs, max_bytes=max_bytes)
        self._programs = programs
        self._known: dict[tuple[StepShape, TapPlan], None] = {}  # the programs that were used, the last one last
        self._num_stand_ins: Counter[tuple[StepShape, TapPlan]] = Counter()
        self._known_functions: dict[tuple[int, tuple[HookKind, ...]], None] = {}  # the same of samplers

    @cached_property
    def sites(self) -> Sites:
        """The sites of the model, found by tracing it once."""
        found = self._step_programs.sites()

        def site(name: str, local: str) -> Site:
            *dims, last = found[local].shape
            if name.endswith(PROBS):
                last = self._shapes.max_model_len
            return Site(name=name, dims=(*dims, last), dtype=str(found[local].dtype))

        sites = [site(*pair) for pair in self._map.names(found)]
        return Sites([*sites, Site(name=LOGITS, dims=(self._vocab_size,), dtype="float32")])

    def check_captures(self, sites: Sequence[Site]) -> None:
        """Refuses captures that could take too much memory on the devices.

        Raises:
          ValueError: the values of one step exceed the limit.
        """
        values = sum(math.prod(site.dims) for site in sites if site.name != LOGITS)
        num_bytes = values * np.dtype(np.float32).itemsize * self._shapes.largest_shape().num_tokens
        if num_bytes > self._max_bytes:
            raise ValueError(
                f"the captures of a step could take {size_text(num_bytes)}, the limit is "
                f"{size_text(self._max_bytes)}; name fewer sites, lower max_num_batched_tokens or raise "
                f"max_research_bytes"
            )

    def check_hooks(self, kinds: Collection[HookKind]) -> None:
        """Refuses the hooks of a request if they cannot be part of a program; see HookTables."""
        if kinds:
            self._tables.check_size(kinds)
        for kind in kinds:
            is_of_logits = isinstance(kind.intervention, LogitsFunction)
            self._tables.check(kind, None if is_of_logits else self.sites[kind.site])

    def upload(self, in_flight: InFlight, shape: StepShape) -> TapUpload | None:
        """What the next tick needs for the taps of all batches in flight; None if none of them has any.

        The parameters of requests that the newest batch brings are put into their tables.
        """
        handles = in_flight.handles
        taps = [handle.batch.taps for handle in handles if handle.batch.taps is not None]
        newest = handles[0].batch.taps
        if newest is not None:
            needed = {kind for entry in taps for kind in (*entry.kinds, *entry.logit_kinds)}
            dropped = self._tables.drop_unused(needed | newest.live)
            self._forget(dropped)
            self._tables.place(newest.placed)
        wanted = self._plan(taps)
        if wanted == TapPlan():
            return None
        plan = self._stand_in(shape, wanted)
        self._remember(shape, plan)
        return TapUpload(plan, self._rows(handles, plan, shape), self._tables.of(hook.kind for hook in plan.hooks))

    def functions(self, handle: StepHandle, num_logits: int) -> FunctionUpload | None:
        """What the sampler of a step needs for the user's functions of logits; None if the step has none.

        As with other taps, a program that was used before and has more functions is taken again.
        """
        taps = handle.batch.taps
        if taps is None or not taps.logit_kinds:
            return None
        wanted = taps.logit_kinds
        known = (kinds for size, kinds in self._known_functions if size == num_logits and {*wanted} <= {*kinds})
        kinds = next(known, wanted)
        self._known_functions.pop((num_logits, kinds), None)
        self._known_functions[num_logits, kinds] = None
        if len(self._known_functions) > MAX_PROGRAMS:
            oldest = next(iter(self._known_functions))
            del self._known_functions[oldest]
            self._programs.forget(lambda key: key[0] == "sample_by" and (key[1], key[3]) == oldest)
        rows = np.zeros((len(kinds), num_logits), np.int32)
        for own, kind in zip(taps.logit_rows, wanted, strict=True):
            rows[kinds.index(kind), : len(own)] = own
        handle.functions = kinds
        return FunctionUpload(kinds, rows, self._tables.of(kinds))

    def keep(self, results: TapResults, upload: TapUpload, in_flight: InFlight, shape: StepShape) -> None:
        """Hands what a tick has found to the steps in flight, and starts copying it to the host."""
        results.failed.copy_to_host_async()
        for stage, handle in enumerate(in_flight.handles):
            if handle.batch.taps is not None:
                handle.tapped.append(_Found(results, upload.plan, shape, stage))
                for name in handle.batch.taps.captured:
                    site_stage, local = self._map.local(name)
                    if site_stage == stage:
                        results.captured[local].copy_to_host_async()

    def read(self, handle: StepHandle, failed_logits: Int32[np.ndarray, " M"] | None) -> StepCaptures | None:
        """What a step that is through has captured; None if it has no taps.

        Args:
          handle: the step.
          failed_logits: what the sampler has found of the user's functions of logits; None without any.
        """
        taps, batch = handle.batch.taps, handle.batch
        if taps is None:
            return None
        if failed_logits is None:
            failed_logits = np.zeros(len(batch.logit_slots), np.int32)
        else:
            numbers = [0, *(1 + taps.logit_kinds.index(k) if k in taps.logit_kinds else 0 for k in handle.functions)]
            failed_logits = np.array(numbers, np.int32)[failed_logits]
        num_decode, num_prefill = len(batch.decode_slots), len(batch.prefill_slots)

        def rows(values: np.ndarray, shape: StepShape) -> tuple[np.ndarray, np.ndarray]:
            """The decode rows and the prefill rows of the batch, without what the program's shape has beyond them."""
            prompts = values[shape.num_decode :].reshape(shape.num_prefill, shape.row_len, *values.shape[1:])
            return values[:num_decode], prompts[:num_prefill]

        decode, prefill = {}, {}
        row_len = handle.tapped[-1].shape.row_len if handle.tapped else PREFILL_BLOCK
        failed = np.zeros(num_decode, np.int32), np.zeros((num_prefill, row_len), np.int32)
        for found in handle.tapped:
            for name in taps.captured:
                stage, local = self._map.local(name)
                if stage == found.stage:
                    decode[name], prefill[name] = rows(found.part(found.results.captured[local]), found.shape)
            own = (1 + taps.kinds.index(h.kind) if h.kind in taps.kinds else 0 for h in found.plan.hooks)
            numbers = [0, *own, 1 + len(taps.kinds)]
            parts = rows(np.array(numbers, np.int32)[found.part(found.results.failed)], found.shape)
            failed = tuple(np.where(before, before, new) for before, new in zip(failed, parts, strict=True))
        handle.tapped.clear()  # frees the devices' arrays
        return StepCaptures(
            decode=decode,
            prefill=prefill,
            failed_decode=failed[0],
            failed_prefill=failed[1],
            failed_logits=failed_logits,
        )

    def close(self) -> None:
        """Frees the parameters of hooks; what was placed has to be placed anew."""
        self._tables.close()

    def _plan(self, taps: Sequence[StepTaps]) -> TapPlan:
        kinds = dict.fromkeys(kind for entry in taps for kind in entry.kinds)
        hooks = tuple(
            LocalHook(kind=kind, site=self._map.local(kind.site)[1])
            for kind in sorted(kinds, key=lambda kind: kind.ordinal)
        )
        captured = frozenset(self._map.local(name)[1] for entry in taps for name in entry.captured)
        return TapPlan(captured=captured, hooks=hooks)

    def _forget(self, dropped: Sequence[HookKind]) -> None:
        """Forgets the programs of kinds whose tables were dropped."""
        if dropped:
            self._known = {key: None for key in self._known if not any(hook.kind in dropped for hook in key[1].hooks)}
            kept = [key for key in self._known_functions if not any(kind in dropped for kind in key[1])]
            self._known_functions = dict.fromkeys(kept)
            self._num_stand_ins.clear()

    def _stand_in(self, shape: StepShape, wanted: TapPlan) -> TapPlan:
        """A plan whose program was used before and does all that is wanted, else the wanted one.

        For a while that costs less than compiling, even if the program does much in vain.
        """
        known = (plan for size, plan in self._known if size == shape and plan.covers(wanted))
        plan = wanted if (shape, wanted) in self._known else next(known, wanted)
        if plan != wanted:
            if len(self._num_stand_ins) > MAX_PROGRAMS:
                self._num_stand_ins.clear()
            self._num_stand_ins[shape, wanted] += 1
            if self._num_stand_ins[shape, wanted] > MAX_STAND_INS:
                return wanted
        return plan

    def _remember(self, shape: StepShape, plan: TapPlan) -> None:
        self._known.pop((shape, plan), None)
        self._known[shape, plan] = None
        if len(self._known) > MAX_PROGRAMS:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._programs.forget(lambda key: key == ("tapped", *oldest))

    def _rows(self, handles: Sequence[StepHandle], plan: TapPlan, shape: StepShape) -> Int32[np.ndarray, "S J N"]:
        rows = np.zeros((self._shapes.num_stages, len(plan.hooks), shape.num_decode + shape.num_prefill), np.int32)
        places = {hook.kind: number for number, hook in enumerate(plan.hooks)}
        for stage, handle in enumerate(handles):
            taps = handle.batch.taps
            for index, kind in enumerate(() if taps is None else taps.kinds):
                if taps is not None and self._map.local(kind.site)[0] == stage:
                    own = rows[stage, places[kind]]
                    decode, prefill = taps.decode_rows[index], taps.prefill_rows[index]
                    own[: len(decode)] = decode
                    own[shape.num_decode : shape.num_decode + len(prefill)] = prefill
        return rows
