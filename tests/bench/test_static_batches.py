"""Static batches: who shares a batch, how long it runs, which tokens count."""

import numpy as np
import pytest

from jaxinfer.bench.static_batches import in_static_batches, left_padded


class FakePeer:
    """Answers with a prompt's first token plus 0, 1, 2, .., and remembers its batches."""

    def __init__(self):
        self.batches = []

    def generate(self, prompts, output_len):
        self.batches.append((len(prompts), output_len))
        return [[prompt[0] + number for number in range(output_len)] for prompt in prompts]


@pytest.mark.parametrize(
    ("batch_size", "batches"),
    [(1, [(1, 4), (1, 1), (1, 2), (1, 6), (1, 3)]), (2, [(2, 4), (2, 6), (1, 3)]), (8, [(5, 6)])],
)
def test_static_batches_run_to_their_longest_output_in_order_of_arrival(batch_size, batches):
    peer, prompts, output_lens = FakePeer(), [(10,), (20, 0), (30,), (40,), (50,)], [4, 1, 2, 6, 3]
    tokens = in_static_batches(peer.generate, prompts, output_lens, batch_size=batch_size)
    assert peer.batches == batches
    assert tokens == [
        [prompt[0] + number for number in range(n)] for prompt, n in zip(prompts, output_lens, strict=True)
    ]


def test_left_padded_prompts_end_in_the_last_column():
    prompts = [(0, 0, 3), (5,), (7, 8)]
    ids, mask = left_padded(prompts)
    assert ids.shape == mask.shape == (3, 3) and ids.dtype == mask.dtype == np.int64
    assert [tuple(row[kept == 1]) for row, kept in zip(ids, mask, strict=True)] == prompts
    assert (np.diff(mask, axis=1) >= 0).all() and not ids[mask == 0].any()
