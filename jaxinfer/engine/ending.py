"""When a sequence ends.

Owns: the reasons, by stop tokens, length and constraint, and the check that a constraint lets it begin.
Does not know: queues, pages. Never imports jax.
"""

from __future__ import annotations

import logging

from jaxinfer.constraints.constraint import ConstraintError, ConstraintState, allows_beside
from jaxinfer.engine.schedule import SequenceState
from jaxinfer.errors import INTERRUPTS
from jaxinfer.request import FinishReason, Request

logger = logging.getLogger("jaxinfer")


def end_reason(sequence: SequenceState) -> FinishReason | None:
    """Why a sequence ends with its newest token, if it does; its constraint learns of the token."""
    token_id = sequence.token_ids[-1]
    if token_id in sequence.request.stop_token_ids:
        return "stop"
    reason = None
    if sequence.constraint is not None:
        reason = _end_of_constraint(sequence, sequence.constraint, token_id)
    return reason or ("length" if len(sequence.token_ids) >= sequence.limit else None)


def start_constraint(request: Request) -> ConstraintState | None:
    """The state of a request's constraint that has no output yet, None without a constraint.

    Its first mask is computed here, on whichever thread asks; the first step then finds it in the state.

    Raises:
      ValueError: the constraint allows nothing to begin with.
    """
    if request.constraint is None:
        return None
    held_back = request.stop_token_ids if request.min_tokens else ()
    state = request.constraint.start()
    try:
        if allows_beside(state.allowed(), held_back):
            return state
    except ConstraintError as error:
        raise ValueError(f"the constraint of request {request.request_id} allows no first token: {error}") from error
    others = f", while min_tokens {request.min_tokens} holds back stop tokens" if held_back else ""
    raise ValueError(
        f"structured, bad_words and allowed_token_ids together leave no token to begin with{others}; allow more"
    )


def _end_of_constraint(sequence: SequenceState, constraint: ConstraintState, token_id: int) -> FinishReason | None:
    """ "stop" where the text is complete, "abort" where nothing can follow although it is not."""
    request, num_new = sequence.request, len(sequence.token_ids) - len(sequence.request.prompt_token_ids)
    held_back = request.stop_token_ids if num_new < request.min_tokens else ()
    try:
        constraint.advance(token_id)
        if constraint.is_complete:
            return "stop"
        allowed = constraint.allowed()
        if allows_beside(allowed, held_back):
            return None
        if allowed.any():  # an end token, were it not for min_tokens
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
