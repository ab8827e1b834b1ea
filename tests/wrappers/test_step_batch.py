"""Sampling numbers as words."""

import numpy as np
import pytest

from jaxinfer.wrappers.step_batch import pack_sampling


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1])
def test_pack_sampling_keeps_every_bit(seed):
    words = pack_sampling(temperature=0.7, top_k=-1, top_p=0.9, min_p=0.1, seed=seed)
    np.testing.assert_array_equal(words[:3].view(np.float32), np.float32([0.7, 0.9, 0.1]))
    assert words[3] == 0
    low, high = words[4:].view(np.uint32).tolist()
    assert low + (high << 32) == seed


@pytest.mark.parametrize("top_k", [40, 2**31 - 1, 2**31, 2**32 + 1, 2**63, 2**64])
def test_pack_sampling_top_k_of_any_size_stays_as_large_as_can_be(top_k):
    words = pack_sampling(temperature=0.7, top_k=top_k, top_p=1.0, min_p=0.0, seed=0)
    assert words[3] == min(top_k, 2**31 - 1)
