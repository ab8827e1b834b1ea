"""Megatron's interfaces: PUT /api of its static server; POST /completions and /chat/completions of its dynamic one.

Owns: the fields of /api. The other two are OpenAI's, with a few fields more.
Does not know: how texts are generated.

Source: Megatron-LM, megatron/core/inference/text_generation_server. Deviations: fields that Megatron checks and then
ignores have their effect here (random_seed, stop_token, stop_on_eol, stop_on_double_eol, prevent_newline_after_colon,
add_BOS), beams are searched for, and a field that we lack is an error unless it is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

from jaxinfer.config.validation import require_float, require_int
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.serve.interfaces.body import Fields
from jaxinfer.serve.interfaces.chat import chat_interface
from jaxinfer.serve.interfaces.errors import ErrorFacts, openai_error
from jaxinfer.serve.interfaces.exchange import Interface, Label, Stream
from jaxinfer.serve.interfaces.text import text_interface
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Submission

API = "/api"
_MOST_TOKENS, _DEFAULT_TOKENS = 2**20, 64
_STOPS = {"stop_on_double_eol": "\n\n", "stop_on_eol": "\n"}
_OFF = {"top_p_decay": (0.0, 0), "top_p_bound": (0.0, 0), "max_len": (), "sentences": ()}
"""Fields that have no counterpart here, with the values that mean nothing."""


_OF_SAMPLING = {*_STOPS, "logprobs", "temperature", "top_k", "top_p", "prevent_newline_after_colon", "random_seed"}


class ApiBody(TypedDict, total=False):
    """Fields of /api.

    Args:
      model: the model's name.
      prompts: texts, at least one.
      tokens_to_generate: new tokens of each; 64 without it.
      logprobs: whether the answer has the log-probabilities of all tokens but each first.
      temperature, top_k, top_p: as in SamplingParams; top_p 0 is off.
      add_BOS: whether the tokenizer's special tokens come before each text.
      stop_on_double_eol, stop_on_eol: whether two line breaks, or one, end a text.
      prevent_newline_after_colon: whether no line break may follow a colon.
      random_seed: seed of the sampling noise; -1 is none.
      stop_token: the id of a token that ends a text.
      beam_width, length_penalty: search for so many beams instead of sampling.
      no_log: ignored.
      top_p_decay, top_p_bound: nothing but 0.
      max_len, sentences: not supported.
    """

    model: str | None
    prompts: Required[list[str]]
    tokens_to_generate: int | None
    logprobs: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    add_BOS: bool | None
    stop_on_double_eol: bool | None
    stop_on_eol: bool | None
    prevent_newline_after_colon: bool | None
    random_seed: int | None
    stop_token: int | None
    beam_width: int | None
    length_penalty: float | None
    no_log: bool | None
    top_p_decay: float | None
    top_p_bound: float | None
    max_len: None
    sentences: None


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiExchange:
    """A request to /api that can be run; see Exchange.

    Args:
      submissions: one per prompt.
      served: the model.
      shows_logprobs: whether the answer has log-probabilities.
    """

    submissions: Sequence[Submission]
    served: ServedModel
    shows_logprobs: bool

    @property
    def wants_stream(self) -> bool:
        """See Exchange; this interface has no streams."""
        return False

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See Exchange."""
        pairs = [(output, completion) for output in outputs for completion in output.outputs]
        tokens = [[*output.prompt_token_ids, *completion.token_ids] for output, completion in pairs]
        body: dict[str, Any] = {
            "text": [(output.prompt or "") + (completion.text or "") for output, completion in pairs],
            "segments": [[self._token_text(token_id) for token_id in ids] for ids in tokens],
            "tokens": tokens,
        }
        if self.shows_logprobs:
            body["logprobs"] = [list(_logprobs(output, completion)) for output, completion in pairs]
        scores = [completion.score for _, completion in pairs]
        return body | ({} if None in scores else {"scores": scores})

    def stream(self) -> Stream:
        """See Exchange."""
        raise NotImplementedError

    def _token_text(self, token_id: int) -> str:
        tokenizer = self.served.llm.tokenizer
        return "" if tokenizer is None else tokenizer.token_text(token_id)


