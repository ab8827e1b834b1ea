"""Turns a schedule into the arrays of a step.

Owns: the layout of a schedule's rows in a padded StepBatch, and the choice of the sampler that a batch needs.
Does not know: queues, devices. Never imports jax.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxinfer.engine.schedule import PrefillChunk, Schedule
from jaxinfer.engine.sequence import SequenceKind, SequenceState
from jaxinfer.engine.step_taps import TapPlanner
from jaxinfer.request import EditKind, LogitEdits, Request
from jaxinfer.wrappers.step_batch import (
    NO_TARGET,
    SAMPLING_FIELDS,
    AllowedTokens,
    SamplerVariant,
    SlotEdits,
    StepBatch,
    pack_sampling,
)
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape, StepShapes

NO_EDITS = LogitEdits()


def make_batch(
    schedule: Schedule,
    shapes: StepShapes,
    masks: Mapping[int, np.ndarray] | None = None,
    taps: TapPlanner | None = None,
) -> StepBatch:
    """The arrays of a schedule, in the smallest shape that holds it.

    The logit rows are in the order of Schedule.sampled.

    Args:
      schedule: the rows of the step.
      shapes: the shapes of steps.
      masks: by slot, uint32[ceil(V / 32)], the allowed tokens of the constrained sequences that are sampled with the
        step's launch (StepBatch.allowed).
      taps: plans what the step captures and changes at the sites of the model; None for nothing.
    """
    blocks = [block for chunk in schedule.prefills for block in _blocks(chunk)]
    scored = any(chunk.scored for chunk in schedule.prefills)
    shape = shapes.shape(
        num_decode=len(schedule.decodes),
        num_prefill=len(blocks),
        num_logits=len(schedule.decodes) + sum(chunk.num_sampled for chunk in schedule.prefills),
        row_len=max((min(len(chunk.token_ids), PREFILL_BLOCK) for chunk in schedule.prefills), default=PREFILL_BLOCK),
        scored=scored,
    )
    kinds = schedule.sampled_kinds
    return StepBatch(
        shape=shape,
        dump_slot=shapes.num_slots,
        **_decode_arrays(schedule, shape, shapes),
        **_chunk_arrays(schedule, shape, shapes),
        **_prefill_arrays(blocks, shape, shapes),
        **_logit_arrays(schedule, shape, shapes),
        page_copies=np.array(schedule.page_copies, np.int32).reshape(-1, 2),
        variant=needed_variant(kinds),
        num_top=max((kind.num_top for kind in kinds if kind.num_top is not None), default=None),
        targets=_targets(schedule, shape.num_prefill) if scored else None,
        edited=any(kind.is_edited for kind in kinds),
        edits=_slot_edits([chunk for chunk in schedule.prefills if chunk.num_sampled]),
        allowed=_allowed_tokens(masks or {}),
        taps=None if taps is None else taps.plan(schedule, shape),
    )


def _decode_arrays(schedule: Schedule, shape: StepShape, shapes: StepShapes) -> dict[str, np.ndarray]:
    slots = np.full(shape.num_decode, shapes.num_slots, np.int32)
    page_index = np.full(shape.num_decode, shapes.table_width, np.int32)
    page_id = np.zeros(shape.num_decode, np.int32)
    slots[: len(schedule.decodes)] = [decode.slot for decode in schedule.decodes]
    for row, decode in enumerate(schedule.decodes):
        if decode.new_page is not None:
            page_index[row], page_id[row] = decode.new_page
    return {"decode_slots": slots, "decode_page_index": page_index, "decode_page_id": page_id}


def _chunk_arrays(schedule: Schedule, shape: StepShape, shapes: StepShapes) -> dict[str, np.ndarray]:
    count = shapes.num_chunks(shape)
    slots = np.full(count, shapes.num_slots, np.int32)
    pages = np.zeros((count, shapes.table_width), np.int32)
    numbers = np.zeros((count, SAMPLING_FIELDS), np.int32)
    for number, chunk in enumerate(schedule.prefills):
        slots[number] = chunk.slot
        pages[number, : len(chunk.pages)] = chunk.pages
        numbers[number] = _numbers(chunk.sequence.request)
    return {"chunk_slots": slots, "chunk_pages": pages, "chunk_sampling": numbers}


def _prefill_arrays(
    blocks: Sequence[tuple[PrefillChunk, int]], shape: StepShape, shapes: StepShapes
) -> dict[str, np.ndarray]:
    slots = np.full(shape.num_prefill, shapes.num_slots, np.int32)
    start, length = np.zeros((2, shape.num_prefill), np.int32)
    tokens = np.zeros((shape.num_prefill, PREFILL_BLOCK), np.int32)
    for row, (chunk, first) in enumerate(blocks):
        token_ids = chunk.token_ids[first : first + PREFILL_BLOCK]
        slots[row], start[row], length[row] = chunk.slot, chunk.start + first, len(token_ids)
        tokens[row, : length[row]] = token_ids
    return {"prefill_slots": slots, "prefill_start": start, "prefill_len": length, "prefill_tokens": tokens}


def _logit_arrays(schedule: Schedule, shape: StepShape, shapes: StepShapes) -> dict[str, np.ndarray]:
    index = np.zeros(shape.num_logits, np.int32)
    slots = np.full(shape.num_logits, shapes.num_slots, np.int32)
    feeds = np.zeros(shape.num_logits, bool)
    row = len(schedule.decodes)
    index[:row] = np.arange(row)
    slots[:row] = [decode.slot for decode in schedule.decodes]
    feeds[:row] = True
    for chunk, first in first_tokens(schedule):
        if chunk.num_sampled:
            next_row = row + chunk.num_sampled
            end = shapes.max_decode + first + len(chunk.token_ids)
            index[row:next_row] = range(end - chunk.num_sampled, end)
            slots[row:next_row] = chunk.slot
            feeds[next_row - 1] = True  # only the last row of each sequence
            row = next_row
    return {"logit_index": index, "logit_slots": slots, "logit_feeds": feeds}


def _allowed_tokens(masks: Mapping[int, np.ndarray]) -> AllowedTokens:
    if not masks:
        return AllowedTokens.none()
    return AllowedTokens(slots=np.array(list(masks), np.int32), words=np.stack(list(masks.values())))


def first_tokens(schedule: Schedule) -> Iterator[tuple[PrefillChunk, int]]:
    """Every chunk with the index of its first token among all tokens of the prefill segment, padding included.

    A chunk of 40 tokens fills 3 rows of 16, so the chunk after it begins at index 48.
    """
    row = 0
    for chunk in schedule.prefills:
        yield chunk, row * PREFILL_BLOCK
        row += chunk.num_rows


def _targets(schedule: Schedule, num_rows: int) -> np.ndarray:
    """The prompt tokens to score, each in the place of the token in front of it; NO_TARGET elsewhere."""
    targets = np.full(num_rows * PREFILL_BLOCK, NO_TARGET, np.int32)
    for chunk, first in first_tokens(schedule):
        start = first + chunk.scored.start - chunk.start
        next_tokens = chunk.sequence.token_ids[chunk.scored.start + 1 : chunk.scored.stop + 1]
        targets[start : start + len(next_tokens)] = next_tokens
    return targets.reshape(num_rows, PREFILL_BLOCK)


def _blocks(chunk: PrefillChunk) -> Iterator[tuple[PrefillChunk, int]]:
    """The prefill rows of a chunk, each as the chunk and the index of the row's first token in it."""
    yield from ((chunk, first) for first in range(0, len(chunk.token_ids), PREFILL_BLOCK))


