"""Anthropic's messages: POST /v1/messages and /v1/messages/count_tokens.

Owns: the fields of these requests, the bodies of answers and the events of streams.
Does not know: how a conversation becomes a prompt (turn.py).

Source: Anthropic's API reference, "Messages". The fields of SamplingParams that this API lacks (seed, min_p and others)
are taken, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

from jaxinfer.outputs import CompletionDelta, RequestDelta, RequestOutput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.interfaces.answered import TokenCount
from jaxinfer.serve.interfaces.body import Fields
from jaxinfer.serve.interfaces.chat import effort_variables
from jaxinfer.serve.interfaces.errors import ErrorFacts, anthropic_error
from jaxinfer.serve.interfaces.exchange import Event, Interface, Label, Lookup
from jaxinfer.serve.interfaces.turn import PreparedTurn, ToolUse, Turn, WholeReply
from jaxinfer.serve.replies.parts import Content, Part, Reasoning, ToolCall
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Submission

MESSAGES = "/v1/messages"
_NOT_HERE = ("container", "mcp_servers", "context_management")
_UNKNOWN_USAGE = ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
"""Fields that a message's usage must have, and that mean nothing here."""
_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "named"}
_NO_SIGNATURE = ""
_EMPTY_TEXT = {"type": "text", "text": "", "citations": None}


class CountBody(TypedDict, total=False):
    """Fields of a conversation.

    Args:
      model: the model's name.
      messages: the conversation; contents are texts, or blocks of text, calls, their results and thoughts.
      system: a text or blocks of text that come first.
      tools: functions that the model may call, with name and input_schema.
      tool_choice: its type is auto, any, none or tool; disable_parallel_tool_use allows one call only.
      thinking: its type enabled, adaptive or disabled sets the chat template's variable enable_thinking; without
        it, thinking is disabled.
      output_config: its format is the form of the output, a JSON schema; its effort is given to the chat template.
    """

    model: Required[str]
    messages: Required[list[dict[str, Any]]]
    system: str | list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    tool_choice: dict[str, Any] | None
    thinking: dict[str, Any] | None
    output_config: dict[str, Any] | None


