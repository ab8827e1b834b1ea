"""litellm, by its providers for vLLM, OpenAI and Anthropic (pip install litellm)."""

from __future__ import annotations

import json

import pytest
from asked import CALL, TOOLS, City
from served_demo import saying

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
SCHEMA = TOOLS[0]["function"]["parameters"] | {"maxProperties": 1}


@pytest.fixture
def litellm(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm")


@pytest.fixture(params=["hosted_vllm/demo", "openai/demo", "anthropic/demo"])
def ask(litellm, url, request):
    is_anthropic = request.param.startswith("anthropic")
    base = url.removesuffix("/v1") if is_anthropic else url

    def complete(*, extra_body=None, thinks=False, **fields):
        if is_anthropic and thinks:  # without it, Anthropic's answers have no thoughts
            thinking = {"type": "enabled", "budget_tokens": 64}
            fields |= {"thinking": thinking, "allowed_openai_params": ["thinking"]}
        # It sends "extra_body" to Anthropic's API as it is, and fields of no API on to either.
        fields |= (extra_body or {}) if is_anthropic else {"extra_body": extra_body}
        fixed = {
            "model": request.param,
            "api_base": base,
            "api_key": "none",
            "messages": [{"role": "user", "content": "Hi"}],
            "num_retries": 0,
        }
        return litellm.completion(**fixed | {"max_tokens": 200} | fields)

    return complete


def test_completion_gives_text_reason_and_usage(ask):
    answer = ask(extra_body=saying("Let there be light."))
    assert answer.choices[0].message.content == "Let there be light." and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_stream_adds_up_to_the_text(ask, litellm):
    chunks = list(ask(extra_body=saying("Let there be light."), stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == "Let there be light." and whole.usage.completion_tokens > 1


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_and_calls_are_told_apart(ask, litellm, stream):
    answer = ask(extra_body=saying(f"<think>Hm.</think>{CALL}"), tools=TOOLS, stream=stream, thinks=True)
    message = (litellm.stream_chunk_builder(list(answer)) if stream else answer).choices[0].message
    assert message.reasoning_content == "Hm."
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"city": "Rome"}]


def test_demanded_call_fits_its_schema(ask):
    # For vLLM it takes additionalProperties out of the schema, so that a call might have more properties.
    tools = [dict(TOOLS[0], function=TOOLS[0]["function"] | {"parameters": SCHEMA})]
    answer = ask(tools=tools, tool_choice="required", temperature=1, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


def test_response_format_is_the_object(ask):
    answer = ask(response_format=City, temperature=1)
    City.model_validate_json(answer.choices[0].message.content)


def test_error_is_of_its_class(ask, litellm):
    with pytest.raises(litellm.BadRequestError):
        ask(temperature=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": "long " * 2000}])


def test_text_completion_gives_text(litellm, url):
    answer = litellm.text_completion(
        model="text-completion-openai/demo", prompt="In the", api_base=url, api_key="none", max_tokens=4
    )
    assert answer.choices[0].text and answer.usage.completion_tokens == 4
