"""What the engine is asked for."""

import pytest

from jaxinfer.request import Request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": ()}, "at least one prompt token"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
    ],
)
def test_request_wrong_value_raises(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**({"request_id": "a", "prompt_token_ids": (1,), "max_tokens": 1} | fields))
