"""Schedules as arrays."""

import dataclasses
from enum import Enum

import numpy as np
import pytest

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.batch import make_batch, needed_variant
from jaxinfer.engine.schedule import DecodeRow, PrefillChunk, Schedule
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.request import EditKind, LogitEdits, Request
from jaxinfer.wrappers.step_batch import SamplerVariant, pack_sampling
from jaxinfer.wrappers.step_shapes import StepShapes

SHAPES = StepShapes(EngineConfig(max_num_seqs=4, page_size=8, max_num_batched_tokens=64), max_model_len=64)


def sequence(**fields) -> SequenceState:
    request = Request(request_id="x", prompt_token_ids=(1,), max_tokens=4, **fields)
    return SequenceState(request=request, order=(0, 0), token_ids=[1], max_total_len=5)


def test_make_batch_lays_out_decodes_then_last_chunks():
    schedule = Schedule(
        decodes=(DecodeRow(sequence(), 3, None, 7), DecodeRow(sequence(), 0, (2, 9), 8)),
        prefills=(
            PrefillChunk(sequence(), 1, 8, list(range(5, 23)), (4, 5), 0),
            PrefillChunk(sequence(temperature=0.5, top_k=3, seed=9), 2, 0, [1, 2], (6,), 1),
        ),
        page_copies=((4, 7),),
    )
    batch = make_batch(schedule, SHAPES)
    assert (batch.shape.num_decode, batch.shape.num_prefill) == (4, 4)
    assert batch.decode_slots.tolist() == [3, 0, 4, 4]
    assert batch.decode_page_index.tolist() == [8, 2, 8, 8]
    assert batch.decode_page_id.tolist() == [0, 9, 0, 0]
    # 18 tokens take two rows.
    assert batch.prefill_slots.tolist() == [1, 1, 2, 4]
    assert batch.prefill_start.tolist() == [8, 24, 0, 0]
    assert batch.prefill_len.tolist() == [16, 2, 2, 0]
    assert batch.prefill_tokens[0].tolist() == list(range(5, 21))
    assert batch.prefill_tokens[1, :3].tolist() == [21, 22, 0]
    assert batch.chunk_pages[0].tolist() == [4, 5, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(
        batch.chunk_sampling[1], pack_sampling(temperature=0.5, top_k=3, top_p=1.0, min_p=0.0, seed=9)
    )
    # Logit rows: the two decodes, then the last token of the finished prompt; the rest is padding.
    assert batch.logit_index[:3].tolist() == [0, 1, 4 + 32 + 1]
    assert batch.logit_slots[:3].tolist() == [3, 0, 2]
    assert set(batch.logit_slots[3:].tolist()) == {4}
    assert batch.logit_feeds.tolist() == [True] * 3 + [False] * (batch.shape.num_logits - 3)
    assert batch.page_copies.tolist() == [[4, 7]]


@pytest.mark.parametrize(
    ("fields", "variant"),
    [
        ([{}, {"top_k": 5}], SamplerVariant.GREEDY),
        ([{}, {"temperature": 1.0}, {"top_p": 0.5}], SamplerVariant.UNFILTERED),
        ([{}, {"temperature": 1.0, "top_k": 5}], SamplerVariant.CANDIDATES),
        ([{"temperature": 1.0, "top_p": 0.5}, {"temperature": 1.0}], SamplerVariant.FULL),
        ([{"temperature": 1.0, "min_p": 0.5}], SamplerVariant.CANDIDATES),
    ],
)
def test_needed_variant_is_the_cheapest_that_serves_all(fields, variant):
    assert needed_variant(sequence(**entry).request for entry in fields) is variant


def test_make_batch_edits_and_masks_are_plain_arrays_of_the_step():
    edits = LogitEdits(logit_bias=((7, 2.5),), min_tokens=2, repetition_penalty=1.5)
    edited = sequence(edits=edits, stop_token_ids=frozenset({3}))
    edited.token_ids = [1, 8, 8]  # it was preempted after two output tokens
    chunks = (PrefillChunk(sequence(), 2, 0, [1], (6,), 1), PrefillChunk(edited, 1, 0, [1, 8, 8], (5,), 1))
    batch = make_batch(Schedule((), chunks), SHAPES, {1: np.array([0b1010], np.uint32)})
    assert batch.edits.slots.tolist() == [2, 1]
    assert batch.edits.is_edited.tolist() == [False, True]
    assert batch.edits.min_position[1] == 1 + 2
    np.testing.assert_array_equal(batch.edits.penalties, np.float32([[1, 0, 0], [1.5, 0, 0]]))
    assert batch.edits.num_entries.tolist() == [0, 5]
    entries = zip(batch.edits.kinds.tolist(), batch.edits.token_ids.tolist(), batch.edits.values.tolist(), strict=True)
    kinds = [EditKind.BIAS, EditKind.MASKED_UNTIL_MIN_TOKENS, EditKind.PROMPT, EditKind.OUTPUT, EditKind.OUTPUT]
    assert list(entries) == list(zip(kinds, [7, 3, 1, 8, 8], [2.5, 0, 0, 0, 0], strict=True))
    assert (batch.allowed.slots.tolist(), batch.allowed.words.tolist()) == ([1], [[0b1010]])
    assert all(is_plain(getattr(batch, field.name)) for field in dataclasses.fields(batch))


def is_plain(value) -> bool:
    """Whether a value consists of numbers and of arrays of numbers, so that it can be sent as bytes."""
    if dataclasses.is_dataclass(value):
        return all(is_plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value.dtype.kind in "biuf" if isinstance(value, np.ndarray) else isinstance(value, (int, Enum, type(None)))
