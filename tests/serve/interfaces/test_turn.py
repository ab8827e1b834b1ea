"""Conversations become prompts as their templates need them, and replies begin where their prompts end."""

import dataclasses

import pytest

from jaxinfer import SamplingParams
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.interfaces.logprobs import TokenNames
from jaxinfer.serve.interfaces.turn import ToolUse, Turn
from jaxinfer.serve.replies.formats import FORMATS, find_format
from jaxinfer.serve.replies.parts import Content, Reasoning
from jaxinfer.serve.served_model import ServedModel

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


class FakeLLM:
    """Writes down what it is asked for."""

    prompt = "<prompt>"

    def render_chat(self, messages, **template):
        self.messages, self.template = messages, template
        return self.prompt

    def prepare(self, prompt, params, **options):
        self.prepared, self.params = prompt, params


def served(name, **fields):
    model = ServedModel(
        llm=FakeLLM(),
        config=ServeConfig(),
        names=("m",),
        reply_format=FORMATS[name],
        has_template=True,
        hides_markers=False,
        token_names=TokenNames(None),
    )
    return dataclasses.replace(model, **fields)


def turn(messages, **fields):
    return Turn(messages=messages, params=SamplingParams(max_tokens=9), **fields)


def call(name):
    return {"role": "assistant", "tool_calls": [{"id": name, "function": {"name": "now", "arguments": '{"a": 1}'}}]}


def test_messages_become_what_templates_expect():
    model = served("hermes")
    messages = [
        {"role": "developer", "content": "Be."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]},
        call("call_1"),
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "assistant", "content": None, "reasoning": "Hm."},
    ]
    turn(messages).render(model)
    developer, user, calling, result, thinking = model.llm.messages
    assert developer["role"] == "system"
    assert user["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert calling["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert calling["tool_calls"][0]["id"] == result["tool_call_id"] == "call_1"
    assert thinking == {"role": "assistant", "content": "", "reasoning_content": "Hm."}


def test_ids_of_calls_are_short_for_mistral_and_stay_equal():
    model = served("mistral")
    turn([call("call_0123456789_0"), {"role": "tool", "tool_call_id": "call_0123456789_0", "content": ""}]).render(
        model
    )
    calling, result = model.llm.messages
    name = calling["tool_calls"][0]["id"]
    assert name == result["tool_call_id"] and len(name) == 9 and name.isalnum()
    turn([call("abcDEF123")]).render(model)
    assert model.llm.messages[0]["tool_calls"][0]["id"] == "abcDEF123"


@pytest.mark.parametrize(
    ("prompt", "continued", "parts"),
    [
        ("assistant:", "", [Content("a</think>b")]),
        ("assistant:<think>\n", "", [Reasoning("a"), Content("b")]),
        ("assistant:<think>\nI was", "<think>\nI was", [Reasoning("a"), Content("b")]),
        ("assistant:<think>I was</think>and", "<think>I was</think>and", [Content("a</think>b")]),
    ],
)
def test_replies_begin_in_thoughts_where_prompts_end_in_them(prompt, continued, parts):
    model = served("think")
    model.llm.prompt = prompt
    template = {"continue_final_message": True, "add_generation_prompt": False} if continued else {}
    prepared = turn([{"role": "assistant", "content": continued}], template=template).prepare(model)
    assert prepared.new_reply().feed("a</think>b", "stop") == parts


def test_structured_output_begins_behind_the_thoughts():
    model = served("think")
    model.llm.prompt = "assistant:<think>\n"
    params = SamplingParams(structured={"regex": "[0-9]+"})
    prepared = Turn(messages=[{"role": "user", "content": "x"}], params=params).prepare(model)
    assert model.llm.prepared == "assistant:<think>\n</think>\n\n"
    assert prepared.new_reply().feed("12", "stop") == [Content("12")]


def test_demanded_call_opens_in_the_prompt():
    model = served("hermes")
    turn([{"role": "user", "content": "x"}], tool_use=ToolUse(tools=[TOOL], choice="required")).prepare(model)
    assert model.llm.prepared == "<prompt><tool_call>\n" and "call_0" in model.llm.params.structured.lark


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"has_template": False}, "no chat template; the server's setting chat_template"),
        ({"config": ServeConfig(max_stop=1)}, "stop must be at most 1"),
        ({"config": ServeConfig(max_stop_length=2)}, "stop and bad_words must be at most 2"),
    ],
)
def test_what_the_server_does_not_allow_is_refused(fields, message):
    params = SamplingParams(stop=["abc", "d"])
    with pytest.raises(ValueError, match=message):
        Turn(messages=[{"role": "user", "content": "x"}], params=params).prepare(served("plain", **fields))


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }} <think>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|start_header_id|>", "llama"),
        ("<|tool_call>", "gemma"),
        ("<start_function_call>", "functiongemma"),
        ("<think>", "think"),
        ("{{ messages }}", "plain"),
    ],
)
def test_format_is_found_in_the_template(template, name):
    assert find_format(template) == name
