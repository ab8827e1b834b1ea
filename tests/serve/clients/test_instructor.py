"""instructor on OpenAI's client (pip install instructor)."""

from __future__ import annotations

from collections.abc import Iterable

import openai
import pytest
from asked import City
from served_demo import saying

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
FIELDS = {"model": "demo", "messages": [{"role": "user", "content": "Where?"}], "temperature": 1, "max_tokens": 200}


@pytest.fixture
def ask(url):
    instructor = pytest.importorskip("instructor")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield lambda mode: instructor.from_openai(client, mode=instructor.Mode[mode])


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_create_gives_the_object(ask, mode):
    city = ask(mode).chat.completions.create(response_model=City, max_retries=0, seed=1, **FIELDS)
    assert isinstance(city, City) and city._raw_response.usage.total_tokens > 0


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_partial_grows_to_the_object(ask, mode):
    *_, last = ask(mode).chat.completions.create_partial(response_model=City, max_retries=0, seed=1, **FIELDS)
    assert last.city in ("Rome", "Oslo") and isinstance(last.rains, bool)


def test_parallel_calls_are_so_many_objects(ask):
    call = '<tool_call>\n{"name": "City", "arguments": {"city": "%s", "rains": true}}\n</tool_call>'
    said = saying(call % "Rome" + call % "Oslo")
    create = ask("PARALLEL_TOOLS").chat.completions.create
    cities = list(create(response_model=Iterable[City], max_retries=0, extra_body=said, **FIELDS))
    assert cities == [City(city="Rome", rains=True), City(city="Oslo", rains=True)]
