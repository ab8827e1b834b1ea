"""What comes back for a prompt, and what is kept to get it again.

Owns: RequestOutput and its parts, GenerationRecord.
Does not know: jax, how outputs come about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.records.html import OutputView, TokenView, render
from jaxinfer.records.record import JsonRecord, Provenance
from jaxinfer.request import FinishReason
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """One token's raw log-probability.

    Args:
      logprob: natural log of the model's probability, before temperature and filters.
      rank: 1 for the most likely token of its position.
      decoded_token: its text alone; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One generated text.

    Args:
      index: which of the n samples.
      text: the text so far; None without a tokenizer.
      token_ids: the tokens so far, the end token included.
      delta: the text that came since the previous output of a stream.
      logprobs: one mapping a token, id -> Logprob, when asked for.
      cumulative_logprob: sum of the sampled tokens' log-probabilities, when asked for.
      finish_reason: "stop", "length", "abort", or None while running.
      stop_reason: the stop string or stop token id that matched; None for an end token of the checkpoint.
      seed: of the sampling noise.
      score: beam search's, log-probability / length ** length_penalty; None otherwise.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    delta: str | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    cumulative_logprob: float | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    seed: int
    score: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRecord:
    """What is kept of one generated text; fields as in CompletionOutput."""

    index: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason | None
    seed: int

    @property
    def has_ended(self) -> bool:
        """Whether it came to its own end; more tokens would have followed otherwise."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRecord(JsonRecord):
    """One prompt, what was made of it, and all that is needed to make it again (`jaxinfer replay`).

    Args:
      provenance: model, settings, versions and devices.
      prompt: the text asked with; None when asked with ids.
      prompt_token_ids: the ids the model saw.
      sampling_params: as used, the seed filled in; None for a beam search.
      beam_search_params: of a beam search; None for samples.
      outputs: the samples.
    """

    provenance: Provenance
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams | None
    beam_search_params: BeamSearchParams | None = None
    outputs: tuple[CompletionRecord, ...]

    def __post_init__(self) -> None:
        if (self.sampling_params is None) == (self.beam_search_params is None):
            raise ValueError("expected either sampling_params or beam_search_params, got both or neither")
        if self.sampling_params is not None and len(self.outputs) != self.sampling_params.n:
            raise ValueError(f"expected one output for each of n={self.sampling_params.n}, got {len(self.outputs)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestMetrics:
    """Times of one request, in seconds of time.monotonic().

    Args:
      arrival_time: submission.
      first_token_time: its first token was read; None before.
      finished_time: it ended; None before.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """The answer to one prompt; `str()` of it is the text.

    Args:
      request_id: unique in its LLM.
      prompt: the text asked with; None when asked with ids.
      prompt_token_ids: the ids the model saw.
      prompt_logprobs: one entry a prompt token, the first None, when asked for.
      outputs: the samples.
      finished: nothing more will come.
      num_cached_tokens: prompt tokens that came from the prefix cache.
      metrics: times.
      sampling_params: as asked; None for a beam search, and where no LLM made the output.
      beam_search_params: of a beam search.
      provenance: what all outputs of one LLM have in common; None where no LLM made the output.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics = field(compare=False)
    sampling_params: SamplingParams | None = field(default=None, compare=False, repr=False)
    beam_search_params: BeamSearchParams | None = field(default=None, compare=False, repr=False)
    provenance: Provenance | None = field(default=None, compare=False, repr=False)

    @property
    def record(self) -> GenerationRecord:
        """What is needed to make this output again; record.to_json() is one line.

        Raises:
          ValueError: no LLM made this output.
        """
        params = self.sampling_params
        if self.provenance is None:
            raise ValueError("only outputs of an LLM have a record, this one has no provenance")
        return GenerationRecord(
            provenance=self.provenance,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            sampling_params=None if params is None else dataclasses.replace(params, seed=self.outputs[0].seed),
            beam_search_params=self.beam_search_params,
            outputs=tuple(_completion_record(output) for output in self.outputs),
        )

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain values, for JSON; without what only its record needs."""
        answer = dataclasses.asdict(self)
        for name in ("sampling_params", "beam_search_params", "provenance"):
            del answer[name]
        return answer

    @property
    def text(self) -> str | None:
        """Text of the first sample; None without a tokenizer."""
        return self.outputs[0].text

    @property
    def delta(self) -> str | None:
        """New text of the first sample since the previous output of a stream."""
        return self.outputs[0].delta

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sample."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[dict[int, Logprob], ...] | None:
        """Log-probabilities of the first sample, when asked for."""
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first sample ended."""
        return self.outputs[0].finish_reason

    def __str__(self) -> str:
        return self.text if self.text is not None else str(list(self.token_ids))

    def _repr_html_(self) -> str:
        """For notebooks: the tokens, coloured by probability where logprobs were asked for, alternatives on hover."""
        prompt = self.prompt if self.prompt is not None else f"{list(self.prompt_token_ids)} "
        return render(prompt, [_view(output) for output in self.outputs])


def _completion_record(output: CompletionOutput) -> CompletionRecord:
    kept = (entry.name for entry in dataclasses.fields(CompletionRecord))
    return CompletionRecord(**{name: getattr(output, name) for name in kept})


def _view(output: CompletionOutput) -> OutputView:
    origin = f"seed {output.seed}" if output.score is None else f"score {output.score:.4f}"
    caption = f"{len(output.token_ids)} tokens, {output.finish_reason or 'running'}, {origin}"
    if output.logprobs is None:
        text = output.text if output.text is not None else str(list(output.token_ids))
        return OutputView(tokens=(TokenView(text=text),), caption=caption)
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return OutputView(tokens=tuple(_token_view(token_id, found) for token_id, found in pairs), caption=caption)


def _token_view(token_id: int, found: Mapping[int, Logprob]) -> TokenView:
    def text(token_id: int) -> str:
        decoded = found[token_id].decoded_token
        return f"{token_id} " if decoded is None else decoded

    others = sorted((other for other in found if other != token_id), key=lambda other: found[other].rank)
    return TokenView(
        text=text(token_id),
        logprob=found[token_id].logprob,
        alternatives=tuple((text(other), found[other].logprob) for other in others),
    )
