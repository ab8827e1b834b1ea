"""Bodies of OpenAI's API mean what its reference says, and what is not supported is refused."""

import dataclasses

import pytest
from handmade_outputs import make_output

from jaxinfer import SamplingParams
from jaxinfer.outputs import CompletionDelta, RequestDelta
from jaxinfer.request import RequestTooLongError
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.interfaces.chat import ChatExchange, ChatRequest
from jaxinfer.serve.interfaces.errors import RefusedError, anthropic_error, error_body, error_facts
from jaxinfer.serve.interfaces.exchange import DONE, Label
from jaxinfer.serve.interfaces.logprobs import TokenNames
from jaxinfer.serve.interfaces.response_items import ResponseExchange
from jaxinfer.serve.interfaces.text import TextExchange, TextRequest
from jaxinfer.serve.interfaces.turn import PreparedTurn
from jaxinfer.serve.replies.formats import FORMATS
from jaxinfer.serve.replies.parser import ReplyParser
from jaxinfer.serve.replies.thoughts import ThoughtCount, ThoughtMarkers
from jaxinfer.serve.served_model import ServedModel

DEFAULTS = SamplingParams(temperature=0.6, top_k=7)
MESSAGES = [{"role": "user", "content": "hello"}]


LABEL = Label(name="x", created=7)


class Letters:
    """A tokenizer of letters: 1 is "a", 2 is "b" and so on, and 4 half of a character."""

    vocab_size = 10
    special_token_ids = frozenset()

    def token_bytes(self):
        return tuple(b"\xc3" if i == 4 else bytes([96 + i]) for i in range(10))

    def token_text(self, token_id):
        return f"<{token_id}>"

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(self.token_bytes()[i].decode(errors="replace") for i in token_ids)


class FakeLLM:
    tokenizer = Letters()


SERVED = ServedModel(
    llm=FakeLLM(),
    config=ServeConfig(),
    names=("m",),
    reply_format=FORMATS["plain"],
    has_template=True,
    hides_markers=False,
    token_names=TokenNames(Letters()),
)


def read_chat(body, defaults=DEFAULTS):
    return ChatRequest.read(body, defaults)


def read_text(body, defaults=DEFAULTS):
    return TextRequest.read(body, defaults)


def chat_exchange(body, **prepared):
    prepared = PreparedTurn(submission=None, new_parser=lambda: None, **prepared)
    return ChatExchange(request=read_chat(body), prepared=prepared, names=SERVED.token_names, label=LABEL, model="m")


def text_exchange(body):
    request = read_text(body)
    submissions = (None,) * len(request.prompts)
    return TextExchange(request=request, submissions=submissions, served=SERVED, label=LABEL, model="m")


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


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
            "tools": [TOOL],
            "chat_template_kwargs": {"enable_thinking": True},
            "reasoning_effort": "none",
            "seed": None,
            "store": True,
        }
    )
    assert request.turn.params == SamplingParams(
        temperature=0.6, top_k=7, max_tokens=9, top_p=0.5, n=2, stop=["x"], logit_bias={17: 3.0}, logprobs=4, min_p=0.1
    )
    assert request.turn.messages == MESSAGES and list(request.turn.tool_use.schemas) == ["now"]
    # what the request says itself wins over what follows from the effort
    assert request.turn.template == {"chat_template_kwargs": {"reasoning_effort": "none", "enable_thinking": True}}


def test_read_chat_without_a_limit_goes_on_to_the_end_and_read_text_stops_after_16_tokens():
    assert read_chat({"messages": MESSAGES}).turn.params.max_tokens is None
    assert read_text({"prompt": "p"}).params.max_tokens == 16


