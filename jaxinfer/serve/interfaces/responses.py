"""OpenAI's responses: POST /v1/responses, without a memory of earlier ones.

Owns: the fields of these requests, and what they mean.
Does not know: how a conversation becomes a prompt (turn.py), what answers look like (response_items.py).

Source: OpenAI's API reference, "Responses". Nothing is stored, so previous_response_id and background are refused, and
tools are functions only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Required, TypedDict

from jaxinfer.serve.interfaces.body import Fields
from jaxinfer.serve.interfaces.chat import effort_variables
from jaxinfer.serve.interfaces.errors import openai_error
from jaxinfer.serve.interfaces.exchange import Interface, Label
from jaxinfer.serve.interfaces.response_items import ResponseExchange
from jaxinfer.serve.interfaces.turn import ToolUse, Turn
from jaxinfer.serve.served_model import ServedModel

RESPONSES = "/v1/responses"
_NOT_HERE = ("previous_response_id", "conversation", "prompt", "context_management")
_ONLY = {"background": (False,), "truncation": ("disabled",), "moderation": (None,), "max_tool_calls": (None,)}
_LOGPROBS = "message.output_text.logprobs"
_INCLUDES = {_LOGPROBS, "reasoning.encrypted_content"}


class ResponseBody(TypedDict, total=False):
    """Fields of a response, beside those of SamplingParams.

    Args:
      model: the model's name.
      input: a text, or the conversation as items: messages, calls and their outputs, thoughts.
      instructions: a system message before the input.
      max_output_tokens: max_tokens by another name; without either the answer goes on to its end token.
      tools: functions that the model may call.
      tool_choice: "auto", "none", "required", or one function by name.
      parallel_tool_calls: whether an answer may have several calls.
      reasoning: its effort is given to the chat template, as in chat completions.
      text: its format is the form of the output, json_object or json_schema.
      include: message.output_text.logprobs brings log-probabilities.
      top_logprobs: how many of the most likely tokens to show at each position, 0 .. 20.
      stream: whether the answer comes as a stream of server-sent events.
      stream_options: nothing that has an effect.
      structured_outputs: one of json, regex, choice and grammar.
      previous_response_id, conversation, prompt, context_management: not supported, since nothing is stored.
      background, truncation, moderation, max_tool_calls: nothing but their defaults.
    """

    model: Required[str]
    input: Required[str | list[dict[str, Any]]]
    instructions: str | None
    max_output_tokens: int | None
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning: dict[str, Any] | None
    text: dict[str, Any] | None
    include: list[str] | None
    top_logprobs: int | None
    stream: bool | None
    stream_options: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    previous_response_id: None
    conversation: None
    prompt: None
    context_management: None
    background: bool | None
    truncation: str | None
    moderation: None
    max_tool_calls: None


def _read(served: ServedModel, body: Mapping[str, Any], label: Label) -> ResponseExchange:
    model = served.answering_name(body.get("model"))
    fields = Fields(body, ResponseBody)
    fields.take("model")
    for name in _NOT_HERE:
        if fields.take(name) is not None:
            raise ValueError(f"{name} is not supported: nothing is stored here; send the whole conversation as input")
    for name, allowed in _ONLY.items():
        fields.take_only(name, *allowed)
    stream = fields.take_bool("stream")
    fields.take_mapping("stream_options")
    include, num_top = fields.take_list("include"), fields.take("top_logprobs")
    for entry in include:
        if entry not in _INCLUDES:
            raise ValueError(f"include must be of {', '.join(sorted(_INCLUDES))}, got {entry!r:.80}")
    shows_logprobs = _LOGPROBS in include
    if num_top and not shows_logprobs:
        raise ValueError(f"top_logprobs needs include: [{_LOGPROBS}]")
    instructions, given = fields.take("instructions"), fields.take("input")
    if not isinstance(instructions, str | None):
        raise TypeError(f"instructions must be a text, got {instructions!r:.80}")
    text_format = fields.take_mapping("text")
    effort = fields.take_mapping("reasoning").get("effort")
    tools, choice = fields.take_list("tools"), fields.take("tool_choice", "auto")
    parallel = fields.take_bool("parallel_tool_calls", True)
    tool_use = ToolUse(tools=[_tool(tool) for tool in tools], **_choice(choice), parallel=parallel)
    limit = fields.take("max_output_tokens")
    logprobs = (num_top or 0) if shows_logprobs else None
    defaults = dataclasses.replace(served.default_params, max_tokens=None, logprobs=logprobs)
    structured = _structured(text_format.get("format"))
    params = fields.take_params(defaults)
    if structured is not None:
        params = dataclasses.replace(params, structured=structured)
    if limit is not None:
        params = dataclasses.replace(params, max_tokens=limit)
    if params.n != 1:
        raise ValueError(f"n must be 1 here, got {params.n}; /v1/chat/completions gives several")
    openers = [] if instructions is None else [{"role": "system", "content": instructions}]
    variables = effort_variables(effort)
    template = {"chat_template_kwargs": variables} if variables else {}
    turn = Turn(messages=[*openers, *_messages(given)], params=params, tool_use=tool_use, template=template)
    settings = {
        "model": model,
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": parallel,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": text_format or {"format": {"type": "text"}},
        "tool_choice": choice,
        "tools": [dict.fromkeys(("description", "parameters", "strict")) | tool for tool in tools],
        "top_logprobs": num_top or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "background": False,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "max_tool_calls": None,
        "service_tier": "default",
        "safety_identifier": body.get("safety_identifier"),
        "prompt_cache_key": body.get("prompt_cache_key"),
    }
    return ResponseExchange(
        prepared=turn.prepare(served),
        names=served.token_names,
        label=label,
        settings=settings,
        wants_stream=stream,
        num_top=logprobs,
    )


def _messages(given: Any) -> Iterator[dict[str, Any]]:
    """The input as messages of a chat. Thoughts and calls belong to the message of the assistant that follows them."""
    if isinstance(given, str) and given:
        yield {"role": "user", "content": given}
        return
    if not isinstance(given, list) or not given:
        raise ValueError(f"input must be a text or a list of items, got {given!r:.80}")
    waiting: dict[str, Any] = {}
    for number, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise ValueError(f"input: item {number} must be an object, got {item!r:.80}")
        kind, role = item.get("type", "message"), item.get("role")
        is_assistants = kind in ("reasoning", "function_call") or (kind == "message" and role == "assistant")
        starts_again = kind in ("reasoning", "message") and ("tool_calls" in waiting or "content" in waiting)
        if waiting and (not is_assistants or starts_again):
            yield {"role": "assistant", **waiting}
            waiting = {}
        if kind == "reasoning":
            waiting["reasoning_content"] = _thoughts(item, number)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            waiting.setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = item.get("output")
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
        elif kind == "message" and role == "assistant":
            waiting["content"] = item.get("content")
        elif kind == "message":
            yield {"role": role, "content": item.get("content")}
        else:
            raise ValueError(f"input: item {number} must be a message, a call or its output, got type {kind!r:.80}")
    if waiting:
        yield {"role": "assistant", **waiting}


def _thoughts(item: Mapping[str, Any], number: int) -> str:
    """The text of an item of thoughts, or else its summary's."""
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"input: item {number} must have thoughts as a list of parts, got {parts!r:.200}")
    return "".join(str(part.get("text", "")) for part in parts)


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise ValueError(f"tools must be functions, got {tool!r:.200}; nothing else is supported")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _choice(choice: Any) -> dict[str, Any]:
    if choice in ("auto", "none", "required"):
        return {"choice": choice}
    if isinstance(choice, Mapping) and choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"choice": "named", "name": choice["name"]}
    raise ValueError(f'tool_choice must be "auto", "none", "required" or name a function, got {choice!r:.200}')


def _structured(form: Any) -> dict[str, Any] | None:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json": {}}
    if kind == "json_schema" and isinstance(form.get("schema"), Mapping):
        return {"json": form["schema"]}
    raise ValueError(f'text.format must have the type "text", "json_object" or "json_schema", got {form!r:.200}')


RESPONSE_INTERFACE = Interface(path=RESPONSES, bodies=(ResponseBody,), read=_read, error=openai_error)