class MessageBody(TypedDict, total=False):
    """Further fields of a message, beside those of SamplingParams.

    Args:
      max_tokens: new tokens at most.
      stop_sequences: texts that end the answer.
      stream: whether the answer comes as a stream of server-sent events.
      structured_outputs: one of json, regex, choice and grammar.
      container, mcp_servers, context_management: not supported.
    """

    max_tokens: Required[int]
    stop_sequences: list[str] | None
    stream: bool | None
    structured_outputs: dict[str, Any] | None
    container: None
    mcp_servers: None
    context_management: None


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageExchange:
    """A request for a message that can be run; see Exchange.

    Args:
      prepared: how it runs.
      label: of the answer.
      model: the name that the answer bears.
      wants_stream: whether the answer comes as a stream.
      shows_thoughts: whether it has the model's thoughts.
    """

    prepared: PreparedTurn
    label: Label
    model: str | None
    wants_stream: bool
    shows_thoughts: bool

    @property
    def submissions(self) -> Sequence[Submission]:
        """See Exchange."""
        return (self.prepared.submission,)

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See Exchange."""
        completion = outputs[0].outputs[0]
        reply = WholeReply.of(self.prepared.new_reply(), completion.text or "", completion.finish_reason)
        blocks: list[dict[str, Any]] = []
        if reply.reasoning is not None and self.shows_thoughts:
            blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": _NO_SIGNATURE})
        if reply.content:
            blocks.append(_EMPTY_TEXT | {"text": reply.content})
        for number, call in enumerate(reply.calls):
            blocks.append(self.tool_use(call, number) | {"input": json.loads(call.arguments)})
        return self.message(TokenCount.of(outputs)) | {
            "content": blocks,
            **_ending(completion.finish_reason, completion.stop_reason, num_calls=len(reply.calls)),
        }

    def stream(self) -> MessageStream:
        """See Exchange."""
        return MessageStream(self)

    def message(self, count: TokenCount) -> dict[str, Any]:
        """The answer without content."""
        return {
            "id": f"msg_{self.label.name}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": _usage(count),
        }

    def tool_use(self, call: ToolCall, number: int) -> dict[str, Any]:
        """The block of a call, with no input yet."""
        name = f"toolu_{self.label.name}_{number}"
        return {"type": "tool_use", "id": name, "name": call.name, "input": {}, "caller": {"type": "direct"}}


class MessageStream:
    """The events of a request; see Stream.

    Args:
      exchange: the request.
    """

    def __init__(self, exchange: MessageExchange):
        self._exchange = exchange
        self._reply = exchange.prepared.new_reply()
        self._num_blocks = self._num_calls = 0
        self._open: type[Part] | None = None
        """The kind of the block that grows."""
        self._has_begun = False
        self._count = TokenCount()
        self._newest: CompletionDelta | None = None

    def opening(self) -> Iterator[Event]:
        """See Stream. The first event has the prompt's tokens, so it waits for an output."""
        yield from ()

    def progress(self, number: int, delta: RequestDelta) -> Iterator[Event]:
        """See Stream."""
        self._count.add(number, delta)
        if not self._has_begun:
            self._has_begun = True
            message = self._exchange.message(self._count)
            message["usage"] |= {"output_tokens": 0}
            yield _event("message_start", message=message)
        for completion in delta.outputs:
            self._newest = completion
            for part in self._reply.feed(completion.text or "", completion.finish_reason):
                yield from self._block(part)

    def closing(self) -> Iterator[Event]:
        """See Stream."""
        yield from self._close_block()
        if self._newest is not None:
            ending = _ending(self._newest.finish_reason, self._newest.stop_reason, num_calls=self._num_calls)
            yield _event("message_delta", delta=ending, usage=_usage(self._count))
        yield _event("message_stop")

    def failure(self, facts: ErrorFacts) -> Iterator[Event]:
        """See Stream."""
        yield Event(anthropic_error(facts), "error")

    def _block(self, part: Part) -> Iterator[Event]:
        if isinstance(part, ToolCall):
            yield from self._close_block()
            yield self._start(self._exchange.tool_use(part, self._num_calls))
            yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})
            self._num_calls += 1
            self._open = ToolCall
            yield from self._close_block()
            return
        if isinstance(part, Reasoning) and not self._exchange.shows_thoughts:
            return
        if self._open is not type(part):
            yield from self._close_block()
            is_text = isinstance(part, Content)
            yield self._start(_EMPTY_TEXT if is_text else {"type": "thinking", "thinking": "", "signature": ""})
            self._open = type(part)
        if isinstance(part, Content):
            yield self._delta({"type": "text_delta", "text": part.text})
        else:
            yield self._delta({"type": "thinking_delta", "thinking": part.text})

    def _start(self, block: Mapping[str, Any]) -> Event:
        return _event("content_block_start", index=self._num_blocks, content_block=block)

    def _delta(self, delta: Mapping[str, Any]) -> Event:
        return _event("content_block_delta", index=self._num_blocks, delta=delta)

    def _close_block(self) -> Iterator[Event]:
        if self._open is None:
            return
        if self._open is Reasoning:
            yield self._delta({"type": "signature_delta", "signature": _NO_SIGNATURE})
        yield _event("content_block_stop", index=self._num_blocks)
        self._num_blocks, self._open = self._num_blocks + 1, None


def _read(served: ServedModel, body: Mapping[str, Any], label: Label) -> MessageExchange:
    model = served.answering_name(body.get("model"))
    fields = Fields(body, CountBody, MessageBody)
    fields.take("model")
    for name in _NOT_HERE:
        fields.take_only(name, None, [], {})
    if body.get("max_tokens") is None:
        raise ValueError("max_tokens must be given")
    stream, stop = fields.take_bool("stream"), fields.take_list("stop_sequences")
    turn, shows_thoughts = _turn(fields)
    defaults = dataclasses.replace(served.default_params, stop=stop or None)
    params, form = fields.take_params(defaults), turn.params.structured
    if form is not None:
        if params.structured is not None:
            raise ValueError("output_config.format and structured_outputs exclude each other, got both")
        params = dataclasses.replace(params, structured=form)
    if params.n != 1:
        raise ValueError(f"n must be 1 here, got {params.n}; /v1/chat/completions gives several")
    prepared = dataclasses.replace(turn, params=params).prepare(served)
    return MessageExchange(
        prepared=prepared, label=label, model=model, wants_stream=stream, shows_thoughts=shows_thoughts
    )


