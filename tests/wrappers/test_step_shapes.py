"""The list of step shapes: every step finds one, and there are few."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.wrappers.step_inputs import num_input_words
from jaxinfer.wrappers.step_shapes import MAX_CHUNKS, PREFILL_BLOCK, StepShape, StepShapes, num_blocks


@given(
    st.integers(1, 70),
    st.integers(16, 600),
    st.integers(2, 700),
    st.integers(0, 70),
    st.integers(0, 40),
    st.booleans(),
)
def test_shape_any_step_is_held_and_listed(max_num_seqs, budget, max_model_len, num_decode, num_prefill, coarse):
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max(budget, max_num_seqs))
    shapes = StepShapes(config, max_model_len=max_model_len, coarse=coarse)
    num_decode, num_prefill = min(num_decode, shapes.max_decode), min(num_prefill, shapes.max_prefill)
    num_logits = num_decode + min(num_prefill, MAX_CHUNKS)
    shape = shapes.shape(num_decode=num_decode, num_prefill=num_prefill, num_logits=num_logits)
    assert shape in shapes.all_shapes()
    assert shape.num_decode >= num_decode
    assert shape.num_prefill >= num_prefill
    assert shape.num_logits >= num_logits
    assert shape.num_prefill * PREFILL_BLOCK < config.max_num_batched_tokens + PREFILL_BLOCK
    assert num_input_words(shape, shapes) > 0
    assert any(larger.holds(shape) for larger in shapes.covering_shapes())


@given(
    st.integers(1, 40),
    st.sampled_from([1, 2]),
    st.integers(1, 15),
    st.integers(1, 60),
    st.integers(1, 16),
    st.booleans(),
)
def test_shape_with_drafts_any_step_is_held_and_listed(max_num_seqs, stages, num_drafts, num_prefill, row_len, coarse):
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        pipeline_parallel_size=stages,
        draft_model="prompt-lookup",
        num_draft_tokens=num_drafts,
    )
    shapes = StepShapes(config, max_model_len=512, coarse=coarse)
    num_decode, num_prefill = shapes.max_decode // 2, min(num_prefill, shapes.max_chunks, shapes.max_prefill)
    num_logits = num_decode + num_prefill * min(row_len, 1 + num_drafts)
    shape = shapes.shape(num_decode=num_decode, num_prefill=num_prefill, num_logits=num_logits, row_len=row_len)
    assert shape in shapes.all_shapes()
    assert shape.num_prefill >= num_prefill and shape.num_logits >= num_logits
    assert shape.row_len == (1 + num_drafts if row_len <= 1 + num_drafts and stages == 1 else PREFILL_BLOCK)
    assert set(shapes.covering_shapes()) <= set(shapes.all_shapes())
    assert any(larger.holds(shape) for larger in shapes.covering_shapes())


@given(st.integers(1, 600), st.booleans(), st.integers(0, 4), st.integers(1, 2), st.data())
def test_shape_that_scores_is_listed(num_tokens, coarse, num_drafts, stages, data):
    drafts = {"draft_model": "prompt-lookup", "num_draft_tokens": num_drafts} if num_drafts else {}
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=600, pipeline_parallel_size=stages, **drafts)
    shapes = StepShapes(config, max_model_len=2048, coarse=coarse)
    num_prefill = num_blocks(num_tokens)
    num_logits = data.draw(st.integers(0, shapes.max_decode + min(num_prefill, shapes.max_decode) * (1 + num_drafts)))
    num_decode = min(3, shapes.max_decode)
    shape = shapes.shape(num_decode=num_decode, num_prefill=num_prefill, num_logits=num_logits, scored=True)
    assert shape in shapes.all_shapes()
    assert shape.scored and shape.num_prefill * PREFILL_BLOCK >= num_tokens
    assert any(larger.holds(shape) for larger in shapes.covering_shapes())


def test_all_shapes_default_settings_are_few():
    shapes = StepShapes(EngineConfig(), max_model_len=8192).all_shapes()
    assert len(shapes) == len(set(shapes)) < 32


@pytest.mark.parametrize("max_num_seqs", [64, 128, 256])
def test_coarse_shapes_of_gpus_are_fewer_and_fill_whole_tiles(max_num_seqs):
    config = EngineConfig(max_num_seqs=max_num_seqs)
    fine = StepShapes(config, max_model_len=8192).all_shapes()
    coarse = StepShapes(config, max_model_len=8192, coarse=True).all_shapes()
    assert len(coarse) < len(fine)
    # XLA pads matrices to multiples of eight rows for cuBLAS, with a kernel of its own.
    assert all(shape.num_tokens % 8 == 0 for shape in coarse if shape.num_tokens > 1)


def test_holds_needs_every_row_and_the_same_kind():
    shape = functools.partial(StepShape, num_decode=8, num_prefill=4, row_len=16, num_logits=8)
    assert shape().holds(shape(num_decode=1, num_prefill=0, num_logits=1, row_len=5))
    for larger in ({"num_decode": 9}, {"num_prefill": 5}, {"num_logits": 9}, {"row_len": 17}):
        assert not shape().holds(shape(**larger))
    assert not shape().holds(shape(scored=True)) and not shape(scored=True).holds(shape())


@pytest.mark.parametrize("rows", [{"num_decode": 5, "num_prefill": 0}, {"num_decode": 0, "num_prefill": 5}])
def test_shape_too_many_rows_is_an_error(rows):
    shapes = StepShapes(EngineConfig(max_num_batched_tokens=64, max_num_seqs=4), max_model_len=256)
    with pytest.raises(ValueError, match="up to 4 decode and 4 prefill rows, got"):
        shapes.shape(**rows, num_logits=4)
