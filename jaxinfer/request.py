"""The values that travel between the rooms: what is asked, what is computed, what comes back.

Owns: SamplingParams, StructuredOutput and BeamSearchParams (the user's wishes), Request (the engine's view: ids and
numbers), TokenEvent (one new token), RequestOutput and its parts (the answer).
Does not know: jax, text processing, the scheduler.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxinfer.config import require_bool, require_float, require_int, unknown_keyword
from jaxinfer.output_html import OutputView, TokenView, render
from jaxinfer.record import JsonRecord, Provenance

FinishReason = Literal["stop", "length", "abort"]
EarlyStopping = bool | Literal["never"]
MAX_LOGPROBS = 20
MAX_BEAM_WIDTH = 32
MAX_LENGTH_PENALTY = 50.0
"""Either sign: a million tokens to this power is still a float."""
_NOT_BUILT = {
    "n": 1,
    "bad_words": None,
    "prompt_logprobs": None,
}


def _require_strings(name: str, value: object) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"{name} must be a string or a sequence of strings, got {value!r}")
    if any(not word for word in words):
        raise ValueError(f"{name} must not contain an empty string, got {value!r}")
    return tuple(words)


def _require_token_ids(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of token ids, got {value!r}")
    return tuple(require_int(f"{name} entry", token_id, 0) for token_id in value)


def _require_logit_bias(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of token ids to numbers, got {value!r}")
    return {
        require_int(f"{name} key", token_id, 0): require_float(f"{name}[{token_id}]", bias, "in [-100, 100]", -100, 100)
        for token_id, bias in value.items()
    }


def _require_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} of type {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must be a non-empty string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text that UTF-8 can write, got a lone surrogate in {value!r}") from error
    return value


def _require_schema(name: str, value: object) -> str:
    """A JSON schema as JSON text."""
    expected = f"{name} must be a JSON object, as a dict or as its text"
    if not isinstance(value, (str, Mapping)):
        raise TypeError(f"{expected}, got {value!r} of type {type(value).__name__}")
    try:
        schema = json.loads(value) if isinstance(value, str) else dict(value)
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{expected}, got {value!r:.200}, which is none: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{expected}, got {value!r:.200}")
    return text


def _require_choices(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of non-empty strings, got {value!r}")
    if not value:
        raise ValueError(f"{name} must be a sequence of at least one non-empty string, got {value!r}")
    return tuple(_require_text(f"{name} entry", entry) for entry in value)


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutput:
    """What the whole output must look like; exactly one of the fields is given.

    Args:
      json: a JSON schema, as a dict or as its text (kept as text); {} is any JSON object.
      regex: a regular expression in the syntax of Rust's regex crate; it must match the output from end to end.
      choice: non-empty strings, at least one; the output is one of them.
      lark: a context-free grammar in llguidance's dialect of Lark; its rule `start` is the output.

    Raises:
      TypeError, ValueError: none or several are given, or one is not what it must be; the message names the field.

    Example:
      >>> StructuredOutput(json={"type": "integer"}).json
      '{"type": "integer"}'
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        require = {"json": _require_schema, "regex": _require_text, "choice": _require_choices, "lark": _require_text}
        given = [name for name in require if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(require)
            raise ValueError(f"structured must have exactly one of {names}, got {', '.join(given) or 'none'}")
        object.__setattr__(self, given[0], require[given[0]](f"structured.{given[0]}", getattr(self, given[0])))


def _require_structured(name: str, value: object) -> StructuredOutput:
    if isinstance(value, StructuredOutput):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a StructuredOutput or a mapping of its fields, got {value!r}")
    known = [entry.name for entry in dataclasses.fields(StructuredOutput)]
    for key in value:
        if key not in known:
            raise unknown_keyword(str(key), known)
    return StructuredOutput(**value)
def _require_early_stopping(name: str, value: object) -> EarlyStopping:
    if not isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be True, False or 'never', got {value!r} of type {type(value).__name__}")
    if isinstance(value, bool) or value == "never":
        return value
    raise ValueError(f"{name} must be True, False or 'never', got {value!r}")


def _keep(params: object, name: str, require: Callable[..., Any], *limits: Any, **options: Any) -> None:
    """Checks a field and keeps it, whatever it was given as (a numpy number, a list), as a plain, immutable value."""
    object.__setattr__(params, name, require(name, getattr(params, name), *limits, **options))


def _keep_unless_none(params: object, name: str, require: Callable[..., Any], *limits: Any) -> None:
    if getattr(params, name) is not None:
        _keep(params, name, require, *limits)


class EditKind(enum.IntEnum):
    """What the device is told of a token of a slot: its bias; that it must not come yet; that it is in the prompt; that
    it was sampled once."""

    BIAS = 0
    HELD_BACK = 1
    PROMPT = 2
    OUTPUT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitEdits:
    """What a request does to its logits before temperature and filters; fields as in SamplingParams.

    The engine masks the request's stop tokens until min_tokens tokens exist.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Args:
      n: samples of one prompt, >= 1.
      temperature: >= 0; 0 is greedy.
      top_p: keep the most likely tokens until their mass reaches it, (0, 1]; 1 is off.
      top_k: keep the k most likely tokens, ties included, >= -1; 0 and -1 are off.
      min_p: keep tokens of at least this probability relative to the most likely, [0, 1].
      seed: 0 .. 2**63 - 1; None lets the LLM derive one.
      max_tokens: new tokens at most, >= 0; None goes on up to max_model_len.
      min_tokens: new tokens before the end token may come, 0 .. max_tokens.
      stop: strings that end the text; matched across token borders.
      stop_token_ids: ids that end it, besides the end tokens of the checkpoint.
      ignore_eos: go on past the end tokens of the checkpoint.
      include_stop_str_in_output: leave the matched stop string in the text.
      skip_special_tokens: leave special tokens out of the text.
      repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen.
      presence_penalty, frequency_penalty: [-2, 2]; subtracted from logits of tokens generated.
      logit_bias: token id -> [-100, 100], added to its logit.
      bad_words: strings whose tokens never come.
      allowed_token_ids: only these may come.
      structured: what the whole output must look like, a StructuredOutput or a mapping of its one field: json (a
        schema), regex, choice or lark.
      logprobs: 0 .. 20; the sampled token's log-probability and those of the k most likely.
      prompt_logprobs: 0 .. 20, the same for the prompt.
      truncate_prompt_tokens: >= 1; keep only the last k tokens of the prompt.
      priority: lower runs first.

    Raises:
      TypeError, ValueError: a field is outside its range; the message names field, value and range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured: StructuredOutput | Mapping[str, Any] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        keep, keep_unless_none = partial(_keep, self), partial(_keep_unless_none, self)
        keep("n", require_int, 1)
        keep("temperature", require_float, ">= 0", 0, math.inf)
        keep("top_p", require_float, "in (0, 1]", 0, 1, open_low=True)
        keep("top_k", require_int, -1)
        keep("min_p", require_float, "in [0, 1]", 0, 1)
        keep_unless_none("seed", require_int, 0, 2**63 - 1)
        keep_unless_none("max_tokens", require_int, 0)
        keep("min_tokens", require_int, 0, self.max_tokens)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            require_bool(name, getattr(self, name))
        keep("repetition_penalty", require_float, "> 0", 0, math.inf, open_low=True)
        keep("presence_penalty", require_float, "in [-2, 2]", -2, 2)
        keep("frequency_penalty", require_float, "in [-2, 2]", -2, 2)
        for name in ("stop", "bad_words"):
            keep_unless_none(name, _require_strings)
        for name in ("stop_token_ids", "allowed_token_ids"):
            keep_unless_none(name, _require_token_ids)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name at least one token, got none")
        keep_unless_none("logit_bias", _require_logit_bias)
        keep_unless_none("structured", _require_structured)
        for name in ("logprobs", "prompt_logprobs"):
            keep_unless_none(name, require_int, 0, MAX_LOGPROBS)
        keep_unless_none("truncate_prompt_tokens", require_int, 1)
        keep("priority", require_int, -(2**31), 2**31 - 1)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        return tuple(self.stop or ())

    @property
    def edits(self) -> LogitEdits | None:
        """What they do to logits; None for nothing."""
        edits = LogitEdits(
            logit_bias=tuple((self.logit_bias or {}).items()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            min_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        return None if edits == LogitEdits() else edits

    def require_built(self) -> None:
        """Refuses fields that this version cannot honour yet, so that none is ever ignored.

        Raises:
          NotImplementedError: names the field and the value it must keep.
        """
        for name, default in _NOT_BUILT.items():
            if getattr(self, name) != default:
                raise NotImplementedError(f"{name} is not supported yet; leave it at {default!r}")

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> SamplingParams:
        """Builds parameters from keyword arguments.

        Raises:
          TypeError: a keyword is not a field; the message names the nearest field.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for keyword in keywords:
            if keyword not in known:
                raise unknown_keyword(keyword, known)
        return cls(**keywords)


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """How beam search looks for the most likely texts of one prompt.

    Args:
      beam_width: texts that are continued side by side, 1 .. 32.
      max_tokens: new tokens at most, >= 1.
      length_penalty: a text's score is its log-probability / (new tokens, end token included) ** length_penalty,
        [-50, 50]; above 0 favours long texts, 0 scores by the log-probability alone.
      early_stopping: when to end once beam_width texts have: True at once; False when the best open text, were it to
        end now, would not beat the worst of them; "never" when it could not at any length up to max_tokens.
      num_return_sequences: texts returned, best first, 1 .. beam_width.
      stop_token_ids: ids that end a text, besides the end tokens of the checkpoint.
      ignore_eos: go on past the end tokens of the checkpoint.
      skip_special_tokens: leave special tokens out of the text.
      priority: lower runs first.

    Raises:
      TypeError, ValueError: a field is outside its range; the message names field, value and range.
    """

    beam_width: int = 4
    max_tokens: int = 16
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int = 1
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0

    def __post_init__(self) -> None:
        keep = partial(_keep, self)
        keep("beam_width", require_int, 1, MAX_BEAM_WIDTH)
        keep("max_tokens", require_int, 1)
        limit = MAX_LENGTH_PENALTY
        keep("length_penalty", require_float, f"in [{-limit:g}, {limit:g}]", -limit, limit)
        keep("early_stopping", _require_early_stopping)
        keep("num_return_sequences", require_int, 1)
        if self.num_return_sequences > self.beam_width:
            raise ValueError(
                f"num_return_sequences must be <= beam_width = {self.beam_width}, got {self.num_return_sequences}; "
                "raise beam_width"
            )
        _keep_unless_none(self, "stop_token_ids", _require_token_ids)
        for name in ("ignore_eos", "skip_special_tokens"):
            require_bool(name, getattr(self, name))
        keep("priority", require_int, -(2**31), 2**31 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the engine is asked for: token ids and numbers, no text.

    Args:
      request_id: unique among the requests alive.
      prompt_token_ids: at least one id.
      max_tokens: new tokens at most, >= 1; the engine also ends at max_model_len.
      stop_token_ids: ids that end the request with "stop".
      temperature, top_k, top_p, min_p: as in SamplingParams; 0, 0, 1, 0 turn them off.
      seed: of the sampling noise, 0 .. 2**63 - 1.
      logprobs: None, or how many of the most likely tokens to report beside the sampled one.
      priority: lower runs first.
      edits: what is done to its logits; None for nothing.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    priority: int = 0
    edits: LogitEdits | None = None

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("a request needs at least one prompt token, got none")
        require_int("max_tokens", self.max_tokens, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities (natural log, float32) at one position.

    Args:
      logprob, rank: of the sampled token; rank 1 is the most likely.
      top_ids, top_logprobs: the most likely tokens, best first.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One new token of one request.

    Args:
      request_id: whose.
      token_id: the token.
      logprobs: present when the request asked for them.
      finish_reason: set on the request's last token.
      num_cached_tokens: prompt tokens that came from the prefix cache.
    """

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    num_cached_tokens: int


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
      sampling_params: as used, the seed filled in.
      outputs: the samples.
    """

    provenance: Provenance
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    outputs: tuple[CompletionRecord, ...]

    def __post_init__(self) -> None:
        if len(self.outputs) != self.sampling_params.n:
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
      sampling_params: as asked; None where no LLM made the output.
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
    provenance: Provenance | None = field(default=None, compare=False, repr=False)

    @property
    def record(self) -> GenerationRecord:
        """What is needed to make this output again; record.to_json() is one line.

        Raises:
          ValueError: no LLM made this output.
        """
        if self.provenance is None or self.sampling_params is None:
            raise ValueError("only outputs of an LLM have a record, this one has no provenance")
        return GenerationRecord(
            provenance=self.provenance,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            sampling_params=dataclasses.replace(self.sampling_params, seed=self.outputs[0].seed),
            outputs=tuple(_completion_record(output) for output in self.outputs),
        )

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain values, for JSON; without what only its record needs."""
        answer = dataclasses.asdict(self)
        del answer["sampling_params"], answer["provenance"]
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
    caption = f"{len(output.token_ids)} tokens, {output.finish_reason or 'running'}, seed {output.seed}"
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
