"""Turn: the next message of a conversation, asked for by any of the interfaces that chat.

Owns: which tools are offered or demanded, the prompt and the constraint that follow, and what takes a reply apart.
Does not know: the interfaces' fields and answers.

Source: messages, tools and tool_choice have the form of OpenAI's chat completions; the other interfaces are turned into
it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.replies.forced import ForcedCalls
from jaxinfer.serve.replies.parser import ReplyParser
from jaxinfer.serve.replies.parts import Content, Part, Reasoning, ToolCall
from jaxinfer.serve.replies.thoughts import ThoughtCount
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Submission


class Parser(Protocol):
    """Takes a reply apart."""

    def feed(self, text: str) -> list[Part]:
        """The parts that are decided once this text has been added."""
        ...

    def end(self, *, cut_off: bool = False) -> list[Part]:
        """The parts that are left; cut_off says whether the model had more to say."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """Which tools the model may call.

    Args:
      tools: {"type": "function", "function": {"name", "description", "parameters"}} for each.
      choice: "auto" leaves it to the model, "none" offers none, "required" demands a call, "named" one of `name`.
      name: the tool that is demanded.
      parallel: whether a reply may have several calls.

    Raises:
      TypeError, ValueError: the tools are malformed, or the choice does not fit them.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    choice: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        names = [_tool_name(tool, number) for number, tool in enumerate(self.tools)]
        if len(set(names)) < len(names):
            raise ValueError(f"tools must have different names, got {', '.join(names)}")
        if self.choice in ("required", "named") and not names:
            raise ValueError("tool_choice demands a call, but there are no tools")
        if self.choice == "named" and self.name not in names:
            raise ValueError(f"tool_choice names {self.name!r}, which is none of the tools ({', '.join(names)})")

    @property
    def offered(self) -> Sequence[Mapping[str, Any]]:
        """The tools that the prompt shows."""
        return () if self.choice == "none" else self.tools

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """The JSON schemas of the arguments of the tools that are offered, by name."""
        return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.offered}

    @property
    def demanded(self) -> dict[str, Mapping[str, Any]]:
        """The schemas of the tools of which one must be called, by name; empty if none has to be."""
        if self.choice not in ("required", "named"):
            return {}
        functions = [tool["function"] for tool in self.tools]
        return {
            function["name"]: function.get("parameters") or {"type": "object", "properties": {}}
            for function in functions
            if self.choice == "required" or function["name"] == self.name
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A conversation whose next message is asked for.

    Args:
      messages: the conversation.
      params: how to sample.
      tool_use: which tools there are.
      template: further arguments of LLM.render_chat.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tool_use: ToolUse = field(default_factory=ToolUse)
    template: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, served: ServedModel) -> PreparedTurn:
        """Renders the prompt and makes the request.

        Raises:
          TypeError, ValueError, ImportError: the conversation or its parameters are wrong, or more than the server
            allows.
        """
        reply, tool_use = served.reply_format, self.tool_use
        params = served.limited(self.params) if self.params.max_tokens is None else self.params
        prompt = self.render(served)
        demanded = tool_use.demanded
        forced = ForcedCalls(reply, demanded, parallel=tool_use.parallel) if demanded else None
        if forced is not None:
            if params.structured is not None:
                raise ValueError("tool_choice demands a call, and response_format another output; give one of them")
            params = dataclasses.replace(params, structured={"lark": forced.grammar})
        continued = self._continued
        closer = reply.closer_after(prompt, continued=continued)
        if params.structured is not None and closer is not None:
            prompt, continued, closer = f"{prompt.rstrip()}\n{closer}\n\n", "", None
        if forced is not None:
            prompt += forced.opening
        if served.hides_markers and (tool_use.offered or reply.thoughts):
            params = dataclasses.replace(params, skip_special_tokens=False)
        served.check_limits(params)
        if params.logprobs is not None:
            served.token_names.load()
        submission = served.llm.prepare(prompt, params, add_special_tokens=False, ends_with_pages=True)

        def new_parser() -> Parser | None:
            if forced is not None:
                return forced.parser()
            if not reply.thoughts and not (reply.calls and tool_use.offered):
                return None
            max_calls = None if tool_use.parallel else 1
            return ReplyParser(reply, prompt=prompt, continued=continued, tools=tool_use.schemas, max_calls=max_calls)

        markers = served.thought_markers
        new_thoughts = None if markers is None else partial(ThoughtCount, markers, is_open=closer is not None)
        return PreparedTurn(submission=submission, new_parser=new_parser, new_thoughts=new_thoughts)

    def render(self, served: ServedModel) -> str:
        """The prompt's text.

        Raises:
          TypeError, ValueError: the conversation is wrong, or its template.
        """
        template = dict(self.template)
        if not (served.has_template or "chat_template" in template):
            raise ValueError("this model has no chat template; the server's setting chat_template can give it one")
        if "chat_template" in template and not served.config.allow_chat_template:
            raise ValueError(
                "chat_template must not be given with a request, unless the server has allow_chat_template"
            )
        if served.config.chat_template is not None:
            template.setdefault("chat_template", served.config.chat_template)
        tools = list(self.tool_use.offered) or None
        messages = [_message(entry) for entry in self.messages]
        if served.reply_format.has_short_ids:
            messages = [_with_short_ids(message) for message in messages]
        return served.llm.render_chat(messages, tools=tools, **template)

    @property
    def _continued(self) -> str:
        """The text of the last message, if the reply goes on with it."""
        if not self.template.get("continue_final_message"):
            return ""
        content = self.messages[-1].get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedTurn:
    """A turn that can be run.

    Args:
      submission: for the LLM.
      new_parser: makes what takes one reply apart; None if a reply is nothing but content.
      new_thoughts: makes what counts the thoughts of one reply; None if they cannot be counted.
    """

    submission: Submission
    new_parser: Callable[[], Parser | None]
    new_thoughts: Callable[[], ThoughtCount] | None = None

    def new_reply(self) -> Reply:
        """A reply that has not begun."""
        return Reply(self.new_parser())


