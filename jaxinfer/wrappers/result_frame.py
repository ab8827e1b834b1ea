"""A StepResult as bytes, for a leader none of whose devices have computed the step.

Owns: which numbers and arrays the bytes have, and the checks of what comes in.
Does not know: sockets, jax, requests.

A frame is a row of int32: M and whether there are log-probabilities and scores, then the sizes of both. The arrays
follow (see array_frame.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxinfer.wrappers.array_frame import WORD, FrameError, dims, pack_arrays, read_arrays
from jaxinfer.wrappers.step_result import LogprobArrays, StepResult

_LOGPROBS = ("logprobs", "scores")
_NUM_WORDS = 1 + len(_LOGPROBS) * (1 + len(dims(LogprobArrays)))


def pack_result(result: StepResult) -> bytes:
    """The frame of a step's results."""
    head, data = pack_arrays(result)
    parts = [data]
    for found in (getattr(result, name) for name in _LOGPROBS):
        sizes, data = ([0] * len(dims(LogprobArrays)), b"") if found is None else pack_arrays(found)
        head += [found is not None, *sizes]
        parts.append(data)
    return np.array(head, np.int32).tobytes() + b"".join(parts)


def unpack_result(frame: bytes, *, vocab_size: int) -> StepResult:
    """Reads a frame.

    Args:
      frame: from pack_result.
      vocab_size: of the model.

    Returns:
      The results; their arrays are views of the frame and read-only.

    Raises:
      FrameError: the frame is too short or too long, or has a value that no result has.
    """
    if len(frame) < _NUM_WORDS * WORD:
        raise FrameError(f"results have at least {_NUM_WORDS * WORD} bytes, got {len(frame)}")
    words = iter(np.frombuffer(frame, np.int32, _NUM_WORDS).tolist())
    arrays, offset = read_arrays(StepResult, frame, _NUM_WORDS * WORD, _sizes(StepResult, words))
    logprobs: dict[str, Any] = {}
    for name in _LOGPROBS:
        has_any, sizes = next(words), _sizes(LogprobArrays, words)
        if has_any:
            found, offset = read_arrays(LogprobArrays, frame, offset, sizes)
            logprobs[name] = LogprobArrays(**found)
    if offset != len(frame):
        raise FrameError(f"results of these sizes have {offset} bytes, got {len(frame)}")
    result = StepResult(token_ids=arrays["token_ids"], **logprobs)
    for name, ids in (
        ("token_ids", result.token_ids),
        *((f"top_ids of {name}", found.top_ids) for name, found in logprobs.items()),
    ):
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise FrameError(f"{name} must be in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    return result


def _sizes(kind: type, words: Iterator[int]) -> dict[str, int]:
    return {name: next(words) for name in dims(kind)}
