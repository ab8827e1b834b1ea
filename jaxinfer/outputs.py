"""The result of a request (RequestOutput), what is new of it while it grows (RequestDelta), and the record from which
it can be generated again (GenerationRecord).

Owns: these classes and their parts, and how an output is shown in a notebook.
Does not know: jax, how outputs are generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from jaxinfer.records.codec import JsonRecord
from jaxinfer.records.html import OutputView, TokenView, render
from jaxinfer.records.provenance import Provenance
from jaxinfer.request import FinishReason
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """The log-probability of one token at one position.

    Args:
      logprob: natural logarithm of the model's probability, before temperature and filters.
      rank: 1 for the most likely token of the position, 2 for the next, and so on.
      decoded_token: the token decoded by itself; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One generated text.

    Args:
      index: which of the n samples this is, from 0.
      text: the text so far; None without a tokenizer.
      token_ids: the tokens so far, the end token included.
      delta: the text that is new since the previous output of a stream; None without a tokenizer.
      logprobs: one mapping id -> Logprob per token, of the sampled token and the most likely ones; None unless
        SamplingParams.logprobs asked for them.
      cumulative_logprob: sum of the log-probabilities of the sampled tokens; None unless logprobs were asked for.
      finish_reason: "stop" after an end token, stop token or stop string, or once structured output is complete;
        "length" at a limit of tokens; "abort" if the request was aborted or its constraints left no token; None while
        it runs.
      stop_reason: the stop string or stop token id that ended the text; None if an end token of the checkpoint did.
      seed: the seed of this sample's noise.
      score: for beam search, log-probability / length ** length_penalty; None for samples.
      captures: float32[tokens, dims] by site, the values that SamplingParams.capture asked for, whatever the mesh, the
        chunks and the drafts; None while the text grows. The last token of a text was sampled but never went through
        the model, so it has no values.
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
    captures: Mapping[str, Float32[np.ndarray, "J ..."]] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRecord:
    """The part of a GenerationRecord that describes one generated text; fields as in CompletionOutput."""

    index: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason | None
    seed: int

    @property
    def has_ended(self) -> bool:
        """Whether generation had ended; False if it was aborted or still running when the record was made."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRecord(JsonRecord):
    """One prompt, the texts generated from it, and all that is needed to generate them again (`jaxinfer replay`).

    Args:
      provenance: model, settings, versions and devices.
      prompt: the prompt's text; None if the caller gave token ids.
      prompt_token_ids: the prompt as the model saw it.
      sampling_params: the parameters with the seed that was used; None for a beam search.
      beam_search_params: the parameters of a beam search; None for samples.
      outputs: the generated texts.
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
      arrival_time: when it was handed to the engine.
      first_token_time: when its first token arrived on the host; None before. A beam search has its end here.
      finished_time: when it ended; None before.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """The answer to one prompt, complete or, in a stream, so far. `str()` of it is the text of its first sample.

    Args:
      request_id: unique within its LLM.
      prompt: the prompt's text; None if the caller gave token ids.
      prompt_token_ids: the prompt as the model saw it.
      prompt_logprobs: one mapping id -> Logprob per prompt token, None for the first token, which nothing precedes;
        None as a whole unless SamplingParams.prompt_logprobs asked for them.
      outputs: the generated texts, one per sample.
      finished: whether all texts have ended.
      num_cached_tokens: prompt tokens whose keys and values came from the prefix cache.
      num_forked_tokens: in a fork, how many of the last tokens of its prompt are output of the text it was forked from.
      weights_version: how often the weights of the LLM had been replaced when it was generated.
      metrics: when the request arrived, gave its first token and ended.
      sampling_params: the caller's; None for a beam search, and for an output that was not made by an LLM.
      beam_search_params: the caller's; None unless it is a beam search.
      provenance: model, settings, versions and devices of the LLM; None for an output that was not made by one.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int
    num_forked_tokens: int = 0
    weights_version: int = 0
    metrics: RequestMetrics = field(compare=False)
    sampling_params: SamplingParams | None = field(default=None, compare=False, repr=False)
    beam_search_params: BeamSearchParams | None = field(default=None, compare=False, repr=False)
    provenance: Provenance | None = field(default=None, compare=False, repr=False)

    @property
    def record(self) -> GenerationRecord:
        """What is needed to generate this output again; its to_json() is one line of JSON.

        Captures are not part of it.

        Raises:
          ValueError: no LLM made this output, it is a fork, or it was made with functions of the caller's
            (interventions and the like) or with weights other than those that the LLM had loaded.
        """
        params = self.sampling_params
        if self.provenance is None:
            raise ValueError("only outputs of an LLM have a record, this one has no provenance")
        if self.weights_version:
            raise ValueError("an output of replaced weights has no record, which names the loaded ones; export them")
        if self.num_forked_tokens:
            raise ValueError("a fork has no record of its own; keep that of the output it was forked from")
        if params is not None:
            if params.interventions or params.logits_processors or params.sampler:
                raise ValueError("an output of functions of the caller's has no record: they cannot be written down")
            params = dataclasses.replace(params, capture=None, capture_tokens="all")
        return GenerationRecord(
            provenance=self.provenance,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            sampling_params=None if params is None else dataclasses.replace(params, seed=self.outputs[0].seed),
            beam_search_params=self.beam_search_params,
            outputs=tuple(_completion_record(output) for output in self.outputs),
        )

    def as_dict(self) -> dict[str, Any]:
        """The answer as a dict of plain values, for JSON, without parameters, provenance (see record) and captures."""
        plain = dataclasses.replace(
            self,
            outputs=tuple(dataclasses.replace(output, captures=None) for output in self.outputs),
            sampling_params=None,
            provenance=None,
        )
        answer = dataclasses.asdict(plain)
        for name in ("sampling_params", "beam_search_params", "provenance"):
            del answer[name]
        for output in answer["outputs"]:
            del output["captures"]
        return answer

    @property
    def text(self) -> str | None:
        """Text of the first sample so far; None without a tokenizer."""
        return self.outputs[0].text

    @property
    def delta(self) -> str | None:
        """New text of the first sample since the previous output of a stream."""
        return self.outputs[0].delta

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sample so far."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[dict[int, Logprob], ...] | None:
        """Log-probabilities of the first sample; None unless they were asked for."""
        return self.outputs[0].logprobs

    @property
    def captures(self) -> Mapping[str, Float32[np.ndarray, "J ..."]] | None:
        """Captured values of the first sample by site, float32[tokens, dims]; None unless they were asked for."""
        return self.outputs[0].captures

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first sample ended; None while it runs."""
        return self.outputs[0].finish_reason

    def __str__(self) -> str:
        return self.text if self.text is not None else str(list(self.token_ids))

    def _repr_html_(self) -> str:
        """HTML for notebooks: with logprobs, each token is coloured by probability and shows alternatives on hover."""
        prompt = self.prompt if self.prompt is not None else f"{list(self.prompt_token_ids)} "
        return render(prompt, [_view(output) for output in self.outputs])


class CompletionDelta(NamedTuple):
    """What is new of one generated text since the delta before. A tuple, since there is one for every streamed token.

    Args:
      index: which of the n samples this is, from 0.
      text: the new text; None without a tokenizer.
      token_ids: the new tokens.
      logprobs: of the new tokens, as CompletionOutput's.
      finish_reason: set on the last delta; as CompletionOutput's.
      stop_reason: as CompletionOutput's.
    """

    index: int
    text: str | None
    token_ids: Sequence[int]
    logprobs: Sequence[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class RequestDelta(NamedTuple):
    """What is new of the answer to one prompt. Deltas add up to the RequestOutput, whose names their fields have.

    Args:
      prompt, prompt_token_ids, prompt_logprobs, num_cached_tokens: as RequestOutput's, whole in every delta.
      outputs: the texts of which there is something new.
      finished: whether all texts have ended.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    num_cached_tokens: int
    outputs: Sequence[CompletionDelta]
    finished: bool


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
