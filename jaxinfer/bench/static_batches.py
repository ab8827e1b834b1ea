"""Static batching: requests of different lengths in fixed batches, as engines without continuous batching serve them.

Owns: which requests share a batch, which tokens count, the padding of prompts.
Does not know: engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_PAD = 0


def in_static_batches(
    generate: Callable[[Sequence[tuple[int, ...]], int], list[list[int]]],
    prompts: Sequence[tuple[int, ...]],
    output_lens: Sequence[int],
    *,
    batch_size: int,
) -> list[list[int]]:
    """The tokens of all requests, in batches in the order of arrival, each of which runs to its longest output.

    Args:
      generate: called with the prompts of a batch and a number of tokens, returns so many tokens of each.
      prompts: of all requests.
      output_lens: tokens of each request; what its batch generates beyond them is dropped.
      batch_size: requests of a batch; the last one may have fewer.

    Example:
      >>> in_static_batches(lambda prompts, n: [[7] * n for _ in prompts], [(1,), (2,), (3,)], [1, 3, 2], batch_size=2)
      [[7], [7, 7, 7], [7, 7]]
    """
    tokens = []
    for start in range(0, len(prompts), batch_size):
        lens = output_lens[start : start + batch_size]
        rows = generate(prompts[start : start + batch_size], max(lens))
        tokens += [row[:length] for row, length in zip(rows, lens, strict=True)]
    return tokens


def left_padded(prompts: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array in which all end in the last column, and its attention mask.

    Returns:
      Token ids and mask, int64[R, T] with T the longest prompt; both are 0 in the padding, the mask is 1 elsewhere.

    Example:
      >>> ids, mask = left_padded([(5, 6, 7), (8,)])
      >>> ids.tolist(), mask.tolist()
      ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    longest = max(map(len, prompts))
    ids = [[_PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return np.array(ids, np.int64), np.array(mask, np.int64)