def count_tokens(served: ServedModel, body: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of a conversation's prompt.

    Raises:
      TypeError, ValueError, RefusedError: a field is missing or wrong.
    """
    served.answering_name(body.get("model"))
    fields = Fields(body, CountBody, sampling=False)
    turn, _ = _turn(fields)
    return {"input_tokens": len(served.tokenizer.encode_plain(turn.render(served)))}


def _turn(fields: Fields) -> tuple[Turn, bool]:
    """The conversation, whose parameters have the form of the output alone, and whether thoughts are to be shown."""
    messages = fields.take_list("messages")
    if not messages:
        raise ValueError("messages must be given, at least one")
    system, choice = fields.take("system"), fields.take_mapping("tool_choice")
    thinking = fields.take_mapping("thinking").get("type")
    if thinking not in (None, "enabled", "disabled", "adaptive"):
        raise ValueError(f'thinking must have the type "enabled", "adaptive" or "disabled", got {thinking!r:.80}')
    kind = choice.get("type", "auto")
    if kind not in _CHOICES:
        raise ValueError(f"tool_choice must have a type of {', '.join(_CHOICES)}, got {kind!r:.80}")
    tool_use = ToolUse(
        tools=[_tool(tool) for tool in fields.take_list("tools")],
        choice=_CHOICES[kind],  # pyrefly: ignore[bad-argument-type]
        name=choice.get("name"),
        parallel=not choice.get("disable_parallel_tool_use", False),
    )
    config = fields.take_mapping("output_config")
    variables = {} if config.get("effort") is None else effort_variables(config["effort"])
    thinks = thinking in ("enabled", "adaptive")  # this API's answers have no thoughts unless they are asked for
    variables["enable_thinking"] = thinks
    template: dict[str, Any] = {"chat_template_kwargs": variables}
    params = SamplingParams(structured=_structured(config.get("format")))
    openers = [] if system is None else [{"role": "system", "content": _texts(system, "system")}]
    converted = [entry for number, message in enumerate(messages) for entry in _messages(message, number)]
    if not converted:
        raise ValueError("messages must have a content, at least one")
    if converted[-1]["role"] == "assistant":
        template |= {"add_generation_prompt": False, "continue_final_message": True}
    turn = Turn(messages=[*openers, *converted], params=params, tool_use=tool_use, template=template)
    return turn, thinks


def _structured(form: Any) -> dict[str, Any] | None:
    if form is None:
        return None
    if isinstance(form, Mapping) and form.get("type") == "json_schema" and isinstance(form.get("schema"), Mapping):
        return {"json": form["schema"]}
    raise ValueError(f'output_config.format must have the type "json_schema" and a schema, got {form!r:.200}')


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or "input_schema" not in tool or tool.get("type", "custom") != "custom":
        raise ValueError(f"tools must be given with name and input_schema, got {tool!r:.200}")
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _texts(content: Any, where: str) -> str:
    """A content that is a text or blocks of text, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(_is_text(block) for block in content):
        raise ValueError(f"{where} must be a text or a list of text blocks, got {content!r:.200}")
    return "".join(block["text"] for block in content)


def _is_text(block: Any) -> bool:
    return isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str)


def _messages(message: Any, number: int) -> Iterator[dict[str, Any]]:
    """What a message is in OpenAI's form: each result of a tool is a message of its own there."""
    if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant", "system"):
        raise ValueError(f"messages: entry {number} must have the role user or assistant, got {message!r:.200}")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise ValueError(f"messages: entry {number} must have a content of text or blocks, got {content!r:.80}")
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text" and _is_text(block):
            texts.append(block["text"])
        elif kind == "tool_result" and role == "user":
            result = block.get("content")
            yield {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": "" if result is None else _texts(result, "messages: the content of a tool_result"),
            }
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            raise ValueError(f"messages: entry {number} must have blocks of text and tools, got {block!r:.200}")
    if texts or calls or role == "assistant":
        yield {
            "role": role,
            "content": "".join(texts),
            **({"tool_calls": calls} if calls else {}),
            **({"reasoning_content": "".join(thoughts)} if thoughts else {}),
        }


def _ending(finish_reason: str | None, stop: str | int | None, *, num_calls: int) -> dict[str, Any]:
    if finish_reason == "stop" and num_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if finish_reason == "stop" and isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": "max_tokens" if finish_reason == "length" else "end_turn", "stop_sequence": None}


def _usage(count: TokenCount) -> dict[str, Any]:
    return {
        "input_tokens": count.num_prompt - count.num_cached,
        "output_tokens": count.num_new,
        "cache_read_input_tokens": count.num_cached,
        "cache_creation_input_tokens": 0,
        **dict.fromkeys(_UNKNOWN_USAGE),
    }


def _event(kind: str, **fields: Any) -> Event:
    return Event({"type": kind, **fields}, kind)


MESSAGE_INTERFACE = Interface(path=MESSAGES, bodies=(CountBody, MessageBody), read=_read, error=anthropic_error)
COUNT_LOOKUP = Lookup(path=f"{MESSAGES}/count_tokens", bodies=(CountBody,), answer=count_tokens, error=anthropic_error)
