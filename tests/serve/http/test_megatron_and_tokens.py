"""Megatron's interfaces, and texts to token ids and back."""

from __future__ import annotations

import httpx
import pytest
from served_demo import TEMPLATE

from jaxinfer import SamplingParams


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served[1].url, timeout=60) as http:
        yield http


def put(http, **fields):
    return http.put("/api", json={"prompts": ["In the beginning"], "tokens_to_generate": 6} | fields)


def test_api_answers_what_megatrons_client_reads(http, served):
    llm, _ = served
    expected = llm.generate("In the beginning", SamplingParams(temperature=0, max_tokens=6)).text
    body = put(http, top_k=1).json()
    assert body["text"] == ["In the beginning" + expected]
    assert len(body["tokens"][0]) == len(body["segments"][0]) and "logprobs" not in body


def test_api_logprobs_cover_all_tokens_but_the_first(http, served):
    body = put(http, logprobs=True, tokens_to_generate=2, top_k=1).json()
    token_ids = body["tokens"][0]
    found = served[0].score(token_ids).prompt_logprobs
    expected = [entry[token_id].logprob for token_id, entry in zip(token_ids[1:], found[1:], strict=True)]
    assert body["logprobs"][0] == pytest.approx(expected, abs=1e-4)


def test_api_fields_that_megatron_ignores_have_their_effect(http, served):
    tokenizer = served[0].tokenizer
    first, second = (put(http, random_seed=7, temperature=1.5).json()["text"] for _ in range(2))
    assert first == second != put(http, random_seed=8, temperature=1.5).json()["text"]
    comma = tokenizer.encode_plain("a, b")[1]
    stopped = put(http, stop_token=comma, tokens_to_generate=60, top_k=1).json()
    assert stopped["tokens"][0].count(comma) <= 1
    beams = put(http, beam_width=3).json()
    assert len(beams["text"]) == 3 and beams["scores"] == sorted(beams["scores"], reverse=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": []}, "prompts must be a list of at least one text"),
        ({"prompts": "x"}, "prompts must be a list"),
        ({"tokens_to_generate": -1}, "tokens_to_generate must be in 0.."),
        ({"max_len": 3}, "max_len is not supported"),
        ({"sentences": ["x"]}, "sentences is not supported"),
        ({"top_p_decay": 0.5}, "top_p_decay is not supported"),
        ({"temperatur": 1}, "did you mean 'temperature'"),
        ({"prompts": ["x"] * 257}, "prompt must be at most 256"),
    ],
)
def test_api_errors_are_where_megatrons_client_looks(http, fields, message):
    answer = put(http, **fields)
    assert answer.status_code == 400 and message in answer.json()["message"]


def test_megatrons_completions_need_no_model_and_bring_ids(http):
    body = {"prompt": "In the beginning", "max_tokens": 3, "logprobs": 1, "add_BOS": False, "temperature": 0}
    body |= {"seed": -1, "top_p": 0, "streaming_interval": 4}
    (choice,) = http.post("/completions", json=body).json()["choices"]
    assert len(choice["generation_token_ids"]) == len(choice["generation_log_probs"]) == 3
    assert choice["prompt_token_ids"] and choice["generation_log_probs"] == choice["logprobs"]["token_logprobs"]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "skip_prompt_log_probs": True}
    (choice,) = http.post("/chat/completions", json=chat).json()["choices"]
    assert len(choice["generation_token_ids"]) == 2


def test_tokenize_and_detokenize_are_inverse(http, served):
    llm, _ = served
    body = http.post("/tokenize", json={"prompt": "In the beginning", "return_token_strs": True}).json()
    assert body["tokens"] == list(llm.score("In the beginning").prompt_token_ids)
    assert body["count"] == len(body["token_strs"]) and body["max_model_len"] == 512
    plain = http.post("/tokenize", json={"prompt": "In the beginning", "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": plain}).json() == {"prompt": "In the beginning"}


def test_tokenizer_info_tells_special_tokens_that_tokenize_knows(http):
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
    assert info["chat_template"] == TEMPLATE
    asked = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert http.post("/tokenize", json=asked).json()["count"] == 1


def test_tokenize_of_a_conversation_is_the_prompt_of_a_chat(http):
    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    counted = http.post("/tokenize", json=messages).json()["count"]
    answer = http.post("/v1/chat/completions", json=messages | {"model": "demo", "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == counted


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "prompt or messages must be given"),
        ("/tokenize", {"prompt": 3}, "prompt must be a text"),
        ("/tokenize", {"promt": "x"}, "did you mean 'prompt'"),
        ("/detokenize", {"tokens": [-1]}, "tokens must be ids in 0.."),
        ("/detokenize", {"tokens": ["x"]}, "tokens must be ids in 0.."),
    ],
)
def test_wrong_tokens_are_refused(http, path, body, message):
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
