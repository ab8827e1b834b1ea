"""The engine's input and output: requests and token events, in token ids and numbers.

Owns: Request, LogitEdits, TokenEvent and the log-probabilities of a position.
Does not know: jax, text, the scheduler.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxinfer.captured_values import CapturedValues
from jaxinfer.config.validation import require_float, require_int
from jaxinfer.constraints.constraint import TokenConstraint
from jaxinfer.interventions import Hook
from jaxinfer.sites import Site, TokenSpan

FinishReason = Literal["stop", "length", "abort"]
MAX_LOGPROBS = 20


class RequestTooLongError(ValueError):
    """A request can never run: its prompt leaves no room in the context, or prompt and output exceed the KV pages."""


class EditKind(enum.IntEnum):
    """What one edit entry says about a token: its bias, that it must not come yet, that the prompt contains it, or that
    it was sampled once (an entry for each time)."""

    BIAS = 0
    MASKED_UNTIL_MIN_TOKENS = 1
    PROMPT = 2
    OUTPUT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitEdits:
    """How a request changes its logits before temperature and filters; fields as in SamplingParams.

    The request's stop tokens are masked until the output has min_tokens tokens.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Capture:
    """Which values inside the model a request keeps.

    Args:
      sites: where.
      span: the positions of the tokens.
      num_shared: tokens in front of these that another sample of the prompt captures for this one as well.
    """

    sites: tuple[Site, ...]
    span: TokenSpan
    num_shared: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One generation request, as token ids and numbers, without text.

    Args:
      request_id: unique among the unfinished requests.
      prompt_token_ids: at least one id.
      output_token_ids: output tokens that exist already, after which it goes on. To penalties and constraints they are
        output; max_tokens and min_tokens do not count them. Empty unless the request is a fork of another one's text.
      max_tokens: new tokens at most, >= 1; the request also ends at max_model_len.
      stop_token_ids: ids that end the request with "stop".
      temperature, top_k, top_p, min_p: as in SamplingParams; 0, 0, 1, 0 turn them off.
      seed: of the sampling noise, 0 .. 2**63 - 1.
      logprobs: None, or how many of the most likely tokens to report beside the sampled one.
      prompt_logprobs: None, or how many to report at each of the prompt's tokens from the second on.
      priority: lower runs first.
      edits: how its logits are changed; None leaves them.
      constraint: which tokens may come; None allows all.
      capture: which values inside the model are kept; None for none.
      hooks: interventions on values inside the model.
      logits_hooks: processors of its logits, and a sampler in place of the engine's.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    edits: LogitEdits | None = None
    constraint: TokenConstraint | None = None
    capture: Capture | None = None
    hooks: tuple[Hook, ...] = ()
    logits_hooks: tuple[Hook, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("a request needs at least one prompt token, got none")
        require_int("max_tokens", self.max_tokens, 1)
        require_float("temperature", self.temperature, ">= 0", 0, math.inf)
        require_float("top_p", self.top_p, "in (0, 1]", 0, 1, open_low=True)
        require_float("min_p", self.min_p, "in [0, 1]", 0, 1)
        require_int("top_k", self.top_k, 0)
        require_int("seed", self.seed, 0, 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 0)

    @property
    def known_token_ids(self) -> tuple[int, ...]:
        """The text from which it goes on: the prompt, and the output tokens that exist already."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def min_tokens(self) -> int:
        """How many new tokens must come before an end token may."""
        return 0 if self.edits is None else self.edits.min_tokens

    @property
    def is_random(self) -> bool:
        """Whether its tokens are drawn at random."""
        return self.temperature > 0

    @property
    def is_filtered(self) -> bool:
        """Whether only some of the tokens can be drawn, the likeliest ones."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def is_tapped(self) -> bool:
        """Whether it captures or changes values inside the model, or has functions of logits."""
        return self.capture is not None or bool(self.hooks) or bool(self.logits_hooks)

    @property
    def num_unchanged(self) -> int:
        """Leading positions that no hook changes, so that their keys and values are those of the same plain text."""
        return min((hook.span.start for hook in self.hooks), default=2**31)

    @property
    def is_edited(self) -> bool:
        """Whether edits, a constraint or functions of its own change the logits that its tokens are sampled from."""
        return self.edits is not None or self.constraint is not None or bool(self.logits_hooks)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities (natural log, float32) at one position.

    Args:
      logprob, rank: of the sampled token, or of the prompt's token at this position; rank 1 is the most likely.
      top_ids, top_logprobs: the most likely tokens, best first.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class TokenEvent(NamedTuple):
    """One new token of one request.

    A named tuple, since there is one for every token, and it takes half the time of a frozen dataclass.

    Args:
      request_id: id of the request.
      token_id: the token.
      logprobs: log-probabilities at this token; None unless the request asked for them.
      finish_reason: set on the request's last token.
      num_cached_tokens: prompt tokens that came from the prefix cache.
      prompt_logprobs: log-probabilities of the prompt's tokens from the second on, on the first event of a request that
        asked for them; else None.
      captured: what the request has captured so far; None unless it captures.
    """

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    num_cached_tokens: int
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    captured: CapturedValues | None = None
