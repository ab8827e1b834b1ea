"""What an engine reports beside token events: ended beam searches and failed requests.

Owns: the two reports.
Does not know: how either came about.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.engine.beam_search import Hypothesis


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedSearch:
    """A beam search that has ended.

    Args:
      request_id: id of its request.
      hypotheses: the texts found, best first.
      num_cached_tokens: prompt tokens that came from the prefix cache.
    """

    request_id: str
    hypotheses: tuple[Hypothesis, ...]
    num_cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRequest:
    """A request that was ended by an exception of its constraint.

    Args:
      request_id: id of the request.
      error: the exception.
    """

    request_id: str
    error: BaseException
