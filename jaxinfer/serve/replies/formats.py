"""How families of models write their replies: the markers of thoughts, and the syntax of calls.

Owns: which format a chat template speaks.
Does not know: how a reply is taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.serve.replies.calls import CallSyntax, GemmaCalls, HermesCalls, LlamaCalls, MistralCalls
from jaxinfer.serve.replies.xml_calls import XmlCalls

_THINK = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForcedForm:
    """How calls are written that a request demands: JSON objects with the tool's name and its arguments.

    Args:
      opening: what stands before the first one.
      between: what stands between two.
      arguments: the key of the arguments.
    """

    opening: str = ""
    between: str = "\n"
    arguments: str = "arguments"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyFormat:
    """How a model writes a reply.

    Args:
      thoughts: markers before and behind the thoughts with which a reply may begin.
      calls: how tools are called; None if the model has no way to.
      forced: how calls are written that a request demands.
      has_short_ids: whether the chat template wants ids of calls that are nine letters and digits.
    """

    thoughts: tuple[tuple[str, str], ...] = ()
    calls: CallSyntax | None = None
    forced: ForcedForm = ForcedForm()
    has_short_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers."""
        return (*(marker for pair in self.thoughts for marker in pair), *(self.calls.openers if self.calls else ()))

    def closer_after(self, prompt: str, *, continued: str = "") -> str | None:
        """The marker behind the thoughts that the end of a prompt has begun; None if it has begun none.

        Args:
          prompt: its end suffices.
          continued: the end of the prompt that is the beginning of the reply, in which thoughts may be open anywhere.
        """
        end = prompt[-64:].rstrip()
        for opener, closer in self.thoughts:
            if end.endswith(opener.rstrip()) or continued.rfind(opener.rstrip()) > continued.rfind(closer):
                return closer
        return None


_SIGNS = {
    "<|tool_call>": "gemma",
    "<start_function_call>": "functiongemma",
    "<parameter=": "qwen-xml",
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama",
    "<|start_header_id|>": "llama",
    "<|header_start|>": "llama",
    "<think>": "think",
}
"""What a chat template contains if the model writes in a format; the first one that is found counts."""

_BETWEEN_TAGS = ForcedForm(opening="<tool_call>\n", between="\n</tool_call>\n<tool_call>\n")
FORMATS = {
    "plain": ReplyFormat(),
    "think": ReplyFormat(thoughts=(_THINK,)),
    "hermes": ReplyFormat(thoughts=(_THINK,), calls=HermesCalls(), forced=_BETWEEN_TAGS),
    "qwen-xml": ReplyFormat(thoughts=(_THINK,), calls=XmlCalls(), forced=_BETWEEN_TAGS),
    "llama": ReplyFormat(calls=LlamaCalls(), forced=ForcedForm(between="; ", arguments="parameters")),
    "mistral": ReplyFormat(
        thoughts=(("[THINK]", "[/THINK]"), _THINK),
        calls=MistralCalls(),
        forced=ForcedForm(opening="[TOOL_CALLS] [", between=", "),
        has_short_ids=True,
    ),
    "gemma": ReplyFormat(
        thoughts=(("<|channel>thought\n", "<channel|>"), ("<|channel>thought", "<channel|>")), calls=GemmaCalls()
    ),
    "functiongemma": ReplyFormat(
        calls=GemmaCalls(opener="<start_function_call>", closer="<end_function_call>", quote="<escape>")
    ),
}
"""Formats by name."""


def find_format(template: str) -> str:
    """The name of the format that a chat template's source speaks of; "plain" if it speaks of none.

    Example:
      >>> find_format("{{ '<tool_call>' }}")
      'hermes'
    """
    return next((name for sign, name in _SIGNS.items() if sign in template), "plain")
