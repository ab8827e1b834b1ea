"""The taps of each step: which rows need which hooks, and what a step's captures belong to.

Owns: the rows of the hooks' parameters, the choice of sites and hooks for a step, keeping what comes back.
Does not know: devices, how values are captured. Never imports jax.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from jaxinfer.engine.schedule import DecodeRow, PrefillChunk, Schedule, num_right
from jaxinfer.engine.sequence import NO_SLOT, SequenceState
from jaxinfer.interventions import Hook, HookKind
from jaxinfer.sites import FINAL_NORM, LOGITS
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.step_shapes import StepShape, StepShapes
from jaxinfer.wrappers.step_taps import StepCaptures, StepTaps

Rows = DecodeRow | PrefillChunk


class TapPlanner:
    """Makes the taps of steps, and gives each sequence with hooks a row for their parameters.

    There are as many rows as sequences can be in all stages together. A row that is given back is taken again after all
    others, by when no step that needs its parameters is left in the pipeline.

    Args:
      shapes: the shapes of steps.
    """

    def __init__(self, shapes: StepShapes):
        self._free = deque(range(1, shapes.num_slots * shapes.num_stages + 1))
        self._rows: dict[SequenceState, int] = {}
        self._placed: dict[SequenceState, set[HookKind]] = {}

    def plan(self, schedule: Schedule, shape: StepShape) -> StepTaps | None:
        """The taps of the step that is launched next; None if it needs none."""
        self.give_back()
        if not any(kind.is_tapped for kind in schedule.kinds):
            return None
        captured: set[str] = set()
        needed: dict[HookKind, list[tuple[range | int, int]]] = {}
        placed: list[tuple[int, Hook]] = []
        for rows, place in _places(schedule):
            sequence, request = rows.sequence, rows.sequence.request
            positions = _positions(rows)
            if sequence.captured is not None and sequence.captured.wanted(positions.start, positions.stop):
                captured.update(_source(site.name) for site in sequence.captured.sites)
            for hook in request.hooks:
                if hook.span.within(positions.start, positions.stop):
                    needed.setdefault(hook.kind, []).append((place, self._place(sequence, hook, placed)))
        logit_rows = self._logit_rows(schedule, shape, placed)
        if not captured and not needed and not logit_rows:
            return None
        kinds = tuple(needed)
        logit_kinds = tuple(sorted(logit_rows, key=lambda kind: kind.ordinal))
        decode_rows = np.zeros((len(kinds), shape.num_decode), np.int32)
        prefill_rows = np.zeros((len(kinds), shape.num_prefill), np.int32)
        for number, entries in enumerate(needed.values()):
            for place, row in entries:
                if isinstance(place, range):
                    prefill_rows[number, place.start : place.stop] = row
                else:
                    decode_rows[number, place] = row
        return StepTaps(
            captured=frozenset(captured),
            kinds=kinds,
            decode_rows=decode_rows,
            prefill_rows=prefill_rows,
            logit_kinds=logit_kinds,
            logit_rows=np.array([logit_rows[kind] for kind in logit_kinds], np.int32).reshape(
                len(logit_kinds), shape.num_logits
            ),
            placed=tuple(placed),
            live=frozenset(kind for kinds in self._placed.values() for kind in kinds),
        )

    def _logit_rows(
        self, schedule: Schedule, shape: StepShape, placed: list[tuple[int, Hook]]
    ) -> dict[HookKind, np.ndarray]:
        """For each function of logits that the step needs: the row of each logit row in its table."""
        found: dict[HookKind, np.ndarray] = {}
        first = 0
        for rows in schedule.sampled:
            for hook in rows.sequence.request.logits_hooks:
                row = self._place(rows.sequence, hook, placed)
                found.setdefault(hook.kind, np.zeros(shape.num_logits, np.int32))[first : first + rows.num_sampled] = (
                    row
                )
            first += rows.num_sampled
        return found

    def _place(self, sequence: SequenceState, hook: Hook, placed: list[tuple[int, Hook]]) -> int:
        """The row of a sequence's parameters; a hook whose parameters are not there yet is added to `placed`."""
        if sequence not in self._rows:
            self._rows[sequence] = self._free.popleft()
            self._placed[sequence] = set()
        row = self._rows[sequence]
        if hook.kind not in self._placed[sequence]:
            self._placed[sequence].add(hook.kind)
            placed.append((row, hook))
        return row

    def give_back(self) -> None:
        """Takes back the rows of sequences that have lost their slots, the ended ones among them."""
        for sequence in [sequence for sequence in self._rows if sequence.slot == NO_SLOT]:
            self._free.append(self._rows.pop(sequence))
            del self._placed[sequence]


