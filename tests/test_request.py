"""What the engine is asked for."""

import pytest

from jaxinfer.request import Request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": ()}, "at least one prompt token"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0, got nan"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"seed": 2**64}, "seed must be in 0"),
        ({"logprobs": -1}, "logprobs must be >= 0, got -1"),
    ],
)
def test_request_wrong_value_raises(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**({"request_id": "a", "prompt_token_ids": (1,), "max_tokens": 1} | fields))
