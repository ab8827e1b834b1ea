"""Outputs that no model made."""

from __future__ import annotations

from typing import Any

from jaxinfer import CompletionOutput, Logprob, RequestOutput
from jaxinfer.outputs import RequestMetrics


def make_output(**fields: Any) -> RequestOutput:
    """A finished output of two tokens with log-probabilities."""
    numbers = ({5: (-0.5, 2, "b"), 4: (-0.25, 1, "é"), 9: (-3.0, 3, "c")}, {4: (-1.0, 4, "é")})
    found = tuple(
        {
            token_id: Logprob(logprob=logprob, rank=rank, decoded_token=text)
            for token_id, (logprob, rank, text) in entry.items()
        }
        for entry in numbers
    )
    completion = CompletionOutput(
        index=0,
        text="bé",
        token_ids=(5, 4),
        delta="bé",
        logprobs=found,
        cumulative_logprob=-1.5,
        finish_reason="stop",
        stop_reason=None,
        seed=1,
    )
    given = {
        "request_id": "0",
        "prompt": "p",
        "prompt_token_ids": (1, 2, 3),
        "outputs": (completion,),
        "finished": True,
        "num_cached_tokens": 1,
        "metrics": RequestMetrics(arrival_time=0.0),
    }
    return RequestOutput(**given | fields)
