"""The list of step shapes: every step finds one, and there are few."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.wrappers.step_inputs import num_input_words
from jaxinfer.wrappers.step_shapes import MAX_CHUNKS, PREFILL_BLOCK, StepShapes, num_blocks


@given(st.integers(1, 70), st.integers(16, 600), st.integers(2, 700), st.integers(0, 70), st.integers(0, 40))
def test_shape_any_step_is_held_and_listed(max_num_seqs, budget, max_model_len, num_decode, num_prefill):
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max(budget, max_num_seqs))
    shapes = StepShapes(config, max_model_len=max_model_len)
    num_decode, num_prefill = min(num_decode, shapes.max_decode), min(num_prefill, shapes.max_prefill)
    num_logits = num_decode + min(num_prefill, MAX_CHUNKS)
    shape = shapes.shape(num_decode=num_decode, num_prefill=num_prefill, num_logits=num_logits)
    assert shape in shapes.all_shapes()
    assert shape.num_decode >= num_decode
    assert shape.num_prefill >= num_prefill
    assert shape.num_logits >= num_logits
    assert shape.num_prefill * PREFILL_BLOCK < config.max_num_batched_tokens + PREFILL_BLOCK
    assert num_input_words(shape, shapes) > 0


@given(st.integers(1, 40), st.sampled_from([1, 2]), st.integers(1, 15), st.integers(1, 60), st.integers(1, 16))
def test_shape_with_drafts_any_step_is_held_and_listed(max_num_seqs, stages, num_drafts, num_prefill, row_len):
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        pipeline_parallel_size=stages,
        draft_model="prompt-lookup",
        num_draft_tokens=num_drafts,
    )
    shapes = StepShapes(config, max_model_len=512)
    num_decode, num_prefill = shapes.max_decode // 2, min(num_prefill, shapes.max_chunks, shapes.max_prefill)
    num_logits = num_decode + num_prefill * min(row_len, 1 + num_drafts)
    shape = shapes.shape(num_decode=num_decode, num_prefill=num_prefill, num_logits=num_logits, row_len=row_len)
    assert shape in shapes.all_shapes()
    assert shape.num_prefill >= num_prefill and shape.num_logits >= num_logits
    assert shape.row_len == (1 + num_drafts if row_len <= 1 + num_drafts and stages == 1 else PREFILL_BLOCK)


@given(st.integers(1, 600))
def test_shape_that_scores_is_listed(num_tokens):
    shapes = StepShapes(EngineConfig(max_num_seqs=8, max_num_batched_tokens=600), max_model_len=2048)
    shape = shapes.shape(num_decode=3, num_prefill=num_blocks(num_tokens), num_logits=4, scored=True)
    assert shape in shapes.all_shapes()
    assert shape.scored and shape.num_prefill * PREFILL_BLOCK >= num_tokens


def test_all_shapes_default_settings_are_few():
    shapes = StepShapes(EngineConfig(), max_model_len=8192).all_shapes()
    assert len(shapes) == len(set(shapes)) < 64


@pytest.mark.parametrize("rows", [{"num_decode": 5, "num_prefill": 0}, {"num_decode": 0, "num_prefill": 5}])
def test_shape_too_many_rows_is_an_error(rows):
    shapes = StepShapes(EngineConfig(max_num_batched_tokens=64, max_num_seqs=4), max_model_len=256)
    with pytest.raises(ValueError, match="up to 4 decode and 4 prefill rows, got"):
        shapes.shape(**rows, num_logits=4)