def keep_captures(
    schedule: Schedule, token_ids: Sequence[int], found: StepCaptures, wrapper: AbstractModelInferenceWrapper
) -> None:
    """Adds what a step has captured to its sequences; token_ids are the tokens that it has sampled."""
    for rows, place, positions in _computed(schedule, token_ids):
        captured = rows.sequence.captured
        wanted = range(0) if captured is None else captured.wanted(positions.start, positions.stop)
        if captured is None or not wanted:
            continue
        kept = slice(wanted.start - positions.start, wanted.stop - positions.start)
        for site in captured.sites:
            values = _values(found, _source(site.name), place)[kept]
            captured.add(site.name, wanted, wrapper.head_logits(values) if site.name == LOGITS else values)
        captured.finish_adding(wanted)


def failed_hooks(
    schedule: Schedule, token_ids: Sequence[int], found: StepCaptures, taps: StepTaps
) -> Iterator[tuple[SequenceState, ValueError]]:
    """The sequences for which a hook gave a value that cannot be used, each with the error that says so."""
    kinds = taps.kinds
    for rows, place, positions in _computed(schedule, token_ids):
        if isinstance(place, range):
            failed = found.failed_prefill[place.start : place.stop].ravel()[: len(positions)]
        else:
            failed = found.failed_decode[place : place + 1]
        if failed.any():
            first = int(failed.argmax())
            number, position = int(failed[first]), positions[first]
            if number <= len(kinds):
                yield rows.sequence, ValueError(f"{kinds[number - 1]} gave NaN or infinity at position {position}")
            elif rows.sequence.request.hooks:
                reason = "the interventions drive the model to NaN or infinity"
                yield rows.sequence, ValueError(f"{reason}, first at position {position}; make them smaller")
    first = 0
    for rows in schedule.sampled:
        number = int(found.failed_logits[first])  # such a sequence has no drafts, so it has one logit row
        if number and rows.sequence.finish_reason is None:
            function = taps.logit_kinds[number - 1].intervention
            end = _positions(rows).stop
            yield rows.sequence, ValueError(f"{function} gave NaN or infinity, or left no token, at position {end}")
        first += rows.num_sampled


def _positions(rows: Rows) -> range:
    """The positions that a row computes."""
    if isinstance(rows, PrefillChunk):
        return range(rows.start, rows.start + len(rows.token_ids))
    return range(rows.position, rows.position + 1)


def _computed(schedule: Schedule, token_ids: Sequence[int]) -> Iterator[tuple[Rows, int | range, range]]:
    """The rows of unfinished sequences, with their places and the positions of their text that they have computed.

    A wrong draft is not part of the text, nor are the drafts after it.
    """
    first = 0
    for rows, place in _places(schedule):
        sampled = token_ids[first : first + rows.num_sampled]
        first += rows.num_sampled
        positions = _positions(rows)
        if rows.drafts:
            positions = positions[: _num_kept(rows, sampled)]
        if rows.sequence.finish_reason is None:
            yield rows, place, positions


def _num_kept(rows: Rows, sampled: Sequence[int]) -> int:
    """How many tokens of a row with drafts are part of the text: right ones, up to the token that ends it."""
    count = 1 + num_right(rows.drafts, sampled)
    ends = rows.sequence.request.stop_token_ids
    return next((number + 1 for number, token_id in enumerate(sampled[:count]) if token_id in ends), count)


def _places(schedule: Schedule) -> Iterator[tuple[Rows, int | range]]:
    """Every decode row with its number, and every chunk with the numbers of its prefill rows."""
    yield from ((decode, row) for row, decode in enumerate(schedule.decodes))
    start = 0
    for chunk in schedule.prefills:
        yield chunk, range(start, start + chunk.num_rows)
        start += chunk.num_rows


def _values(found: StepCaptures, name: str, place: int | range) -> np.ndarray:
    """The values of a row's tokens at a site, one after the other."""
    if isinstance(place, range):
        rows = found.prefill[name][place.start : place.stop]
        return rows.reshape(-1, *rows.shape[2:])
    return found.decode[name][place : place + 1]


def _source(site: str) -> str:
    """The site whose values a step has to capture: logits are computed from the final norm's afterwards."""
    return FINAL_NORM if site == LOGITS else site
