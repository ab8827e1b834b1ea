"""The list of step shapes: every step finds one, and there are few."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.config import EngineConfig
from jaxinfer.wrappers.decoder_step import num_input_words
from jaxinfer.wrappers.step_batch import StepShapes, pack_sampling


@given(st.integers(1, 70), st.integers(16, 600), st.integers(2, 700), st.integers(0, 70), st.integers(0, 70), st.data())
def test_shape_any_step_is_held_and_listed(max_num_seqs, budget, max_model_len, num_decode, num_prefill, data):
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max(budget, max_num_seqs))
    shapes = StepShapes(config, max_model_len=max_model_len)
    num_decode, num_prefill = min(num_decode, max_num_seqs), min(num_prefill, max_num_seqs)
    limit = shapes.longest_chunk(num_prefill) if num_prefill else 0
    if not (num_decode or limit):
        return
    longest = data.draw(st.integers(1, limit)) if limit else 0
    num_prefill = num_prefill if limit else 0
    shape = shapes.shape(
        num_decode=num_decode, num_prefill=num_prefill, longest_chunk=longest, num_logits=num_decode + num_prefill
    )
    assert shape in shapes.all_shapes()
    assert shape.num_decode >= num_decode
    assert shape.num_prefill >= num_prefill
    assert shape.chunk_len >= longest
    assert shape.num_logits >= num_decode + num_prefill
    assert shape.num_prefill * shape.chunk_len <= config.max_num_batched_tokens
    assert num_input_words(shape, shapes.table_width) > 0


def test_all_shapes_default_settings_are_few():
    shapes = StepShapes(EngineConfig(), max_model_len=8192).all_shapes()
    assert len(shapes) == len(set(shapes)) < 64


def test_shape_too_many_chunk_tokens_is_an_error():
    shapes = StepShapes(EngineConfig(max_num_batched_tokens=64, max_num_seqs=4), max_model_len=256)
    with pytest.raises(ValueError, match="no step shape holds 4 chunks of up to 64 tokens"):
        shapes.shape(num_decode=0, num_prefill=4, longest_chunk=64, num_logits=4)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1])
def test_pack_sampling_keeps_every_bit(seed):
    words = pack_sampling(temperature=0.7, top_k=-1, top_p=0.9, min_p=0.1, seed=seed)
    np.testing.assert_array_equal(words[:3].view(np.float32), np.float32([0.7, 0.9, 0.1]))
    assert words[3] == 0
    low, high = words[4:].view(np.uint32).tolist()
    assert low + (high << 32) == seed