def _read(served: ServedModel, body: Mapping[str, Any], label: Label) -> ApiExchange:
    fields = Fields(body, ApiBody, sampling=False)
    fields.take("model")
    for name, off in _OFF.items():
        if (value := fields.take(name)) is not None and value not in off:
            raise ValueError(f"{name} is not supported, got {value!r:.80}; leave it out")
    prompts = fields.take_list("prompts")
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError(f"prompts must be a list of at least one text, none of them empty, got {prompts!r:.200}")
    max_tokens = require_int("tokens_to_generate", fields.take("tokens_to_generate", _DEFAULT_TOKENS), 0, _MOST_TOKENS)
    width = fields.take("beam_width")
    if width is not None:
        _require_no_sampling(body)
    add_bos, shows_logprobs = fields.take_bool("add_BOS", True), fields.take_bool("logprobs")
    stop_token, length_penalty = fields.take("stop_token"), fields.take("length_penalty", 1.0)
    stop_ids = None if stop_token is None else [require_int("stop_token", stop_token, 0)]
    params = _params(fields, max_tokens=max_tokens, stop_ids=stop_ids, logprobs=0 if shows_logprobs else None)
    served.check_limits(params, num_prompts=len(prompts))
    if width is None:
        submissions = [served.llm.prepare(prompt, params, add_special_tokens=add_bos) for prompt in prompts]
    else:
        width = require_int("beam_width", width, 1)
        beams = BeamSearchParams(
            beam_width=width,
            num_return_sequences=width,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            stop_token_ids=stop_ids,
        )
        submissions = [served.llm.prepare_beam_search(prompt, beams) for prompt in prompts]
    return ApiExchange(submissions=submissions, served=served, shows_logprobs=shows_logprobs and width is None)


def _require_no_sampling(body: Mapping[str, Any]) -> None:
    """Refuses what has no effect on a search for beams."""
    given = [name for name in body if name in _OF_SAMPLING and body[name] not in (None, False)]
    if given:
        raise ValueError(f"{given[0]} has no effect on beam_width's search; leave one of them out")


def _params(fields: Fields, *, max_tokens: int, stop_ids: list[int] | None, logprobs: int | None) -> SamplingParams:
    stops = [text for name, text in _STOPS.items() if fields.take_bool(name)]
    no_line_break = fields.take_bool("prevent_newline_after_colon")
    top_p = require_float("top_p", fields.take("top_p", 0.0), "in [0, 1]", 0, 1)
    seed = fields.take("random_seed")
    if seed is not None and require_int("random_seed", seed, -1) == -1:  # Megatron's word for none
        seed = None
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=fields.take("temperature", 1.0),
        top_k=fields.take("top_k", 0),
        top_p=top_p or 1.0,  # 0 is off there
        seed=seed,
        stop=stops or None,
        stop_token_ids=stop_ids,
        bad_words=[":\n"] if no_line_break else None,
        logprobs=logprobs,
        prompt_logprobs=logprobs,
    )


def _logprobs(output: RequestOutput, completion: CompletionOutput) -> Iterable[float]:
    """Of all tokens but the first."""
    for token_ids, found in (
        (output.prompt_token_ids, output.prompt_logprobs or ()),
        (completion.token_ids, completion.logprobs or ()),
    ):
        for token_id, entry in zip(token_ids, found, strict=True):
            if entry is not None:
                yield entry[token_id].logprob


def _error(facts: ErrorFacts) -> dict[str, Any]:
    """OpenAI's body, and the field in which Megatron's client looks for the message."""
    return openai_error(facts) | {"message": facts.message}


MEGATRON_INTERFACES = (
    Interface(
        path=API,
        method="PUT",
        bodies=(ApiBody,),
        takes_sampling=False,
        read=_read,
        error=_error,
    ),
    text_interface("/completions", as_megatron=True),
    chat_interface("/chat/completions", as_megatron=True),
)
