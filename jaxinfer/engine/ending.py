"""Decides when a sequence ends.

Owns: the reasons to end (stop token, length, constraint), and the check that a constraint allows a first token.
Does not know: queues, pages. Never imports jax.
"""

from __future__ import annotations

import logging

from jaxinfer.constraints.constraint import ConstraintError, ConstraintState, allows_beside
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.errors import INTERRUPTS
from jaxinfer.request import FinishReason, Request

logger = logging.getLogger("jaxinfer")


def end_reason(sequence: SequenceState) -> FinishReason | None:
    """Why a sequence ends with its newest token; None if it goes on.

    Call it once for each new token: it also advances the sequence's constraint by that token.
    """
    token_id = sequence.token_ids[-1]
    if token_id in sequence.request.stop_token_ids:
        return "stop"
    reason = None
    if sequence.constraint is not None:
        reason = _end_of_constraint(sequence, sequence.constraint, token_id)
    return reason or ("length" if len(sequence.token_ids) >= sequence.max_total_len else None)


def start_constraint(request: Request) -> ConstraintState | None:
    """The state of a request's constraint before any new token; None for a request without a constraint.

    The first mask is computed here, on the calling thread, and kept in the state, so that the first step need not.

    Raises:
      ValueError: the constraint allows no first token.
    """
    if request.constraint is None:
        return None
    masked = request.stop_token_ids if request.min_tokens else ()
    state = request.constraint.start()
    try:
        for number, token_id in enumerate(request.output_token_ids):
            state.allowed()
            state.advance(token_id)
            if state.is_complete:
                raise ValueError(f"the structured output is complete after {number + 1} tokens, nothing can follow")
        if allows_beside(state.allowed(), masked):
            return state
    except ConstraintError as error:
        raise ValueError(f"the constraint of request {request.request_id} allows no first token: {error}") from error
    others = f", while min_tokens {request.min_tokens} holds back stop tokens" if masked else ""
    raise ValueError(
        f"structured, bad_words and allowed_token_ids together leave no token to begin with{others}; allow more"
    )


def _end_of_constraint(sequence: SequenceState, constraint: ConstraintState, token_id: int) -> FinishReason | None:
    """Advances a constraint: "stop" if its text is complete, "abort" if it is not but cannot go on, else None."""
    request, num_new = sequence.request, len(sequence.token_ids) - len(sequence.request.known_token_ids)
    masked = request.stop_token_ids if num_new < request.min_tokens else ()
    try:
        constraint.advance(token_id)
        if constraint.is_complete:
            return "stop"
        allowed = constraint.allowed()
        if allows_beside(allowed, masked):
            return None
        if allowed.any():  # end tokens are allowed, but min_tokens masks them
            return "stop"
        lost = "structured, bad_words and allowed_token_ids together leave no token to go on with"
    except ConstraintError as error:
        lost = str(error)
    except INTERRUPTS:
        raise
    except BaseException as error:  # a panic of a grammar written in Rust is no Exception
        sequence.error = error
        return "abort"
    logger.warning("request %s ends: %s", request.request_id, lost)
    return "abort"