@pytest.mark.parametrize(
    ("form", "structured"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json": {}}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}}, {"json": {"a": 1}}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"grammar": "start: A", "json_object": False}}, {"lark": "start: A"}),
        ({"structured_outputs": {"json_object": True}}, {"json": {}}),
    ],
)
def test_forms_become_structured_output(form, structured):
    expected = SamplingParams(temperature=0.6, top_k=7, max_tokens=None, structured=structured)
    assert read_chat({"messages": MESSAGES} | form).turn.params == expected


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("p", ["p"]), ([1, 2], [[1, 2]]), (["p", "q"], ["p", "q"]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_read_text_takes_prompts_in_any_form(prompt, prompts):
    assert read_text({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("read", "body", "message"),
    [
        (read_chat, {}, "messages must be given"),
        (read_text, {}, "prompt must be a text"),
        (read_text, {"prompt": []}, "prompt must be a text"),
        (read_text, {"prompt": ["a", [1]]}, "prompt must have entries of one kind"),
        (read_text, {"prompt": "p", "tempratur": 1}, "unknown argument 'tempratur'; did you mean 'temperature'"),
        (read_text, {"prompt": "p", "temperature": -1}, "temperature must be >= 0, got -1"),
        (read_text, {"prompt": "p", "best_of": 3}, "best_of must be n, which is 1, got 3"),
        (read_text, {"prompt": "p", "suffix": "s"}, "suffix must be '', got 's'"),
        (read_text, {"prompt": "p", "echo": 1}, "echo must be true or false"),
        (read_text, {"prompt": "p", "messages": MESSAGES}, "unknown argument 'messages'"),
        (read_text, {"prompt": "p", "stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
        (read_text, {"prompt": "p", "guided_regex": "a"}, "unknown argument 'guided_regex'; use structured_outputs"),
        (read_text, {"prompt": "p", "capture": ["x"]}, "unknown argument 'capture'"),
        (read_chat, {"messages": MESSAGES, "logprobs": 3}, "logprobs must be true or false, got 3"),
        (read_chat, {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        (read_chat, {"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format must have the type"),
        (read_chat, {"messages": MESSAGES, "logit_bias": {"x": 1}}, "logit_bias key must be an int"),
        (read_chat, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools: entry 0 must be"),
        (read_chat, {"messages": MESSAGES, "tools": [TOOL, TOOL]}, "tools must have different names"),
        (read_chat, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice demands a call"),
        (read_chat, {"messages": MESSAGES, "tool_choice": "any"}, "tool_choice must be"),
        (
            read_chat,
            {"messages": MESSAGES, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice names 'x', which is none of the tools",
        ),
        (read_chat, {"messages": MESSAGES, "functions": []}, "unknown argument 'functions'; use tools"),
        (read_chat, {"messages": MESSAGES, "modalities": ["audio"]}, "modalities must be"),
    ],
)
def test_wrong_bodies_are_refused(read, body, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read(body)


def test_chat_answer_has_messages_logprobs_and_usage():
    exchange = chat_exchange({"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "return_token_ids": True})
    body = exchange.answer([make_output()])
    assert {name: body[name] for name in ("id", "object", "created", "model")} == {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
    }
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "bé", "refusal": None, "annotations": []}
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == (5, 4) and choice["prompt_token_ids"] == (1, 2, 3)
    first, second = choice["logprobs"]["content"]
    assert first["token"] == "e" and first["bytes"] == [101] and first["logprob"] == -0.5
    assert [entry["token"] for entry in first["top_logprobs"]] == ["\N{REPLACEMENT CHARACTER}", "e"]
    assert second["bytes"] == [0xC3] and second["top_logprobs"] == []


def test_text_answer_echoes_and_counts_offsets_from_the_texts_start():
    exchange = text_exchange({"prompt": "p", "echo": True, "logprobs": 2})
    assert exchange.request.params.prompt_logprobs == 2
    (choice,) = exchange.answer([make_output()])["choices"]
    assert choice["text"] == "pbé"
    assert choice["logprobs"] == {
        "tokens": ["e", "\N{REPLACEMENT CHARACTER}"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"\N{REPLACEMENT CHARACTER}": -0.25, "e": -0.5}, {"\N{REPLACEMENT CHARACTER}": -1.0}],
        "text_offset": [1, 2],
    }


def test_text_answer_with_logprobs_of_the_prompt_has_them_in_front():
    found = make_output().outputs[0].logprobs
    output = make_output(prompt_token_ids=(1, 5), prompt_logprobs=(None, found[0]))
    (choice,) = text_exchange({"prompt": "p", "echo": True, "logprobs": 1}).answer([output])["choices"]
    assert choice["logprobs"]["tokens"] == ["a", "e", "e", "\N{REPLACEMENT CHARACTER}"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -1.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_text_choices_are_counted_through_all_prompts():
    exchange = text_exchange({"prompt": ["p", "q"], "n": 2})
    completion = make_output().outputs[0]
    two = make_output(outputs=(completion, dataclasses.replace(completion, index=1)))
    assert [choice["index"] for choice in exchange.answer([two, two])["choices"]] == [0, 1, 2, 3]


def grown(text, start, end, reason=None):
    """What is new with the tokens from start to end."""
    whole = make_output()
    one = whole.outputs[0]
    new = CompletionDelta(0, text, one.token_ids[start:end], one.logprobs[start:end], reason, None)
    return RequestDelta(whole.prompt, whole.prompt_token_ids, None, 1, [new], reason is not None)


def test_chat_stream_has_a_role_deltas_a_reason_and_a_count():
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    stream = chat_exchange(body).stream()
    events = [
        *stream.opening(),
        *stream.progress(0, grown("b", 0, 1)),
        *stream.progress(0, grown("é", 1, 2, "length")),
        *stream.closing(),
    ]
    *chunks, counted, done = [event.data for event in events]
    assert done is DONE and counted["choices"] == [] and counted["usage"]["completion_tokens"] == 2
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "b"},
        {"content": "é"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert told[0] is None and told[3] is None
    assert [[entry["token"] for entry in one["content"]] for one in told[1:3]] == [
        ["e"],
        ["\N{REPLACEMENT CHARACTER}"],
    ]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def new_thoughts():
    """A count for replies that begin with thoughts, which token 4 ends."""
    return ThoughtCount(ThoughtMarkers(openers=frozenset({7}), closers=frozenset({4})), is_open=True)


def test_usage_has_the_tokens_of_thoughts_where_they_can_be_counted():
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    exchange = chat_exchange(body, new_thoughts=new_thoughts)
    completion = make_output().outputs[0]
    output = make_output(outputs=(completion, dataclasses.replace(completion, index=1)))
    details = {"reasoning_tokens": 2}  # one of each sample
    assert exchange.answer([output])["usage"]["completion_tokens_details"] == details
    stream = exchange.stream()
    for end in (1, 2):
        delta = grown("x", end - 1, end)
        assert [
            *stream.progress(
                0, delta._replace(outputs=[one._replace(index=i) for one in delta.outputs for i in (0, 1)])
            )
        ]
    counted, _ = stream.closing()
    assert counted.data["usage"]["completion_tokens_details"] == details
    assert "completion_tokens_details" not in chat_exchange(body).answer([output])["usage"]


def test_text_stream_has_each_token_once_and_offsets_that_go_on():
    body = {"prompt": "p", "stream": True, "echo": True, "logprobs": 0, "return_token_ids": True}
    stream = text_exchange(body).stream()
    events = [
        *stream.opening(),
        *stream.progress(0, grown("b", 0, 1)),
        *stream.progress(0, grown("é", 1, 2, "stop")),
        *stream.closing(),
    ]
    first, second = [event.data["choices"][0] for event in events[:-1]]
    assert (first["text"], second["text"]) == ("pb", "é")
    assert (first["logprobs"]["text_offset"], second["logprobs"]["text_offset"]) == ([1], [2])
    assert first["prompt_token_ids"] == (1, 2, 3) and "prompt_token_ids" not in second
    assert (first["token_ids"], second["token_ids"]) == ((5,), (4,))
    assert (first["finish_reason"], second["finish_reason"]) == (None, "stop")


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (ValueError("top_p must be in (0, 1], got 2"), 400, None, "top_p"),
        (TypeError("unknown argument 'foo'; did you mean 'for'?"), 400, None, "foo"),
        (ValueError("the prompt is empty"), 400, None, None),
        (ValueError("logit_bias key must be an int"), 400, None, "logit_bias"),
        (RequestTooLongError("prompt has 9 tokens"), 400, "context_length_exceeded", None),
        (RefusedError("no", status=404, code="model_not_found", param="model"), 404, "model_not_found", "model"),
        (RuntimeError("secrets"), 500, "internal_error", None),
    ],
)
def test_errors_name_status_code_and_field(error, status, code, param):
    facts = error_facts(error)
    assert (facts.status, facts.code, facts.param) == (status, code, param)
    body = error_body(error)["error"]
    assert body["type"] == ("server_error" if status == 500 else "invalid_request_error")
    assert "secrets" not in body["message"]
    assert facts.message in body["message"] and facts.message in anthropic_error(facts)["error"]["message"]


def test_error_of_a_long_prompt_has_the_words_that_clients_look_for():
    facts = error_facts(RequestTooLongError("prompt has 9 tokens"))
    assert "maximum context length is" in error_body(RequestTooLongError("x"))["error"]["message"]
    assert "prompt is too long" in anthropic_error(facts)["error"]["message"]


def response_stream():
    exchange = ResponseExchange(
        prepared=PreparedTurn(submission=None, new_parser=lambda: ReplyParser(FORMATS["hermes"], tools={"now": {}})),
        names=SERVED.token_names,
        label=LABEL,
        settings={},
        wants_stream=True,
        num_top=0,
    )
    return exchange.stream()


def test_failed_stream_of_a_response_ends_with_an_error_and_a_failed_response():
    stream = response_stream()
    assert len([*stream.opening()]) == 2
    error, failed = stream.failure(error_facts(RuntimeError("secrets")))
    assert error.name == error.data["type"] == "error" and error.data["code"] == "internal_error"
    assert error.data["sequence_number"] == 2
    assert failed.name == "response.failed" and failed.data["response"]["status"] == "failed"


def test_items_of_a_growing_response_are_complete_once_the_next_begins():
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    stream = response_stream()
    events = [
        *stream.progress(0, grown("<think>Hm.</think>See:", 0, 1)),
        *stream.progress(0, grown(call, 1, 2)),
        *stream.progress(0, grown("", 2, 2, "stop")),
        *stream.closing(),
    ]
    done = [event.data["item"] for event in events if event.name == "response.output_item.done"]
    assert [(item["type"], item["status"]) for item in done] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
    ]
    assert events[-1].name == "response.completed"


def test_last_item_of_a_response_alone_is_cut_off_and_a_message_has_its_own_logprobs():
    stream = response_stream()
    events = [
        *stream.progress(0, grown("<think>Hm.</think>", 0, 1)),
        *stream.progress(0, grown("See:", 1, 2, "length")),
        *stream.closing(),
    ]
    thoughts, message = [event.data["item"] for event in events if event.name == "response.output_item.done"]
    assert (thoughts["status"], message["status"]) == ("completed", "incomplete")
    told = [entry for event in events if event.name == "response.output_text.delta" for entry in event.data["logprobs"]]
    assert len(told) == 1 and message["content"][0]["logprobs"] == told
    assert events[-1].data["response"]["output"] == [thoughts, message]


def test_long_messages_of_errors_are_cut():
    assert len(error_facts(ValueError("x" * 10_000)).message) < 1100
