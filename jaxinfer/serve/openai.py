"""Requests and answers in the form of OpenAI's API, as plain values of JSON.

Owns: which fields a body may have and what they mean, and the bodies of answers.
Does not know: HTTP, files, engines.

Source: OpenAI's API reference, "Create chat completion" and "Create completion". Fields that only vLLM has (top_k,
min_p, stop_token_ids and others) are taken by their names in SamplingParams. What is not supported is an error, never
ignored, save the fields that only say who asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.outputs import CompletionOutput, Logprob, RequestOutput
from jaxinfer.sampling_params import SamplingParams

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
"""The addresses of both kinds of requests."""
_SAMPLING_FIELDS = {entry.name for entry in dataclasses.fields(SamplingParams)} - {"structured"}
_WHO_ASKS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_FIXED = {"stream": (None, False), "best_of": (None, 1), "suffix": (None, ""), "stream_options": (None,)}
"""Fields that may be given, but only with these values."""
_CHAT_FIELDS = {
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "response_format",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
}
_TEXT_FIELDS = {"prompt", "echo", "response_format"}
_TEMPLATE_FIELDS = ("tools", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """A request for the next message of a conversation.

    Args:
      messages: the conversation.
      params: how to sample.
      template: further arguments of LLM.stream_chat.
      model: the model as the request names it.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    template: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None

    def answer(self, output: RequestOutput, *, name: str, created: int) -> dict[str, Any]:
        """The body of the answer.

        Args:
          output: the finished output.
          name: unique among all answers.
          created: seconds since 1970.
        """
        choices = [
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text},
                "logprobs": _chat_logprobs(completion, self.params.logprobs or 0),
                "finish_reason": completion.finish_reason,
            }
            for completion in output.outputs
        ]
        return {"id": f"chatcmpl-{name}", "object": "chat.completion"} | _shared(self, output, created, choices)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """A request to continue a text.

    Args:
      prompt: the text, or token ids.
      params: how to sample.
      echo: whether the answer's text begins with the prompt.
      model: the model as the request names it.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    echo: bool = False
    model: str | None = None

    def answer(self, output: RequestOutput, *, name: str, created: int) -> dict[str, Any]:
        """The body of the answer; arguments as ChatRequest.answer's."""
        start = (output.prompt or "") if self.echo else ""
        choices = [
            {
                "index": completion.index,
                "text": start + (completion.text or ""),
                "logprobs": _text_logprobs(completion, len(start)),
                "finish_reason": completion.finish_reason,
            }
            for completion in output.outputs
        ]
        return {"id": f"cmpl-{name}", "object": "text_completion"} | _shared(self, output, created, choices)


def read_chat(body: Mapping[str, Any], defaults: SamplingParams) -> ChatRequest:
    """Reads the body of a chat completion.

    Args:
      body: the fields.
      defaults: sampling settings for fields that are not given; without a limit the answer goes on to its end token.

    Raises:
      TypeError, ValueError: a field is missing, unknown, unsupported or wrong.
    """
    fields = _checked(body, _CHAT_FIELDS)
    if "messages" not in fields:
        raise ValueError("the body must have messages")
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    wants_logprobs, top = fields.pop("logprobs", None), fields.pop("top_logprobs", None)
    if not isinstance(wants_logprobs, bool) and wants_logprobs is not None:
        raise TypeError(f"logprobs must be true or false, got {wants_logprobs!r}")
    if top is not None and not wants_logprobs:
        raise ValueError("top_logprobs needs logprobs: true")
    template = {name: fields.pop(name) for name in _TEMPLATE_FIELDS if name in fields}
    messages = fields.pop("messages")
    defaults = dataclasses.replace(defaults, max_tokens=None, logprobs=(top or 0) if wants_logprobs else None)
    return ChatRequest(messages=messages, params=_params(fields, defaults), template=template, model=body.get("model"))


def read_text(body: Mapping[str, Any], defaults: SamplingParams) -> TextRequest:
    """Reads the body of a completion; arguments and errors as read_chat's. Without a limit the answer has 16 tokens."""
    fields = _checked(body, _TEXT_FIELDS)
    if "prompt" not in fields:
        raise ValueError("the body must have a prompt")
    prompt, echo = fields.pop("prompt"), fields.pop("echo", False)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise ValueError(f"prompt must be one text or one list of token ids, got {len(prompt)} prompts; send each")
        prompt = prompt[0]
    if not isinstance(echo, bool):
        raise TypeError(f"echo must be true or false, got {echo!r}")
    return TextRequest(prompt=prompt, params=_params(fields, defaults), echo=echo, model=body.get("model"))


def _checked(body: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    """The fields that are given, without those that only say who asks."""
    known = own | _SAMPLING_FIELDS | _WHO_ASKS | set(_FIXED)
    for name, value in body.items():
        if name not in known:
            raise unknown_keyword(name, sorted(known))
        if name in _FIXED and value not in _FIXED[name]:
            raise ValueError(f"{name} must be {_FIXED[name][-1]!r}, got {value!r}; nothing else is supported")
    return {
        name: value
        for name, value in body.items()
        if value is not None and name not in _WHO_ASKS and name not in _FIXED
    }


def _params(fields: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    form = fields.pop("response_format", None)
    if isinstance(fields.get("logit_bias"), Mapping):
        fields["logit_bias"] = {
            int(token) if isinstance(token, str) and token.isdecimal() else token: bias
            for token, bias in fields["logit_bias"].items()
        }
    return dataclasses.replace(defaults, structured=None if form is None else _structured(form), **fields)


def _structured(form: Any) -> dict[str, Any] | None:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json": {}}
    if kind == "json_schema" and isinstance(form.get("json_schema"), Mapping) and "schema" in form["json_schema"]:
        return {"json": form["json_schema"]["schema"]}
    raise ValueError(f'response_format must have the type "text", "json_object" or "json_schema", got {form!r:.200}')


def error_body(error: BaseException) -> dict[str, Any]:
    """The body of an answer that says what was wrong with the request."""
    kind = "invalid_request_error" if isinstance(error, (TypeError, ValueError, ImportError)) else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": None}}


def _shared(
    request: ChatRequest | TextRequest, output: RequestOutput, created: int, choices: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The fields that all answers have."""
    num_prompt, num_new = len(output.prompt_token_ids), sum(len(entry.token_ids) for entry in output.outputs)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
    return {"created": created, "model": request.model, "choices": choices, "usage": usage}


def _entry(token_id: int, found: Mapping[int, Logprob]) -> dict[str, Any]:
    text = found[token_id].decoded_token
    shown = f"token_id:{token_id}" if text is None else text
    return {"token": shown, "logprob": found[token_id].logprob, "bytes": None if text is None else list(text.encode())}


def _best_first(found: Mapping[int, Logprob]) -> list[int]:
    return sorted(found, key=lambda token_id: found[token_id].rank)


def _chat_logprobs(completion: CompletionOutput, num_top: int) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    content = []
    for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True):
        top = [_entry(other, found) for other in _best_first(found) if found[other].rank <= num_top]
        content.append(_entry(token_id, found) | {"top_logprobs": top})
    return {"content": content}


def _text_logprobs(completion: CompletionOutput, start: int) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    tokens, values, tops, offsets = [], [], [], []
    for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True):
        shown = _entry(token_id, found)
        tokens.append(shown["token"])
        values.append(shown["logprob"])
        tops.append({_entry(other, found)["token"]: found[other].logprob for other in _best_first(found)})
        offsets.append(start)
        start += len(shown["token"])
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
