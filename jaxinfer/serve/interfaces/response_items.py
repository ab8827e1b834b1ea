"""The answers of OpenAI's responses: items that grow, as a body or as the events of a stream.

Owns: the items (thoughts, messages, calls), the bodies and events that are made of them.
Does not know: what requests say (responses.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.outputs import CompletionDelta, RequestDelta, RequestOutput
from jaxinfer.request import FinishReason
from jaxinfer.serve.interfaces.answered import Completed, TokenCount, Untold
from jaxinfer.serve.interfaces.errors import ErrorFacts, openai_error
from jaxinfer.serve.interfaces.exchange import Event, Label
from jaxinfer.serve.interfaces.logprobs import TokenNames, chat_logprobs
from jaxinfer.serve.interfaces.turn import PreparedTurn
from jaxinfer.serve.replies.parts import Content, Part, Reasoning, ToolCall
from jaxinfer.text.preparation import Submission


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseExchange:
    """A request for a response that can be run; see Exchange.

    Args:
      prepared: how it runs.
      names: shows tokens.
      label: of the answer.
      settings: the fields that the answer repeats.
      wants_stream: whether the answer comes as a stream.
      num_top: how many of the most likely tokens to show at each position; None shows no log-probabilities.
    """

    prepared: PreparedTurn
    names: TokenNames
    label: Label
    settings: Mapping[str, Any]
    wants_stream: bool
    num_top: int | None

    @property
    def submissions(self) -> Sequence[Submission]:
        """See Exchange."""
        return (self.prepared.submission,)

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See Exchange."""
        completion = outputs[0].outputs[0]
        items = ResponseItems(self)
        reply = self.prepared.new_reply()
        # A whole text does not tell whose its tokens are, so a message has the log-probabilities of all of them.
        logprobs = self.logprobs(completion)
        for part in reply.feed(completion.text or "", completion.finish_reason or "abort"):
            if items.items and items.opens_new(part):
                items.close(logprobs)
            items.add(part)
        if items.items:
            items.close(logprobs, is_cut_off=completion.finish_reason != "stop")
        return self.response(items.items, completion.finish_reason, TokenCount.of(outputs, self.prepared.new_thoughts))

    def stream(self) -> ResponseStream:
        """See Exchange."""
        return ResponseStream(self)

    def response(
        self, items: Sequence[Mapping[str, Any]], reason: FinishReason | None, count: TokenCount
    ) -> dict[str, Any]:
        """The response with some items; without a reason for its end it is in progress."""
        is_whole = reason == "stop"
        status = "in_progress" if reason is None else "completed" if is_whole else "incomplete"
        incomplete = {"reason": "max_output_tokens" if reason == "length" else "content_filter"}
        return {
            "id": f"resp_{self.label.name}",
            "object": "response",
            "created_at": self.label.created,
            "completed_at": int(time.time()) if is_whole else None,
            "status": status,
            "error": None,
            "incomplete_details": incomplete if status == "incomplete" else None,
            **self.settings,
            "output": list(items),
            "usage": None if reason is None else _usage(count),
        }

    def logprobs(self, completion: Completed) -> list[dict[str, Any]]:
        """The log-probabilities of a text's tokens."""
        found = None if self.num_top is None else chat_logprobs(self.names, completion, num_top=self.num_top)
        return [] if found is None else found["content"]


@dataclass(slots=True)
class ResponseItems:
    """The items of a response while they grow: thoughts, messages and calls.

    Args:
      exchange: the request.
      items: those so far; the last one may be open.
    """

    exchange: ResponseExchange
    items: list[dict[str, Any]] = field(default_factory=list)

    def opens_new(self, part: Part) -> bool:
        """Whether a part begins an item."""
        return not self.items or isinstance(part, ToolCall) or self.items[-1]["type"] != _ITEM_TYPES[type(part)]

    def add(self, part: Part) -> dict[str, Any]:
        """Adds a part; returns the item that it belongs to."""
        if self.opens_new(part):
            self.items.append(self._new(part))
        item = self.items[-1]
        if not isinstance(part, ToolCall):
            item["content"][0]["text"] += part.text
        return item

    def close(self, logprobs: Sequence[Mapping[str, Any]], *, is_cut_off: bool = False) -> dict[str, Any]:
        """Completes the last item, and returns it.

        Args:
          logprobs: of its tokens, for a message.
          is_cut_off: whether the model had more to say.
        """
        item = self.items[-1]
        item["status"] = "incomplete" if is_cut_off else "completed"
        if item["type"] == "message":
            item["content"][0]["logprobs"] = list(logprobs)
        return item

    def _new(self, part: Part) -> dict[str, Any]:
        name = f"{self.exchange.label.name}_{len(self.items)}"
        if isinstance(part, ToolCall):
            return {
                "id": f"fc_{name}",
                "type": "function_call",
                "status": "completed",
                "call_id": f"call_{name}",
                "name": part.name,
                "arguments": part.arguments,
            }
        if isinstance(part, Reasoning):
            content = [{"type": "reasoning_text", "text": ""}]
            return {"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": content, "status": "in_progress"}
        content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        return {
            "id": f"msg_{name}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": content,
        }


