"""Text in, text out, around an engine that only knows ids.

Owns: tokenising and validating a prompt, the sampling policy (defaults, seeds, end tokens), detokenisation, stop
strings, and the state from which a RequestOutput is made.
Does not know: devices, threads, schedules. Counterpart of Megatron's TextGenerationController.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.config import GenerationDefaults
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.record import Provenance
from jaxinfer.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from jaxinfer.tokenizer import IncrementalDetokenizer, Tokenizer

Prompt = str | Sequence[int]


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what may begin one.

    Args:
      stop_strings: none of them empty.
      include: leave the match in the text.
    """

    def __init__(self, stop_strings: Sequence[str], *, include: bool):
        self._stop_strings = tuple(stop_strings)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, suspended: bool = False) -> str:
        """Takes new text; returns what is certain not to belong to a stop string, up to the first match.

        Args:
          text: what is new.
          suspended: a stop string that ends in it does not count.
        """
        self._held += text
        stop_strings = () if suspended else self._stop_strings
        found = [(self._held.find(stop), stop) for stop in stop_strings if stop in self._held]
        if found:
            start, self.matched = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            released = self._held[: start + len(self.matched) * self._include]
            self._held = ""
            return released
        keep = max((self._overlap(stop) for stop in self._stop_strings), default=0)
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        return released

    def finish(self) -> str:
        """Returns what was held back: no stop string will come any more."""
        released, self._held = self._held, ""
        return released

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A validated prompt, ready for the engine.

    Args:
      prompt: the text asked with; None when asked with ids.
      params: as asked.
      request: for the engine; its max_tokens is at least 1 even when nothing is to be generated.
    """

    prompt: str | None
    params: SamplingParams
    request: Request


@dataclass(slots=True)
class _Generation:
    """The growing answer to one submission."""

    submission: Submission
    arrival_time: float
    detokenizer: IncrementalDetokenizer | None
    matcher: StopMatcher
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    num_reported: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    first_token_time: float | None = None
    finished_time: float | None = None


class TextGenerationController:
    """Turns prompts into engine requests and engine tokens into text.

    Not thread-safe, save for prepare, which changes nothing but a counter: one thread submits, steps and reads.

    Args:
      engine: runs the requests.
      tokenizer: None works on ids alone.
      defaults: of the checkpoint.
      vocab_size: of the model; prompt ids lie below it.
      max_model_len: tokens of prompt and output together.
      seed: from which the seeds of requests without one are derived.
      provenance: for the records of outputs; None makes outputs without a record.
    """

    def __init__(
        self,
        engine: DynamicEngine,
        tokenizer: Tokenizer | None,
        *,
        defaults: GenerationDefaults,
        vocab_size: int,
        max_model_len: int,
        seed: int = 0,
        provenance: Provenance | None = None,
    ):
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seed = seed
        self._provenance = provenance
        self._numbers = itertools.count()  # next() is atomic, so that threads may prepare at the same time
        self._generations: dict[str, _Generation] = {}
        eos = defaults.eos_token_ids or (tokenizer.eos_token_ids if tokenizer else ())
        self._eos_token_ids = frozenset(eos)

    @property
    def default_params(self) -> SamplingParams:
        """The checkpoint's own way of sampling, for calls that bring no SamplingParams."""
        return SamplingParams(
            temperature=self._defaults.temperature, top_k=self._defaults.top_k, top_p=self._defaults.top_p
        )

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Submission:
        """Tokenises and validates a prompt, changing nothing.

        Args:
          prompt: text, or token ids.
          params: how to sample.
          add_special_tokens: put around a text what the tokenizer puts around prompts (BOS and such); a chat template
            has written that itself.

        Raises:
          TypeError: the prompt is neither text nor ids.
          ValueError: it is empty, too long, has ids outside the vocabulary, or could never fit the KV pages; or the
            parameters need a tokenizer that is not there.
          NotImplementedError: the parameters use a field that is not supported yet.
        """
        params.require_built()
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, this LLM has none; pass tokenizer=... or stop_token_ids")
        token_ids = self._encode(prompt, add_special_tokens=add_special_tokens)
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-params.truncate_prompt_tokens :]
        number = next(self._numbers)
        limit = params.max_tokens if params.max_tokens is not None else self._max_model_len
        request = Request(
            request_id=str(number),
            prompt_token_ids=token_ids,
            max_tokens=max(limit, 1),
            stop_token_ids=frozenset(self._stop_token_ids(params)),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=self._derived_seed(number) if params.seed is None else params.seed,
            logprobs=params.logprobs,
            priority=params.priority,
            edits=params.edits,
        )
        self._check_edits(params, request)
        self._engine.check_request(request)
        return Submission(prompt=prompt if isinstance(prompt, str) else None, params=params, request=request)

    def submit(self, submission: Submission) -> str:
        """Starts a prepared submission.

        Returns:
          Its request id, for output, abort and forget.
        """
        params, request = submission.params, submission.request
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
        generation = _Generation(
            submission=submission,
            arrival_time=time.monotonic(),
            detokenizer=detokenizer,
            matcher=StopMatcher(params.stop_strings, include=params.include_stop_str_in_output),
        )
        if params.max_tokens == 0:
            self._finish(generation, "length")
        else:
            self._engine.add_request(request)
        self._generations[request.request_id] = generation
        return request.request_id

    def has_unfinished(self) -> bool:
        """Whether the engine still has work."""
        return self._engine.has_unfinished()

    def step(self) -> list[str]:
        """Advances the engine by one step.

        Returns:
          Ids of the requests that got a token.
        """
        events = self._engine.step()
        for event in events:
            self._consume(event)
        return [event.request_id for event in events]

    def output(self, request_id: str) -> RequestOutput:
        """A snapshot of a request; its delta is the text since the previous snapshot.

        Raises:
          KeyError: no such request, or it was forgotten.
        """
        generation = self._generations[request_id]
        submission, params = generation.submission, generation.submission.params
        has_text = generation.detokenizer is not None
        delta, generation.num_reported = generation.text[generation.num_reported :], len(generation.text)
        wants_logprobs = params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=generation.text if has_text else None,
            token_ids=tuple(generation.token_ids),
            delta=delta if has_text else None,
            logprobs=self._logprobs(generation) if wants_logprobs else None,
            cumulative_logprob=sum(entry.logprob for entry in generation.logprobs) if wants_logprobs else None,
            finish_reason=generation.finish_reason,
            stop_reason=generation.stop_reason,
            seed=submission.request.seed,
        )
        return RequestOutput(
            request_id=request_id,
            prompt=submission.prompt,
            prompt_token_ids=submission.request.prompt_token_ids,
            outputs=(completion,),
            finished=generation.finish_reason is not None,
            num_cached_tokens=generation.num_cached_tokens,
            metrics=RequestMetrics(
                arrival_time=generation.arrival_time,
                first_token_time=generation.first_token_time,
                finished_time=generation.finished_time,
            ),
            sampling_params=params,
            provenance=self._provenance,
        )

    def is_finished(self, request_id: str) -> bool:
        """Whether a request has ended."""
        return self._generations[request_id].finish_reason is not None

    def abort(self, request_id: str) -> None:
        """Ends a request; its output stays until it is forgotten."""
        generation = self._generations[request_id]
        if generation.finish_reason is None:
            self._engine.abort(request_id)
            self._finish(generation, "abort")

    def forget(self, request_id: str) -> None:
        """Drops a request's state, aborting it first if it still runs."""
        self.abort(request_id)
        del self._generations[request_id]

    def _encode(self, prompt: Prompt, *, add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer, this LLM has none; pass token ids or tokenizer=...")
            encode = self._tokenizer.encode if add_special_tokens else self._tokenizer.encode_plain
            token_ids = tuple(encode(prompt))
        else:
            token_ids = _as_token_ids(prompt)
        if not token_ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(
                    f"prompt token {position} is {token_id}, expected an id in 0..{self._vocab_size - 1} (the model's "
                    f"vocabulary)"
                )
        return token_ids

    def _check_edits(self, params: SamplingParams, request: Request) -> None:
        """Refuses token ids outside the vocabulary, and a mask that leaves no token."""
        for name in ("logit_bias", "allowed_token_ids"):
            beyond = [token_id for token_id in getattr(params, name) or () if token_id >= self._vocab_size]
            if beyond:
                raise ValueError(
                    f"{name} has token {beyond[0]}, expected ids in 0..{self._vocab_size - 1} (the model's vocabulary)"
                )
        allowed = params.allowed_token_ids
        if params.min_tokens and allowed is not None and request.stop_token_ids.issuperset(allowed):
            raise ValueError(
                f"min_tokens {params.min_tokens} holds back all of allowed_token_ids, which are stop tokens; allow more"
            )

    def _stop_token_ids(self, params: SamplingParams) -> set[int]:
        own = set(params.stop_token_ids or ())
        return own if params.ignore_eos else own | self._eos_token_ids

    def _derived_seed(self, number: int) -> int:
        digest = hashlib.sha256(f"{self._seed}:{number}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def _consume(self, event: TokenEvent) -> None:
        generation = self._generations[event.request_id]
        now = time.monotonic()
        generation.first_token_time = generation.first_token_time or now
        generation.num_cached_tokens = event.num_cached_tokens
        generation.token_ids.append(event.token_id)
        if event.logprobs is not None:
            generation.logprobs.append(event.logprobs)
        if event.finish_reason == "stop":
            params = generation.submission.params
            is_eos = event.token_id in self._eos_token_ids and not params.ignore_eos
            generation.stop_reason = None if is_eos else event.token_id
            self._finish(generation, "stop")
            return
        if generation.detokenizer is not None:
            too_early = len(generation.token_ids) < generation.submission.params.min_tokens
            text = generation.detokenizer.push([event.token_id])
            generation.text += generation.matcher.push(text, suspended=too_early)
        if generation.matcher.matched is not None:
            generation.stop_reason = generation.matcher.matched
            if event.finish_reason is None:
                self._engine.abort(event.request_id)
            self._finish(generation, "stop")
        elif event.finish_reason is not None:
            self._finish(generation, event.finish_reason)

    def _finish(self, generation: _Generation, reason: FinishReason) -> None:
        if generation.detokenizer is not None and generation.matcher.matched is None:
            generation.text += generation.matcher.push(generation.detokenizer.finish()) + generation.matcher.finish()
        generation.finish_reason = reason
        generation.finished_time = time.monotonic()

    def _logprobs(self, generation: _Generation) -> tuple[dict[int, Logprob], ...]:
        return tuple(
            self._position_logprobs(token_id, entry)
            for token_id, entry in zip(generation.token_ids, generation.logprobs, strict=True)
        )

    def _position_logprobs(self, token_id: int, entry: TokenLogprobs) -> dict[int, Logprob]:
        top = {
            top_id: self._logprob(top_id, logprob, rank)
            for rank, (top_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1)
        }
        return {token_id: self._logprob(token_id, entry.logprob, entry.rank), **top}

    def _logprob(self, token_id: int, logprob: float, rank: int) -> Logprob:
        text = self._tokenizer.token_text(token_id) if self._tokenizer is not None else None
        return Logprob(logprob=logprob, rank=rank, decoded_token=text)


def _as_token_ids(prompt: Any) -> tuple[int, ...]:
    if not hasattr(prompt, "__iter__"):
        raise TypeError(f"a prompt must be a string or a sequence of token ids, got {type(prompt).__name__}")
    token_ids = []
    for entry in prompt:
        if isinstance(entry, bool) or not hasattr(entry, "__index__"):
            raise TypeError(f"prompt token ids must be integers, got {entry!r} of type {type(entry).__name__}")
        token_ids.append(operator.index(entry))
    return tuple(token_ids)