class Reply:
    """One reply, told apart into thoughts, content and calls while it grows.

    Args:
      parser: takes it apart; None if it is nothing but content.
    """

    def __init__(self, parser: Parser | None):
        self._parser = parser
        self.num_calls = 0
        """Calls so far."""

    def feed(self, text: str, finish_reason: str | None) -> Iterable[Part]:
        """The parts that are decided with this text.

        Args:
          text: what is new.
          finish_reason: why the reply ends with it; None if it goes on.
        """
        if self._parser is None:
            return [Content(text)] if text else []
        parts = self._parser.feed(text) if text else []
        if finish_reason is not None:
            parts += self._parser.end(cut_off=finish_reason != "stop")
        self.num_calls += sum(isinstance(part, ToolCall) for part in parts)
        return parts


@dataclass(frozen=True, slots=True)
class WholeReply:
    """A reply that is complete.

    Args:
      content: the text for the user; None if there is none beside calls.
      reasoning: the model's thoughts; None if there are none.
      calls: the calls of tools.
    """

    content: str | None
    reasoning: str | None
    calls: tuple[ToolCall, ...]

    @classmethod
    def of(cls, reply: Reply, text: str, finish_reason: str | None) -> WholeReply:
        """Takes a text apart.

        Args:
          reply: one that has not begun.
          text: all of it.
          finish_reason: why it ended.
        """
        parts = list(reply.feed(text, finish_reason or "abort"))
        calls = tuple(part for part in parts if isinstance(part, ToolCall))
        content = "".join(part.text for part in parts if isinstance(part, Content))
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        return cls(content if content or not calls else None, reasoning or None, calls)


def _tool_name(tool: Any, number: int) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise ValueError(f'tools: entry {number} must be {{"type": "function", "function": {{..}}}}, got {tool!r:.200}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise ValueError(f"tools: entry {number} must have a name, got {name!r}")
    if not isinstance(parameters, Mapping | None):
        raise TypeError(f"tools: the parameters of {name} must be a JSON schema as an object, got {parameters!r:.80}")
    return name


def _message(message: Any) -> Any:
    """A message as templates expect it.

    They know no "developer", take the arguments of calls as objects, and call thoughts "reasoning_content". Parts that
    are no text are refused, since some templates would put a token for them into the prompt.
    """
    if not isinstance(message, Mapping):
        return message
    changed = dict(message)
    if changed.get("role") == "developer":
        changed["role"] = "system"
    if changed.get("reasoning") is not None:
        changed.setdefault("reasoning_content", changed["reasoning"])
    changed.pop("reasoning", None)
    if isinstance(changed.get("content"), list):
        changed["content"] = [_text_part(part) for part in changed["content"]]
    if changed.get("tool_calls"):
        changed["tool_calls"] = [_earlier_call(call) for call in _list("tool_calls", changed["tool_calls"])]
    elif changed.get("content") is None and changed.get("role") == "assistant":
        changed["content"] = ""
    return changed


def _with_short_ids(message: Any) -> Any:
    """A message with ids of calls that Mistral's templates take, equal ones for equal ones."""
    if not isinstance(message, Mapping):
        return message
    changed = dict(message)
    if "tool_call_id" in changed:
        changed["tool_call_id"] = _short_id(changed["tool_call_id"])
    if "tool_calls" in changed:
        changed["tool_calls"] = [call | {"id": _short_id(call.get("id"))} for call in changed["tool_calls"]]
    return changed


def _short_id(name: Any) -> str:
    """Nine letters and digits for the id of a call; what is so already stays."""
    text = str(name)
    return text if re.fullmatch("[a-zA-Z0-9]{9}", text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _text_part(part: Any) -> Any:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    raise ValueError(f"messages must have content of text, got a part of type {kind!r:.80}; this model reads text only")


def _earlier_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"messages: tool_calls must have a function with a name, got {call!r:.200}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"messages: the arguments of {function['name']} must be JSON: {error}") from error
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"messages: the arguments of {function['name']} must be an object, got {arguments!r:.80}")
    return {**call, "function": {**function, "arguments": dict(arguments or {})}}


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"messages: {name} must be a list, got {value!r:.80}")
    return value
