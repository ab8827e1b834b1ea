"""LangChain's ChatOpenAI (pip install langchain-openai)."""

from __future__ import annotations

import pytest
from asked import CALL, City, weather
from served_demo import saying

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def chat(url):
    langchain_openai = pytest.importorskip("langchain_openai")

    def make(**settings):
        fixed = {"model": "demo", "base_url": url, "api_key": "none", "max_retries": 0, "temperature": 1}
        return langchain_openai.ChatOpenAI(**fixed | settings)  # it gives no seed to the API of responses

    return make


def test_invoke_gives_text_reason_and_usage(chat):
    answer = chat(extra_body=saying("Let there be light.")).invoke("Hi")
    assert answer.content == "Let there be light." and answer.response_metadata["finish_reason"] == "stop"
    counts = answer.usage_metadata
    assert counts["input_tokens"] > 0 and counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"]


@pytest.mark.parametrize("responses", [False, True])
def test_stream_adds_up_to_the_text_and_brings_usage(chat, responses):
    said = saying("Let there be light.")
    *_, last = chunks = list(chat(extra_body=said, stream_usage=True, use_responses_api=responses).stream("Hi"))
    assert len(chunks) > 3 and "".join(chunk.text for chunk in chunks) == "Let there be light."
    whole = sum(chunks[1:], chunks[0])
    assert whole.usage_metadata["output_tokens"] > 1 and last is not None


@pytest.mark.parametrize("responses", [False, True])
def test_tool_call_and_its_result_go_round(chat, responses):
    model = chat(use_responses_api=responses)
    asks = model.bind_tools([weather]).bind(extra_body=saying(CALL))
    call = asks.invoke("How is Rome?")
    assert [(one["name"], one["args"]) for one in call.tool_calls] == [("weather", {"city": "Rome"})]
    streamed = list(asks.stream("How is Rome?"))
    assert sum(streamed[1:], streamed[0]).tool_calls[0]["args"] == {"city": "Rome"}
    result = {"role": "tool", "tool_call_id": call.tool_calls[0]["id"], "content": weather("Rome")}
    answer = (
        model.bind_tools([weather])
        .bind(extra_body=saying("Sun."))
        .invoke([{"role": "user", "content": "How is Rome?"}, call, result])
    )
    assert answer.text == "Sun." and not answer.tool_calls


def test_demanded_call_fits_its_schema(chat):
    asks = chat(max_completion_tokens=200).bind_tools([weather], tool_choice="any", strict=True)
    (call,) = asks.invoke("How is Rome?").tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("responses", [False, True])
def test_structured_output_is_the_object(chat, method, responses):
    model = chat(max_completion_tokens=200, use_responses_api=responses)
    answer = model.with_structured_output(City, method=method).invoke("Where does it rain?")
    assert isinstance(answer, City)
