"""Anthropic's own client gets from the server what it expects."""

from __future__ import annotations

import json

import anthropic
import pytest
from served_demo import saying

TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rome"]}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ASK = {"model": "demo", "max_tokens": 200, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def client(served):
    with anthropic.Anthropic(base_url=served[1].url, api_key="none", max_retries=0) as client:
        yield client


def test_message_is_built_of_blocks_whole_and_streamed(client):
    fields = ASK | {
        "system": "Be.",
        "tools": [TOOL],
        "extra_body": saying(f"<think>Hm.</think>See:\n{CALL}") | {"seed": 1},
    }
    fields["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    message = client.messages.create(**fields)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = message.content
    assert (thinking.thinking, text.text, call.name, call.input) == ("Hm.", "See:", "weather", {"city": "Rome"})
    assert message.stop_reason == "tool_use" and message.usage.output_tokens > 10

    with client.messages.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
    assert streamed.content[1].text == "See:" and streamed.content[2].input == {"city": "Rome"}
    assert streamed.stop_reason == "tool_use" and streamed.usage.output_tokens == message.usage.output_tokens
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def test_thoughts_are_left_out_unless_asked_for(client):
    message = client.messages.create(**ASK, extra_body=saying("<think>Hm.</think>Yes."))
    assert [block.type for block in message.content] == ["text"] and message.content[0].text == "Yes."


def test_stop_reasons(client):
    assert client.messages.create(**ASK | {"max_tokens": 2}).stop_reason == "max_tokens"
    assert client.messages.create(**ASK, extra_body=saying("done")).stop_reason == "end_turn"
    stopped = client.messages.create(**ASK, stop_sequences=["en"], extra_body=saying("the end"))
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "en", "the ")


def test_demanded_tool_is_called_and_its_result_can_be_sent(client):
    tool = TOOL | {"input_schema": TOOL["input_schema"] | {"required": ["city"], "additionalProperties": False}}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    (call,) = client.messages.create(**ASK, tools=[tool], tool_choice=choice, extra_body={"seed": 1}).content
    assert call.input == {"city": "Rome"}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, call.to_dict()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}]},
    ]
    assert client.messages.create(**ASK | {"messages": messages, "max_tokens": 3}, tools=[tool]).content


def test_last_message_of_the_assistant_is_gone_on_with(client):
    messages = [*ASK["messages"], {"role": "assistant", "content": "In the beginning"}]
    answer = client.messages.create(**ASK | {"messages": messages, "max_tokens": 4}, extra_body={"temperature": 0})
    assert answer.content[0].text.startswith(" ")


def test_tokens_are_counted_without_generating(client):
    fields = {"model": "demo", "messages": ASK["messages"]}
    counted = client.messages.count_tokens(**fields).input_tokens
    usage = client.messages.create(**ASK | {"max_tokens": 1}).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"model": "x"}, anthropic.NotFoundError, "does not exist"),
        ({"extra_body": {"top_k": -5}}, anthropic.BadRequestError, "top_k must be >= -1"),
        ({"messages": [{"role": "user", "content": []}]}, anthropic.BadRequestError, "must have a content"),
        ({"messages": [{"role": "x", "content": "y"}]}, anthropic.BadRequestError, "entry 0 must have the role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            anthropic.BadRequestError,
            "blocks of text and tools",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError, "input_schema"),
    ],
)
def test_wrong_requests_are_refused_in_anthropics_form(client, fields, error, text):
    with pytest.raises(error, match=text) as caught:
        client.messages.create(**ASK | fields)
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"].endswith("error")


def test_output_config_holds_the_form_and_tells_the_effort(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "schema": schema}
    message = client.messages.create(**ASK, output_config={"format": form, "effort": "low"})
    assert json.loads(message.content[0].text)["n"] in (1, 2)
    with pytest.raises(anthropic.BadRequestError, match=r"output_config.format must have the type"):
        client.messages.create(**ASK, output_config={"format": {"type": "xml"}})
    with pytest.raises(anthropic.BadRequestError, match="exclude each other"):
        client.messages.create(**ASK, output_config={"format": form}, extra_body=saying("x"))
