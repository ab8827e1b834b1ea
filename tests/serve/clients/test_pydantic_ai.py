"""Pydantic AI's agents (pip install 'pydantic-ai-slim[openai,anthropic]')."""

from __future__ import annotations

import asyncio

import anthropic
import openai
import pytest
from asked import CALL, City, weather
from served_demo import saying

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
SETTINGS = {"temperature": 1.0, "seed": 1, "max_tokens": 200, "parallel_tool_calls": False}


@pytest.fixture(params=["openai-chat", "openai-responses", "anthropic"])
def model(url, request):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    # Agents run in the thread's event loop, in which their clients have to be closed, too.
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())
        if request.param == "anthropic":
            client = anthropic.AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
            profile = {"supports_json_schema_output": True}
            yield AnthropicModel("demo", provider=AnthropicProvider(anthropic_client=client), profile=profile)
        else:
            client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
            kind = OpenAIChatModel if request.param == "openai-chat" else OpenAIResponsesModel
            yield kind("demo", provider=OpenAIProvider(openai_client=client))
        runner.run(client.close())


@pytest.fixture
def ai(model):
    import pydantic_ai

    return pydantic_ai


def test_text_comes_whole_and_as_a_stream(ai, model):
    agent = ai.Agent(model, instructions="Be short.", model_settings=SETTINGS | {"extra_body": saying("Light.")})
    result = agent.run_sync("Hi")
    assert result.output == "Light." and result.usage.output_tokens > 0
    streamed = agent.run_stream_sync("Hi")
    assert "".join(streamed.stream_text(delta=True)) == "Light."


@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput"])
def test_structured_output_is_the_object(ai, model, output):
    agent = ai.Agent(model, output_type=getattr(ai, output)(City), model_settings=SETTINGS, retries=0)
    assert isinstance(agent.run_sync("Where does it rain?").output, City)


def test_tool_call_and_its_result_go_round(ai, model):
    def settings(context):
        return SETTINGS | {"extra_body": saying("Sun." if len(context.messages) > 1 else CALL)}

    agent = ai.Agent(model, tools=[weather], model_settings=settings)
    result = agent.run_sync("How is Rome?")
    assert result.output == "Sun."
    assert "sun in Rome" in str(result.all_messages())
