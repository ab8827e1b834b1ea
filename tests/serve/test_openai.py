"""Bodies of OpenAI's API mean what its reference says, and what is not supported is refused."""

import pytest

from jaxinfer import CompletionOutput, Logprob, RequestOutput, SamplingParams
from jaxinfer.outputs import RequestMetrics
from jaxinfer.serve.openai import error_body, read_chat, read_text

DEFAULTS = SamplingParams(temperature=0.6, top_k=7)
MESSAGES = [{"role": "user", "content": "hello"}]


def make_output(**fields):
    numbers = ({5: (-0.5, 2, "b"), 4: (-0.25, 1, "é"), 9: (-3.0, 3, "c")}, {4: (-1.0, 4, "é")})
    found = tuple(
        {
            token_id: Logprob(logprob=logprob, rank=rank, decoded_token=text)
            for token_id, (logprob, rank, text) in entry.items()
        }
        for entry in numbers
    )
    completion = CompletionOutput(
        index=0,
        text="bé",
        token_ids=(5, 4),
        delta="bé",
        logprobs=found,
        cumulative_logprob=-1.5,
        finish_reason="stop",
        stop_reason=None,
        seed=1,
    )
    return RequestOutput(
        request_id="0",
        prompt="p",
        prompt_token_ids=(1, 2, 3),
        outputs=(completion,),
        finished=True,
        num_cached_tokens=0,
        metrics=RequestMetrics(arrival_time=0.0),
        **fields,
    )


def test_read_chat_fields_become_parameters_and_the_rest_the_checkpoints():
    request = read_chat(
        {
            "model": "m",
            "messages": MESSAGES,
            "max_completion_tokens": 9,
            "top_p": 0.5,
            "n": 2,
            "stop": ["x"],
            "logit_bias": {"17": 3},
            "logprobs": True,
            "top_logprobs": 4,
            "min_p": 0.1,
            "user": "me",
            "stream": False,
            "tools": [{"type": "function"}],
            "chat_template_kwargs": {"enable_thinking": False},
            "seed": None,
        },
        DEFAULTS,
    )
    assert request.params == SamplingParams(
        temperature=0.6, top_k=7, max_tokens=9, top_p=0.5, n=2, stop=["x"], logit_bias={17: 3.0}, logprobs=4, min_p=0.1
    )
    assert request.messages == MESSAGES and request.model == "m"
    assert request.template == {"tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}}


def test_read_chat_without_a_limit_goes_on_to_the_end_and_read_text_stops_after_16_tokens():
    assert read_chat({"messages": MESSAGES}, DEFAULTS).params.max_tokens is None
    assert read_text({"prompt": "p"}, DEFAULTS).params.max_tokens == 16


@pytest.mark.parametrize(
    ("form", "structured"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json": {}}),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, {"json": {"type": "object"}}),
    ],
)
def test_response_format_becomes_structured_output(form, structured):
    assert read_chat({"messages": MESSAGES, "response_format": form}, DEFAULTS).params == SamplingParams(
        temperature=0.6, top_k=7, max_tokens=None, structured=structured
    )


@pytest.mark.parametrize("prompt", ["p", [1, 2], ["p"], [[1, 2]]])
def test_read_text_takes_one_prompt_in_any_form(prompt):
    assert read_text({"prompt": prompt}, DEFAULTS).prompt in ("p", [1, 2])


@pytest.mark.parametrize(
    ("read", "body", "message"),
    [
        (read_chat, {}, "must have messages"),
        (read_text, {}, "must have a prompt"),
        (read_text, {"prompt": "p", "tempratur": 1}, "unknown argument 'tempratur'; did you mean 'temperature'"),
        (read_text, {"prompt": "p", "temperature": -1}, "temperature must be >= 0, got -1"),
        (read_text, {"prompt": "p", "stream": True}, "stream must be False, got True"),
        (read_text, {"prompt": "p", "best_of": 3}, "best_of must be 1, got 3"),
        (read_text, {"prompt": ["p", "q"]}, "got 2 prompts"),
        (read_text, {"prompt": "p", "echo": 1}, "echo must be true or false"),
        (read_text, {"prompt": "p", "messages": MESSAGES}, "unknown argument 'messages'"),
        (read_chat, {"messages": MESSAGES, "logprobs": 3}, "logprobs must be true or false, got 3"),
        (read_chat, {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        (read_chat, {"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format must have the type"),
        (read_chat, {"messages": MESSAGES, "logit_bias": {"x": 1}}, "logit_bias key must be an int"),
    ],
)
def test_wrong_bodies_are_refused(read, body, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read(body, DEFAULTS)


def test_chat_answer_has_messages_logprobs_and_usage():
    request = read_chat({"model": "m", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}, DEFAULTS)
    body = request.answer(make_output(), name="x", created=7)
    assert {name: body[name] for name in ("id", "object", "created", "model")} == {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
    }
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "bé"} and choice["finish_reason"] == "stop"
    first, second = choice["logprobs"]["content"]
    assert first["token"] == "b" and first["bytes"] == [98] and first["logprob"] == -0.5
    assert [entry["token"] for entry in first["top_logprobs"]] == ["é", "b"]
    assert second["bytes"] == [0xC3, 0xA9] and second["top_logprobs"] == []


def test_text_answer_echoes_and_counts_offsets_from_the_texts_start():
    request = read_text({"prompt": "p", "echo": True, "logprobs": 2}, DEFAULTS)
    (choice,) = request.answer(make_output(), name="x", created=7)["choices"]
    assert choice["text"] == "pbé"
    assert choice["logprobs"] == {
        "tokens": ["b", "é"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"é": -0.25, "b": -0.5, "c": -3.0}, {"é": -1.0}],
        "text_offset": [1, 2],
    }


def test_error_body_tells_wrong_requests_from_failures():
    assert error_body(ValueError("bad"))["error"]["type"] == "invalid_request_error"
    assert error_body(RuntimeError("bad"))["error"] == {
        "message": "bad",
        "type": "server_error",
        "param": None,
        "code": None,
    }
