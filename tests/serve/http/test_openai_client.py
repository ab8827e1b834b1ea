"""OpenAI's own client gets from the server what it expects, and the same texts as from the LLM."""

from __future__ import annotations

import dataclasses
import json

import openai
import pytest
from served_demo import saying

from jaxinfer import SamplingParams

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/city"}},
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            },
        },
    }
    for name in ("weather", "news")
]
ASK = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[1].url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def llm(served):
    return served[0]


def chat(client, **fields):
    return client.chat.completions.create(model="demo", messages=ASK, **fields)


def test_models_lists_the_model(client):
    (model,) = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion_equals_generate_whatever_runs_beside_it(client, llm):
    fields = {"temperature": 0.9, "top_p": 0.8, "seed": 3, "max_tokens": 12}
    expected = llm.generate("In the beginning", SamplingParams(**fields, n=2)).outputs
    beside = [llm.start(llm.prepare("And", SamplingParams(max_tokens=60, seed=i))) for i in range(3)]
    answer = client.completions.create(model="demo", prompt=["In the beginning", "And it"], n=2, **fields)
    for ticket in beside:
        llm.cancel(ticket)
    assert [choice.text for choice in answer.choices[:2]] == [completion.text for completion in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 4 * 12


@pytest.mark.parametrize("stream", [False, True])
def test_completion_of_token_ids_with_echo_scores_as_score_does(client, llm, stream):
    token_ids = list(llm.score("In the beginning God").prompt_token_ids)
    expected = llm.score(token_ids, prompt_logprobs=1).prompt_logprobs
    fields = {"model": "demo", "prompt": token_ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = client.completions.create(**fields, stream=stream)
    chunks = list(answer) if stream else [answer]
    found = chunks[0].choices[0].logprobs
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1 : len(token_ids)] == [
        pytest.approx(entry[token_id].logprob, abs=1e-5)
        for token_id, entry in zip(token_ids[1:], expected[1:], strict=True)
    ]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert "In the beginning God" in text and len(found.tokens) >= len(token_ids)
    assert all(found.top_logprobs[1:])


def test_stream_gives_the_same_text_and_counts(client, llm):
    params = dataclasses.replace(llm.default_params, temperature=0.9, seed=5, max_tokens=20)
    expected = llm.generate("In the beginning", params).text
    stream = client.completions.create(
        model="demo",
        prompt="In the beginning",
        temperature=0.9,
        seed=5,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, counted = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert counted.choices == [] and counted.usage.completion_tokens == 20


def test_stream_of_many_prompts_and_samples_keeps_them_apart(client):
    fields = {"model": "demo", "prompt": ["And", "But", "For"], "n": 2, "seed": 1, "temperature": 1, "max_tokens": 6}
    whole = client.completions.create(**fields)
    texts = dict.fromkeys(range(6), "")
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_chat_reply_is_told_apart_into_thoughts_content_and_calls(client):
    said = saying(f"<think>\nHm.\n</think>\n\nSee:\n{CALL}\n{CALL.replace('Rome', 'Oslo')}")
    choice = chat(client, tools=TOOLS, extra_body=said, logprobs=True).choices[0]
    assert choice.message.content == "See:" and choice.finish_reason == "tool_calls"
    assert choice.message.reasoning == choice.message.reasoning_content == "Hm."
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert len({call.id for call in calls}) == 2 and choice.logprobs.content

    deltas = [chunk.choices[0] for chunk in chat(client, tools=TOOLS, extra_body=said, stream=True)]
    assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == "tool_calls"
    assert "".join(one.delta.content or "" for one in deltas) == "See:"
    assert "".join(getattr(one.delta, "reasoning", None) or "" for one in deltas) == "Hm."
    streamed = [call for one in deltas for call in one.delta.tool_calls or []]
    assert [call.index for call in streamed] == [0, 1]
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]


def test_chat_without_tools_leaves_calls_in_the_content(client):
    choice = chat(client, extra_body=saying(CALL)).choices[0]
    assert choice.message.content == CALL and choice.message.tool_calls is None and choice.finish_reason == "stop"


def test_chat_without_parallel_calls_gives_the_first(client):
    choice = chat(client, tools=TOOLS, parallel_tool_calls=False, extra_body=saying(CALL + CALL)).choices[0]
    assert len(choice.message.tool_calls) == 1


def test_chat_call_that_is_cut_off_is_left_out(client):
    choice = chat(client, tools=TOOLS, extra_body=saying("Well, " + CALL), max_tokens=20).choices[0]
    assert choice.message.content == "Well," and choice.message.tool_calls is None and choice.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "news"}), ({"type": "function", "function": {"name": "news"}}, {"news"})],
)
def test_demanded_calls_fit_their_schema(client, choice, names, stream):
    for seed in range(3):
        fields = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": seed, "max_tokens": 300}
        answer = chat(client, **fields, parallel_tool_calls=False, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            calls = [call for one in chunks for call in one.delta.tool_calls or []]
            reason = chunks[-1].finish_reason
        else:
            calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        assert len(calls) == 1 and calls[0].function.name in names
        assert json.loads(calls[0].function.arguments)["city"] in ("Rome", "Oslo")
        assert reason == ("tool_calls" if choice == "required" else "stop")


def test_json_schema_holds(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = chat(client, response_format=form, temperature=1, seed=1, max_tokens=100)
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 2)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature must be >= 0"),
        ({"max_tokens": 4, "extra_body": {"tempratur": 1}}, openai.BadRequestError, "did you mean 'temperature'"),
        ({"model": "other"}, openai.NotFoundError, "model 'other' does not exist; this server has demo"),
        ({"n": 1000}, openai.BadRequestError, "n must be at most 128"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, openai.BadRequestError, "structured"),
        ({"extra_body": {"chat_template": "x"}}, openai.BadRequestError, "chat_template must not be given"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, openai.BadRequestError, "the limit is 511"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "this model reads text only",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_refused_by_name(client, fields, error, text, stream):
    with pytest.raises(error, match=text):
        client.chat.completions.create(**{"model": "demo", "messages": ASK, "stream": stream} | fields)


def test_response_is_built_of_items(client):
    said = saying(f"<think>Hm.</think>See:\n{CALL}")
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    fields = {"model": "demo", "input": "Hi", "instructions": "Be.", "tools": tools, "extra_body": said}
    whole = client.responses.create(**fields)
    assert whole.status == "completed" and whole.output_text == "See:"
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert json.loads(whole.output[2].arguments) == {"city": "Rome"}
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "See:" and final.output[2].arguments == whole.output[2].arguments
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.reasoning_text.delta" in kinds and "response.function_call_arguments.done" in kinds


def test_response_to_a_conversation_with_calls_and_too_little_room(client):
    conversation = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
    ]
    answer = client.responses.create(model="demo", input=conversation, max_output_tokens=3, temperature=0)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="item 0 must have thoughts as a list of parts"):
        client.responses.create(model="demo", input=[{"type": "reasoning", "content": ["x"]}, *conversation])
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported"):
        client.responses.create(model="demo", input="x", previous_response_id="resp_1")
