"""The parameters of a request: SamplingParams for sampling, BeamSearchParams for beam search.

Owns: both classes and the checks of their fields, which are made once, at construction.
Does not know: jax, text processing, how the parameters are put into effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxinfer.config.keywords import names_nearest_field
from jaxinfer.config.validation import require_bool, require_float, require_int
from jaxinfer.constraints.structured_output import StructuredOutput
from jaxinfer.interventions import BoundIntervention
from jaxinfer.logits_functions import BoundLogitsFunction
from jaxinfer.request import MAX_LOGPROBS, LogitEdits
from jaxinfer.sites import Tokens, require_tokens

EarlyStopping = bool | Literal["never"]
MAX_SAMPLES = 16_384
"""Limit of SamplingParams.n. Each sample is a request of its own in the engine from the start."""
MAX_BEAM_WIDTH = 32
IN_PYTHON_ONLY = frozenset({"capture", "capture_tokens", "interventions", "logits_processors", "sampler"})
"""Fields of SamplingParams that hold functions, or make arrays; command line and server have none of them."""
MAX_FLOAT32 = 3.4e38
"""Limit of numbers without another one: the device computes with them in float32, where larger ones are infinite."""
TINY_FLOAT32 = 1.2e-38
"""Least positive number there; what is smaller becomes 0."""
MAX_LENGTH_PENALTY = 50.0
"""With a larger value, length ** length_penalty could overflow a float for a long text."""


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


def _require_structured(name: str, value: object) -> StructuredOutput:
    if isinstance(value, StructuredOutput):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a StructuredOutput or a mapping of its fields, got {value!r}")
    return StructuredOutput(**{str(key): entry for key, entry in value.items()})


def _require_interventions(name: str, value: object) -> tuple[BoundIntervention, ...]:
    entries = (value,) if isinstance(value, BoundIntervention) else value
    if not isinstance(entries, Sequence) or not all(isinstance(entry, BoundIntervention) for entry in entries):
        raise TypeError(f"{name} must be a sequence of what Intervention.at returns, got {value!r}")
    return tuple(entries)


def _require_processors(name: str, value: object) -> tuple[BoundLogitsFunction, ...]:
    entries = (value,) if isinstance(value, BoundLogitsFunction) else value
    if not isinstance(entries, Sequence) or not all(isinstance(entry, BoundLogitsFunction) for entry in entries):
        raise TypeError(f"{name} must be a sequence of what a logits processor's using() returns, got {value!r}")
    for entry in entries:
        if entry.function.role != "processor":
            raise ValueError(f"{name} must be logits processors, got {entry.function}")
    return tuple(entries)


def _require_sampler(name: str, value: object) -> BoundLogitsFunction:
    if not isinstance(value, BoundLogitsFunction) or value.function.role != "sampler":
        raise TypeError(f"{name} must be what a sampler's using() returns, got {value!r}")
    return value


def _require_early_stopping(name: str, value: object) -> EarlyStopping:
    if not isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be True, False or 'never', got {value!r} of type {type(value).__name__}")
    if isinstance(value, bool) or value == "never":
        return value
    raise ValueError(f"{name} must be True, False or 'never', got {value!r}")


def _keep(params: object, name: str, require: Callable[..., Any], *limits: Any, **options: Any) -> None:
    """Checks a field and stores what the check returns: a plain, immutable value for a numpy number or a list, say."""
    object.__setattr__(params, name, require(name, getattr(params, name), *limits, **options))


def _keep_unless_none(params: object, name: str, require: Callable[..., Any], *limits: Any) -> None:
    if getattr(params, name) is not None:
        _keep(params, name, require, *limits)


@names_nearest_field
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Args:
      n: how many samples to generate from the prompt, 1 .. 16,384.
      temperature: divides the logits, >= 0; 0 always takes the most likely token (greedy).
      top_p: keep the most likely tokens whose probabilities together reach this value, (0, 1]; 1 is off.
      top_k: keep the k most likely tokens, ties included, >= -1; 0, -1 and values from the vocabulary size on are off.
      min_p: keep tokens that are at least this many times as probable as the most likely one, [0, 1]; 0 is off.
      seed: seed of the sampling noise, 0 .. 2**63 - 1; None lets the LLM derive one.
      max_tokens: new tokens at most, >= 0; None generates up to max_model_len, for which the KV pages must suffice.
      min_tokens: new tokens before end tokens, stop_token_ids or stop strings may end the text, 0 .. max_tokens.
      stop: strings that end the text, also where they span several tokens.
      stop_token_ids: token ids that end the text, besides the end tokens of the checkpoint.
      ignore_eos: do not stop at the end tokens of the checkpoint.
      include_stop_str_in_output: leave the matched stop string in the text.
      skip_special_tokens: leave special tokens out of the text.
      repetition_penalty: for tokens of the prompt or the output, divides positive logits and multiplies negative ones,
        > 0; 1 is off.
      presence_penalty: subtracted from the logits of tokens that the output contains, [-2, 2].
      frequency_penalty: subtracted from a token's logit once for each time the output contains it, [-2, 2].
      logit_bias: token id -> value added to its logit, [-100, 100].
      bad_words: strings that the output never contains, whichever tokens would spell them.
      allowed_token_ids: the only tokens that may be generated; None allows all.
      structured: what the whole output must look like, a StructuredOutput or a mapping of its one field: json (a
        schema), regex, choice or lark.
      logprobs: report the log-probability of each sampled token and of the k most likely ones, 0 .. 20.
      prompt_logprobs: report the same for each token of the prompt, 0 .. 20.
      truncate_prompt_tokens: keep only the last k tokens of the prompt, >= 1.
      priority: requests with a lower number run first.
      capture: names or patterns of sites inside the model (llm.sites() lists them), such as "layers.*.residual", whose
        values the output brings along in `captures`.
      capture_tokens: of which tokens: "all", "prompt", "last" (the prompt's last one), "generated", or a slice of
        positions in prompt and output, in which negative numbers count from the end of the prompt.
      interventions: what is done to values inside the model, each made by Intervention.at; several at one site are
        called in this order.
      logits_processors: functions that change the logits before temperature and filters, each made by
        LogitsFunction.using; called in this order, after all other edits.
      sampler: takes the place of temperature, top_k, top_p and min_p; made by LogitsFunction.using.

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
    capture: Sequence[str] | None = None
    capture_tokens: Tokens = "all"
    interventions: Sequence[BoundIntervention] | None = None
    logits_processors: Sequence[BoundLogitsFunction] | None = None
    sampler: BoundLogitsFunction | None = None

    def __post_init__(self) -> None:
        keep, keep_unless_none = partial(_keep, self), partial(_keep_unless_none, self)
        keep("n", require_int, 1)
        if self.n > MAX_SAMPLES:
            raise ValueError(f"n must be <= {MAX_SAMPLES}, got {self.n}; ask several times, with seeds of your own")
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
        if self.repetition_penalty < TINY_FLOAT32:
            raise ValueError(f"repetition_penalty must be >= {TINY_FLOAT32:g}, got {self.repetition_penalty:g}")
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) > MAX_FLOAT32:
                raise ValueError(f"{name} must be <= {MAX_FLOAT32:g}, got {getattr(self, name):g}")
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
        keep_unless_none("capture", _require_strings)
        keep("capture_tokens", require_tokens)
        keep_unless_none("interventions", _require_interventions)
        keep_unless_none("logits_processors", _require_processors)
        keep_unless_none("sampler", _require_sampler)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        return tuple(self.stop or ())

    @property
    def edits(self) -> LogitEdits | None:
        """The parameters that change logits, as the engine takes them; None if all are off."""
        edits = LogitEdits(
            logit_bias=tuple((self.logit_bias or {}).items()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            min_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        return None if edits == LogitEdits() else edits


@names_nearest_field
@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """How beam search looks for the most likely texts of one prompt.

    Args:
      beam_width: texts that are continued side by side, 1 .. 32.
      max_tokens: new tokens at most, >= 1.
      length_penalty: a text's score is its log-probability / (new tokens, end token included) ** length_penalty,
        [-50, 50]; above 0 favours long texts, 0 scores by the log-probability alone.
      early_stopping: when the search ends after beam_width texts are finished. True ends it at once. False ends it when
        the best unfinished text, scored at its present length, is no better than the worst finished one. "never" ends
        it when that holds at any length up to max_tokens.
      num_return_sequences: texts returned, best first, 1 .. beam_width.
      stop_token_ids: token ids that end a text, besides the end tokens of the checkpoint.
      ignore_eos: do not stop at the end tokens of the checkpoint.
      skip_special_tokens: leave special tokens out of the text.
      priority: requests with a lower number run first.

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