def needed_variant(requests: Iterable[Request | SequenceKind]) -> SamplerVariant:
    """The cheapest sampler that can serve all these requests, or all sequences of these kinds.

    The candidates sampler looks at the most likely tokens, and falls back to the full sampler where these are too few.
    A random row without a filter may sample any token, so they are always too few for it: a batch that mixes such rows
    with filtered ones takes the full sampler at once.
    """
    filtered = [request.is_filtered for request in requests if request.is_random]
    if not filtered:
        return SamplerVariant.GREEDY
    if not any(filtered):
        return SamplerVariant.UNFILTERED
    return SamplerVariant.CANDIDATES if all(filtered) else SamplerVariant.FULL


def _slot_edits(chunks: Sequence[PrefillChunk]) -> SlotEdits:
    """The logit edits of sequences whose next token will be the first since their admission."""
    if not chunks:
        return SlotEdits.none()
    sequences = [chunk.sequence for chunk in chunks]
    edits = [sequence.request.edits or NO_EDITS for sequence in sequences]
    entries = [_entries(sequence) for sequence in sequences]
    return SlotEdits(
        slots=np.array([chunk.slot for chunk in chunks], np.int32),
        is_edited=np.array([sequence.request.is_edited for sequence in sequences]),
        bias_of_others=np.array([0 if edit.allowed_token_ids is None else -math.inf for edit in edits], np.float32),
        penalties=np.array(
            [(edit.repetition_penalty, edit.presence_penalty, edit.frequency_penalty) for edit in edits], np.float32
        ),
        min_position=np.array(
            [
                min(len(sequence.request.known_token_ids) + edit.min_tokens, sequence.max_total_len)
                for sequence, edit in zip(sequences, edits, strict=True)
            ],
            np.int32,
        ),
        num_entries=np.array([len(kinds) for kinds, _, _ in entries], np.int32),
        kinds=np.concatenate([kinds for kinds, _, _ in entries]),
        token_ids=np.concatenate([token_ids for _, token_ids, _ in entries]),
        values=np.concatenate([values for _, _, values in entries]),
    )


def _entries(sequence: SequenceState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kinds, token ids and values of a sequence's edits; its penalties count the tokens that it has so far."""
    request, edits = sequence.request, sequence.request.edits or NO_EDITS
    counts_outputs = request.edits is not None or request.logits_hooks  # which may ask for the counts
    bias = dict(edits.logit_bias)
    if edits.allowed_token_ids is not None:
        bias = {token_id: bias.get(token_id, 0.0) for token_id in edits.allowed_token_ids}
    tokens = {
        EditKind.BIAS: list(bias),
        EditKind.MASKED_UNTIL_MIN_TOKENS: list(request.stop_token_ids) if edits.min_tokens else [],
        EditKind.PROMPT: list(set(request.prompt_token_ids)) if edits.repetition_penalty != 1 else [],
        EditKind.OUTPUT: sequence.token_ids[len(request.prompt_token_ids) :] if counts_outputs else [],
    }
    kinds = np.repeat(np.array(list(tokens), np.int32), list(map(len, tokens.values())))
    values = np.zeros(len(kinds), np.float32)
    values[: len(bias)] = list(bias.values())
    return kinds, np.array([token_id for ids in tokens.values() for token_id in ids], np.int32), values


def _numbers(request: Request) -> np.ndarray:
    return pack_sampling(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        seed=request.seed,
    )
