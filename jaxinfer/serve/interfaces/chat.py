"""OpenAI's chat completions: POST /v1/chat/completions.

Owns: the fields of these requests, the bodies of answers and the chunks of streams.
Does not know: how a conversation becomes a prompt (turn.py).

Source: OpenAI's API reference, "Chat". Fields that only vLLM has (top_k, min_p, stop_token_ids and others) are taken by
their names in SamplingParams. The model's thoughts come under both names that clients know, reasoning and
reasoning_content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

from jaxinfer.outputs import CompletionDelta, CompletionOutput, RequestDelta, RequestOutput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.interfaces.answered import Completed, TokenCount, Untold
from jaxinfer.serve.interfaces.body import Fields
from jaxinfer.serve.interfaces.errors import openai_error
from jaxinfer.serve.interfaces.exchange import DONE, Event, Interface, Label
from jaxinfer.serve.interfaces.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from jaxinfer.serve.interfaces.openai_parts import (
    CommonBody,
    Ids,
    Manner,
    MegatronBody,
    OpenAIStream,
    asked_model,
    usage,
)
from jaxinfer.serve.interfaces.turn import PreparedTurn, ToolUse, Turn, WholeReply
from jaxinfer.serve.replies.parts import Content, Part, Reasoning, ToolCall
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Submission

CHAT = "/v1/chat/completions"
TEMPLATE_FIELDS = ("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class ChatBody(TypedDict, total=False):
    """Fields of a chat completion, beside those of SamplingParams.

    Args:
      messages: the conversation; contents are texts, or lists of parts of text.
      max_completion_tokens: max_tokens by another name; without either the answer goes on to its end token.
      logprobs: whether choices have the log-probabilities of their tokens.
      top_logprobs: how many of the most likely tokens to show at each position, 0 .. 20.
      tools: functions that the model may call.
      tool_choice: "auto", "none", "required", or one function by name.
      parallel_tool_calls: whether a reply may have several calls.
      reasoning_effort: given to the chat template; "none" also sets its variable enable_thinking to false.
      include_reasoning: whether the answer has the model's thoughts.
      modalities, verbosity: nothing but ["text"] and "medium".
      chat_template: a template of the request's own, if the server allows that.
      chat_template_kwargs: variables of the chat template, such as enable_thinking.
      add_generation_prompt: whether the prompt ends with the beginning of an answer.
      continue_final_message: whether the answer goes on with the last message.
    """

    messages: Required[list[dict[str, Any]]]
    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: str | None
    include_reasoning: bool | None
    modalities: list[str] | None
    verbosity: str | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


BODIES = (ChatBody, CommonBody)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """A request for the next message of a conversation.

    Args:
      turn: what is asked.
      manner: how it is answered.
      include_reasoning: whether it has the model's thoughts.
    """

    turn: Turn
    manner: Manner
    include_reasoning: bool = True

    @classmethod
    def read(cls, body: Mapping[str, Any], defaults: SamplingParams, *, as_megatron: bool = False) -> ChatRequest:
        """Reads a body.

        Args:
          body: the fields.
          defaults: sampling settings for what is not given; without a limit the answer goes on to its end token.
          as_megatron: whether answers have Megatron's fields, too.

        Raises:
          TypeError, ValueError: a field is missing, unknown, unsupported or wrong.
        """
        fields = Fields(body, *BODIES, *([MegatronBody] if as_megatron else []))
        manner = Manner.take(fields, as_megatron=as_megatron)
        messages = fields.take_list("messages")
        if not messages:
            raise ValueError("messages must be given, at least one")
        fields.take_only("modalities", ["text"])
        fields.take_only("verbosity", "medium")
        fields.take("add_BOS")  # the template writes it
        include_reasoning = fields.take_bool("include_reasoning", True)
        tool_use = ToolUse(
            tools=fields.take_list("tools"),
            **_choice(fields.take("tool_choice", "auto")),
            parallel=fields.take_bool("parallel_tool_calls", True),
        )
        variables = effort_variables(fields.take("reasoning_effort")) | fields.take_mapping("chat_template_kwargs")
        template = {name: value for name in TEMPLATE_FIELDS if (value := fields.take(name)) is not None}
        if variables:
            template["chat_template_kwargs"] = variables
        limit = fields.take("max_completion_tokens")
        params = _params(fields, dataclasses.replace(defaults, max_tokens=None))
        if limit is not None:
            params = dataclasses.replace(params, max_tokens=limit)
        turn = Turn(messages=messages, params=params, tool_use=tool_use, template=template)
        return cls(turn=turn, manner=manner, include_reasoning=include_reasoning)

    def prepared(self, served: ServedModel, label: Label, *, model: str | None) -> ChatExchange:
        """Makes it ready to run; errors as Turn.prepare's."""
        return ChatExchange(
            request=self, prepared=self.turn.prepare(served), names=served.token_names, label=label, model=model
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatExchange:
    """A chat request that can be run; see Exchange.

    Args:
      request: what was asked.
      prepared: how it runs.
      names: shows tokens.
      label: of the answer.
      model: the name that the answer bears.
    """

    request: ChatRequest
    prepared: PreparedTurn
    names: TokenNames
    label: Label
    model: str | None

    @property
    def submissions(self) -> Sequence[Submission]:
        """See Exchange."""
        return (self.prepared.submission,)

    @property
    def wants_stream(self) -> bool:
        """See Exchange."""
        return self.request.manner.wants_stream

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See Exchange."""
        (output,) = outputs
        choices = [self._choice(output, completion) for completion in output.outputs]
        body = self.head("chat.completion") | {
            "choices": choices,
            "usage": usage(TokenCount.of(outputs, self.prepared.new_thoughts)),
        }
        if output.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return body

    def stream(self) -> ChatStream:
        """See Exchange."""
        return ChatStream(self)

    def head(self, kind: str) -> dict[str, Any]:
        """The fields with which answers and chunks begin."""
        return {
            "id": f"chatcmpl-{self.label.name}",
            "object": kind,
            "created": self.label.created,
            "model": self.model,
        }

    def finish_reason(self, reason: str | None, *, num_calls: int) -> str | None:
        """Why a choice ended, as clients are told."""
        if reason == "stop" and num_calls and self.request.turn.tool_use.choice != "named":
            return "tool_calls"
        return reason

    def tool_call(self, call: ToolCall, *, index: int, number: int) -> dict[str, Any]:
        """A call of a choice's message."""
        return {
            "id": f"call_{self.label.name}_{index}_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def logprobs(self, completion: Completed) -> dict[str, Any] | None:
        """The log-probabilities of a choice's tokens."""
        num_top = self.request.turn.params.logprobs or 0
        return chat_logprobs(self.names, completion, num_top=num_top, as_ids=self.request.manner.ids.as_ids)

    def _choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        reply = WholeReply.of(self.prepared.new_reply(), completion.text or "", completion.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None, "annotations": []}
        if reply.reasoning is not None and self.request.include_reasoning:
            message |= {"reasoning": reply.reasoning, "reasoning_content": reply.reasoning}
        if reply.calls:
            calls = enumerate(reply.calls)
            message["tool_calls"] = [self.tool_call(call, index=completion.index, number=i) for i, call in calls]
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self.logprobs(completion),
            "finish_reason": self.finish_reason(completion.finish_reason, num_calls=len(reply.calls)),
            "stop_reason": completion.stop_reason,
            **self.request.manner.ids.of_choice(output, completion),
        }


class ChatStream(OpenAIStream):
    """The chunks of a chat request; see Stream.

    Args:
      exchange: the request.
    """

    def __init__(self, exchange: ChatExchange):
        num = exchange.request.turn.params.n
        self._exchange = exchange
        self._head = exchange.head("chat.completion.chunk")
        self._replies = [exchange.prepared.new_reply() for _ in range(num)]
        self._untold = [Untold() for _ in range(num)]
        self._brings_tokens = exchange.request.turn.params.logprobs is not None or exchange.request.manner.ids != Ids()
        self._count = TokenCount(exchange.prepared.new_thoughts)

    def opening(self) -> Iterator[Event]:
        """See Stream."""
        for index in range(len(self._replies)):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def progress(self, number: int, delta: RequestDelta) -> Iterator[Event]:
        """See Stream."""
        self._count.add(number, delta)
        for completion in delta.outputs:
            yield from self._grow(delta, completion)

    def closing(self) -> Iterator[Event]:
        """See Stream."""
        yield from self._exchange.request.manner.usage_chunks(self._head, self._count)
        yield Event(DONE)

    def _grow(self, answer: RequestDelta, completion: CompletionDelta) -> Iterator[Event]:
        index, reason = completion.index, completion.finish_reason
        if self._brings_tokens:
            self._untold[index].add(completion)
        reply = self._replies[index]
        num_calls = reply.num_calls
        for part in reply.feed(completion.text or "", reason):
            delta = self._delta(part, index=index, number=num_calls)
            num_calls += isinstance(part, ToolCall)
            if delta is not None:
                yield self._chunk(index, delta, **self._tokens(answer, completion))
        if reason is not None:
            finish = self._exchange.finish_reason(reason, num_calls=reply.num_calls)
            more = {"stop_reason": completion.stop_reason, **self._tokens(answer, completion)}
            yield self._chunk(index, {}, finish_reason=finish, **more)

    def _delta(self, part: Part, *, index: int, number: int) -> dict[str, Any] | None:
        if isinstance(part, Content):
            return {"content": part.text}
        if isinstance(part, Reasoning):
            told = self._exchange.request.include_reasoning
            return {"reasoning": part.text, "reasoning_content": part.text} if told else None
        return {"tool_calls": [{"index": number, **self._exchange.tool_call(part, index=index, number=number)}]}

    def _tokens(self, answer: RequestDelta, completion: CompletionDelta) -> dict[str, Any]:
        """What a chunk says about the tokens that no chunk has spoken of yet."""
        untold = self._untold[completion.index]
        is_first = not untold.has_told
        told = untold.take(completion)
        if told is None:
            return {}
        fields: dict[str, Any] = {"logprobs": self._exchange.logprobs(told)}
        if is_first and answer.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(answer.prompt_logprobs)
        return fields | self._exchange.request.manner.ids.of_choice(answer, told, is_first=is_first)

    def _chunk(self, index: int, delta: Mapping[str, Any], **choice: Any) -> Event:
        one = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | choice
        return Event({**self._head, "choices": [one], **self._exchange.request.manner.usage_of_chunk(self._count)})


def effort_variables(effort: Any) -> dict[str, Any]:
    """The variables of chat templates that say how much to think; none without an effort.

    Raises:
      TypeError: effort is no text.
    """
    if effort is None:
        return {}
    if not isinstance(effort, str):
        raise TypeError(f"reasoning_effort must be a text such as low or high, got {effort!r:.80}")
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}


