"""Requests whose parts are replaced by junk are answered, and never by an error of the server's own."""

from __future__ import annotations

import random

import httpx
import pytest

FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome"]}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
SAMPLING = {"temperature": 1, "top_k": 3, "seed": 1, "logit_bias": {"5": 1}, "stop": ["x"], "stop_token_ids": [1]}
CHAT = {
    "model": "demo",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "reasoning": "h", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "sun"},
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "max_tokens": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"a": 1},
    "metadata": {"a": "b"},
    **SAMPLING,
}
FORM = {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"type": "string", "pattern": "a+"}}}}}
TEXT = {"model": "demo", "prompt": [[1, 2], [3]], "echo": True, "logprobs": 1, "max_tokens": 2, "best_of": 1}
RESPONSE = {
    "model": "demo",
    "instructions": "x",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "content": [{"text": "t"}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
    ],
    "tools": [{"type": "function", **FUNCTION}],
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "text"}},
    "include": ["message.output_text.logprobs"],
    "max_output_tokens": 2,
}
MESSAGE = {
    "model": "demo",
    "max_tokens": 2,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "h", "signature": ""},
                {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "sun"}]},
    ],
    "tools": [{"name": "weather", "description": "d", "input_schema": FUNCTION["parameters"]}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1},
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
}
CASES = {
    "/v1/chat/completions": [
        CHAT,
        {"model": "demo", "messages": CHAT["messages"], "max_tokens": 2, "response_format": FORM},
    ],
    "/v1/completions": [TEXT | SAMPLING, TEXT | {"structured_outputs": {"regex": "a+"}, "stream": True}],
    "/v1/responses": [RESPONSE],
    "/v1/messages": [MESSAGE],
    "/v1/messages/count_tokens": [{name: MESSAGE[name] for name in ("model", "messages", "system", "tools")}],
    "/api": [{"prompts": ["a"], "tokens_to_generate": 2, "logprobs": True, "random_seed": 1, "stop_token": 5}],
    "/tokenize": [{"messages": CHAT["messages"], "tools": [TOOL]}, {"prompt": "x"}],
    "/detokenize": [{"tokens": [1, 2]}],
}
JUNK = (
    *(None, True, 0, -1, 2**31, 2**64, -0.5, 1e308, "", "x", "\x00", "\U0001f600", "9" * 5000, "text", "auto"),
    *([], {}, [[]], [{}], [None], ["x"], [1], {"a": 1}, {"type": "text"}, {"type": "text", "text": 1}, {"": None}),
)


def spots(value, path=()):
    """The paths of all parts of a value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from spots(part, (*path, key))


def replaced(value, path, junk):
    if not path:
        return junk
    copied = value.copy()
    copied[path[0]] = replaced(value[path[0]], path[1:], junk)
    return copied


@pytest.mark.parametrize("path", CASES)
def test_junk_in_a_request_is_never_an_error_of_the_server(served, path):
    draws = random.Random(path)
    with httpx.Client(base_url=served[1].url, timeout=60) as http:
        method = "PUT" if path == "/api" else "POST"
        assert [http.request(method, path, json=body).status_code for body in CASES[path]] == [200] * len(CASES[path])
        for _ in range(60):
            body = draws.choice(CASES[path])
            for _ in range(draws.choice((1, 1, 2))):
                body = replaced(body, draws.choice(list(spots(body))), draws.choice(JUNK))
            answer = http.request(method, path, json=body)
            assert answer.status_code in (200, 400, 404) and "internal_error" not in answer.text, body
