"""Reads log-probabilities from the results of a step.

Owns: which of a step's numbers belong to which token.
Does not know: how they are computed, when a step is read.
"""

from __future__ import annotations

from jaxinfer.engine.batch import first_tokens
from jaxinfer.engine.schedule import Schedule
from jaxinfer.request import TokenLogprobs
from jaxinfer.wrappers.step_result import LogprobArrays


def keep_scores(schedule: Schedule, scores: LogprobArrays) -> None:
    """Adds the log-probabilities that a step has found for prompt tokens to their sequences."""
    for chunk, first in first_tokens(schedule):
        num_top = chunk.sequence.request.prompt_logprobs
        for position in chunk.scored:
            token = first + position - chunk.start
            chunk.sequence.prompt_logprobs.append(token_logprobs(scores, token, num_top or 0))


def token_logprobs(arrays: LogprobArrays, row: int, num_top: int) -> TokenLogprobs:
    """The log-probabilities at one row, with the num_top most likely tokens."""
    return TokenLogprobs(
        logprob=float(arrays.logprob[row]),
        rank=int(arrays.rank[row]),
        top_ids=tuple(arrays.top_ids[row, :num_top].tolist()),
        top_logprobs=tuple(arrays.top_logprobs[row, :num_top].tolist()),
    )