_ITEM_TYPES = {Content: "message", Reasoning: "reasoning", ToolCall: "function_call"}


class ResponseStream:
    """The events of a request; see Stream.

    Args:
      exchange: the request.
    """

    def __init__(self, exchange: ResponseExchange):
        self._exchange = exchange
        self._reply = exchange.prepared.new_reply()
        self._items = ResponseItems(exchange)
        self._number = 0
        self._untold = Untold()
        self._logprobs: list[dict[str, Any]] = []  # of the item that grows
        self._is_open = False
        self._count = TokenCount(exchange.prepared.new_thoughts)
        self._reason: FinishReason | None = None

    def opening(self) -> Iterator[Event]:
        """See Stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._exchange.response([], None, self._count))

    def progress(self, number: int, delta: RequestDelta) -> Iterator[Event]:
        """See Stream."""
        self._count.add(number, delta)
        for completion in delta.outputs:
            self._reason = completion.finish_reason
            self._untold.add(completion)
            yield from self._grow(completion)

    def _grow(self, completion: CompletionDelta) -> Iterator[Event]:
        for part in self._reply.feed(completion.text or "", completion.finish_reason):
            if self._items.opens_new(part):
                yield from self._close_item()
                item = self._items.add(part)
                yield from self._open_item(item)
            else:
                item = self._items.add(part)
            yield from self._grow_item(item, part, completion)

    def closing(self) -> Iterator[Event]:
        """See Stream."""
        if self._reason is None:
            return
        yield from self._close_item(is_cut_off=self._reason != "stop")
        response = self._exchange.response(self._items.items, self._reason, self._count)
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, facts: ErrorFacts) -> Iterator[Event]:
        """See Stream."""
        error = openai_error(facts)["error"]
        yield self._event("error", message=facts.message, code=facts.code, param=facts.param)
        response = self._exchange.response(self._items.items, None, self._count)
        failed = {"status": "failed", "error": {"code": facts.code or error["type"], "message": facts.message}}
        yield self._event("response.failed", response=response | failed)

    def _open_item(self, item: dict[str, Any]) -> Iterator[Event]:
        self._is_open, self._logprobs = True, []
        if item["type"] == "function_call":
            yield self._of_item("response.output_item.added", item=item | {"arguments": "", "status": "in_progress"})
            return
        part = item["content"][0] | {"text": ""}
        yield self._of_item("response.output_item.added", item=item | {"content": []})
        yield self._of_item("response.content_part.added", item_id=item["id"], content_index=0, part=part)

    def _grow_item(self, item: Mapping[str, Any], part: Part, completion: CompletionDelta) -> Iterator[Event]:
        told = self._untold.take(completion)
        if isinstance(part, ToolCall):
            about = {"item_id": item["id"]}
            yield self._of_item("response.function_call_arguments.delta", **about, delta=part.arguments)
            done = {"name": part.name, "arguments": part.arguments}
            yield self._of_item("response.function_call_arguments.done", **about, **done)
            return
        about = {"item_id": item["id"], "content_index": 0, "delta": part.text}
        if isinstance(part, Reasoning):
            yield self._of_item("response.reasoning_text.delta", **about)
            return
        logprobs = [] if told is None else self._exchange.logprobs(told)
        self._logprobs += logprobs
        yield self._of_item("response.output_text.delta", **about, logprobs=logprobs)

    def _close_item(self, *, is_cut_off: bool = False) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        item = self._items.close(self._logprobs, is_cut_off=is_cut_off)
        if item["type"] != "function_call":
            part = item["content"][0]
            is_text = item["type"] == "message"
            about = {"item_id": item["id"], "content_index": 0}
            more = {"logprobs": part["logprobs"]} if is_text else {}
            kind = "response.output_text.done" if is_text else "response.reasoning_text.done"
            yield self._of_item(kind, **about, text=part["text"], **more)
            yield self._of_item("response.content_part.done", **about, part=part)
        yield self._of_item("response.output_item.done", item=item)

    def _of_item(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self._items.items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return Event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)


def _usage(count: TokenCount) -> dict[str, Any]:
    return {
        "input_tokens": count.num_prompt,
        "input_tokens_details": {"cached_tokens": count.num_cached},
        "output_tokens": count.num_new,
        "output_tokens_details": {"reasoning_tokens": count.num_thoughts or 0},
        "total_tokens": count.num_prompt + count.num_new,
    }