def _choice(choice: Any) -> dict[str, Any]:
    if choice in ("auto", "none", "required"):
        return {"choice": choice}
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str) and choice.get("type") == "function":
        return {"choice": "named", "name": function["name"]}
    raise ValueError(
        'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ..}}, got '
        f"{choice!r:.200}"
    )


def _params(fields: Fields, defaults: SamplingParams) -> SamplingParams:
    wants_logprobs, top = fields.take_bool("logprobs"), fields.take("top_logprobs")
    if top is not None and not wants_logprobs:
        raise ValueError("top_logprobs needs logprobs: true")
    return fields.take_params(dataclasses.replace(defaults, logprobs=(top or 0) if wants_logprobs else None))


def chat_interface(path: str, *, as_megatron: bool = False) -> Interface:
    """The interface at an address; as_megatron adds Megatron's fields to answers."""

    bodies = (*BODIES, MegatronBody) if as_megatron else BODIES

    def read(served: ServedModel, body: Mapping[str, Any], label: Label) -> ChatExchange:
        model = asked_model(served, body, as_megatron=as_megatron)
        request = ChatRequest.read(body, served.default_params, as_megatron=as_megatron)
        return request.prepared(served, label, model=model)

    return Interface(path=path, bodies=bodies, read=read, error=openai_error)
