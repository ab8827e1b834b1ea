"""Every call refuses what it cannot do before anything is queued, in words that name parameter, value and range; the
same LLM then goes on as if nothing had been asked.

Wrong values of single fields are test_sampling_params.py's and config/test_engine_config.py's; here a wish needs the
model, the tokenizer or the engine to be found wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import pytest
from conftest import load_golden
from mesh_tools import BASE, on_mesh

from jaxinfer import LLM, AsyncLLM, BeamSearchParams, SamplingParams

pytestmark = pytest.mark.usefixtures("few_programs")

MESSAGES = [{"role": "user", "content": "hi"}]
MODEL = "llama"
PROMPT = load_golden(f"mesh/{MODEL}").prompts[0]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with on_mesh(MODEL, (1, 1), tokenizer="byte", num_kv_pages=6) as llm:
        yield llm


@pytest.fixture(scope="module")
def bare() -> Iterator[LLM]:
    """Without a tokenizer."""
    with on_mesh(MODEL, (1, 1), num_kv_pages=6) as llm:
        yield llm


def assert_refused(llm: LLM, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """At the call; nothing was queued or counted, and the next request is served as ever."""
    before = llm.stats()
    with pytest.raises(error, match=message):
        call()
    assert llm.stats() == before
    output = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    assert list(output.token_ids) == load_golden(f"mesh/{MODEL}").greedy[0][:2]


async def as_task(llm: LLM, *arguments: Any) -> None:
    """AsyncLLM.generate's call alone, of the same engine."""
    door = AsyncLLM.__new__(AsyncLLM)
    door._llm = llm
    door.generate(*arguments)


SAMPLERS: dict[str, Callable[..., Any]] = {
    "generate": lambda llm, *arguments: llm.generate(*arguments),
    "stream": lambda llm, *arguments: llm.stream(*arguments),
    "async": lambda llm, *arguments: asyncio.run(as_task(llm, *arguments)),
}
DOORS = SAMPLERS | {
    "score": lambda llm, prompt: llm.score(prompt),
    "beam_search": lambda llm, prompt: llm.beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=2)),
    "perplexity": lambda llm, prompt: llm.perplexity(prompt),
}
SAMPLING = [  # what SamplingParams ask of the model: fields, message
    ({"logit_bias": {301: 1.0}}, r"logit_bias has token 301, expected ids in 0\.\.300"),
    ({"allowed_token_ids": [5, 999]}, r"allowed_token_ids has token 999, expected ids in 0\.\.300"),
    ({"stop_token_ids": [7, 999]}, r"stop_token_ids has token 999, expected ids in 0\.\."),
    ({"allowed_token_ids": [7, 257], "stop_token_ids": [7], "min_tokens": 2}, "min_tokens 2 holds back all of allowed"),
    ({"stop_token_ids": [*range(301)], "min_tokens": 2}, "min_tokens 2 holds back all of the vocabulary"),
    ({"structured": {"regex": "("}}, "structured.regex must be a grammar"),
    ({"structured": {"choice": ["a"]}, "bad_words": ["a"]}, "structured, bad_words and .* leave no token"),
    ({"max_tokens": 44}, "request needs 7 KV pages for 49 tokens, the pool has 6; lower max_tokens, shorten the prom"),
    ({"max_tokens": None}, "request needs 8 KV pages for 64 tokens, the pool has 6"),
    ({"n": 3, "max_tokens": 60}, "request needs 8 KV pages for 64 tokens, the pool has 6"),
]
PROMPTS = [  # wrong prompts: prompt, error, message
    ("", ValueError, "the prompt is empty: at least one token"),
    ([0, 301], ValueError, r"prompt token 1 is 301, expected an id in 0\.\.300"),
    ([-1], ValueError, r"prompt token 0 is -1, expected an id in 0\.\.300"),
    ([1, 2.5], TypeError, "prompt token ids must be integers, got 2.5 of type float"),
    ([1, True], TypeError, "prompt token ids must be integers, got True of type bool"),
    (7, TypeError, "string.* token ids.*, got int"),
    ({"prompt": "a"}, TypeError, "string.* token ids.*, got dict"),
    ({1, 2}, TypeError, "string.* token ids.*, got set"),
    ("a\ud800", ValueError, "the prompt must be text that UTF-8 can write, got a lone surrogate at 1"),
]
BEAMS = [
    ({"beam_width": 5}, r"beam_width must be <= max_num_seqs, .* got 5 > 4; lower it or raise max_num_seqs"),
    ({"beam_width": 3, "max_tokens": 12}, "request needs 9 KV pages for 3 x 17 tokens, the pool has 6"),
]
NEED_A_TOKENIZER = [
    ({"stop": "x"}, "stop strings need a tokenizer, this LLM has none; pass tokenizer=... or stop_token_ids"),
    ({"bad_words": ["x"]}, "bad_words needs a tokenizer, this LLM has none; pass tokenizer="),
    ({"structured": {"regex": "x"}}, "structured needs a tokenizer, this LLM has none; pass tokenizer="),
]
TOO_LONG = (
    r"prompt has 64 tokens, the limit is 63 \(max_model_len 64 .*set truncate_prompt_tokens or raise max_model_len"
)
CALLS: list[tuple[Callable[[LLM], Any], type[Exception], str]] = [
    (lambda llm: llm.generate(PROMPT, {"n": 2}), TypeError, "sampling_params must be SamplingParams, .*got dict"),
    (lambda llm: llm.generate(PROMPT, [None]), TypeError, "sampling_params must be SamplingParams, got NoneType"),
    (lambda llm: llm.generate(PROMPT, BeamSearchParams()), TypeError, "must be SamplingParams, .*got BeamSearchParams"),
    (lambda llm: llm.generate([[1]] * 3, [SamplingParams()] * 2), ValueError, "got 2 sampling_params for 3 prompts"),
    (lambda llm: llm.generate([b"ab"]), TypeError, "a prompt must be a string or a sequence of token ids, got bytes"),
    (lambda llm: llm.generate(jnp.array(3)), TypeError, "expected a string, token ids, or a list of either, got int"),
    (
        lambda llm: llm.chat(MESSAGES, chat_template="rag"),
        ValueError,
        "chat_template must be .*no templates; got 'rag'",
    ),
    (lambda llm: llm.stream([[1], [2]]), TypeError, "stream takes one prompt"),
    (lambda llm: llm.stream(PROMPT, [SamplingParams()]), TypeError, "sampling_params must be SamplingParams, got list"),
    (lambda llm: llm.beam_search(PROMPT, SamplingParams()), TypeError, "params must be BeamSearchParams, .*got Samp"),
    (lambda llm: llm.beam_search([[1]], [BeamSearchParams()] * 2), ValueError, "got 2 params for 1 prompts"),
    (lambda llm: llm.score(PROMPT, prompt_logprobs=21), ValueError, r"prompt_logprobs must be in 0\.\.20, got 21"),
    (lambda llm: llm.score(PROMPT, prompt_logprobs=True), TypeError, r"prompt_logprobs must be an int in 0\.\.20"),
    *(
        (lambda llm, door=door: DOORS[door](llm, [1] * 64), ValueError, TOO_LONG)
        for door in DOORS
        if door != "perplexity"
    ),
    (lambda llm: llm.perplexity([1]), ValueError, "a text of at least 2 tokens has a perplexity, got 1"),
    (lambda llm: llm.perplexity(PROMPT, window=64), ValueError, r"window must be in 2\.\.63, got 64"),
    (lambda llm: llm.perplexity(PROMPT, window=1), ValueError, r"window must be in 2\.\.63, got 1"),
    (lambda llm: llm.perplexity(PROMPT, window=2.5), TypeError, r"window must be an int in 2\.\.63, got 2.5"),
    (lambda llm: llm.perplexity(PROMPT, window=8, stride=8), ValueError, r"stride must be in 1\.\.7, got 8"),
    (lambda llm: llm.perplexity(PROMPT, stride=0), ValueError, r"stride must be in 1\.\.46, got 0"),
    (lambda llm: llm.chat(MESSAGES), ValueError, "no chat template in .*llama.*pass chat_template="),
    (lambda llm: llm.stream_chat(MESSAGES), ValueError, "no chat template in .*llama.*pass chat_template="),
    (lambda llm: llm.chat(MESSAGES, {"n": 2}), TypeError, "sampling_params must be SamplingParams, .*got dict"),
]


def rows(table: list[tuple]) -> dict[str, Any]:
    return {"argvalues": table, "ids": [f"{number}-{entry[0]!s:.16}" for number, entry in enumerate(table)]}


@pytest.mark.parametrize("door", SAMPLERS)
@pytest.mark.parametrize(("fields", "message"), **rows(SAMPLING))
def test_sampling_params_the_model_cannot_serve_are_refused(llm, door, fields, message):
    assert_refused(llm, lambda: SAMPLERS[door](llm, PROMPT, SamplingParams(**fields)), ValueError, message)


@pytest.mark.parametrize("door", SAMPLERS)
@pytest.mark.parametrize(("fields", "message"), **rows(NEED_A_TOKENIZER))
def test_sampling_params_of_text_without_a_tokenizer_are_refused(bare, door, fields, message):
    assert_refused(bare, lambda: SAMPLERS[door](bare, PROMPT, SamplingParams(**fields)), ValueError, message)


@pytest.mark.parametrize("door", DOORS)
def test_prompt_of_text_without_a_tokenizer_is_refused(bare, door):
    assert_refused(bare, lambda: DOORS[door](bare, "text"), ValueError, "a text prompt needs a tokenizer, this LLM has")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("prompt", "error", "message"), **rows(PROMPTS))
def test_prompt_the_model_cannot_take_is_refused(llm, door, prompt, error, message):
    assert_refused(llm, lambda: DOORS[door](llm, prompt), error, message)


@pytest.mark.parametrize("door", DOORS)
def test_list_with_one_wrong_prompt_is_refused_as_a_whole(llm, door):
    if door in ("generate", "score", "beam_search"):
        for wrong, message in (([301], "prompt token 0 is 301"), ([], "the prompt is empty")):
            assert_refused(llm, lambda wrong=wrong: DOORS[door](llm, [PROMPT, [1], wrong]), ValueError, message)
    else:
        assert_refused(llm, lambda: DOORS[door](llm, [PROMPT, [1]]), TypeError, "one prompt|integers, got")


@pytest.mark.parametrize(("fields", "message"), **rows(BEAMS))
def test_beam_search_params_the_engine_cannot_serve_are_refused(llm, fields, message):
    assert_refused(llm, lambda: llm.beam_search(PROMPT, BeamSearchParams(**fields)), ValueError, message)


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[message[:40] for *_, message in CALLS])
def test_call_with_wrong_arguments_is_refused(llm, call, error, message):
    assert_refused(llm, lambda: call(llm), error, message)


ENGINE = [
    ({"max_model_len": 257}, "max_model_len must be <= 256, the model's context, got 257"),
    ({"pipeline_parallel_size": 6}, "pipeline_parallel_size must be <= 5, the model's layers, got 6"),
    ({"tensor_parallel_size": 3}, "tensor_parallel_size must divide the model's 8 query heads, got 3"),
    ({"tensor_parallel_size": 16}, r"1 pipeline x 16 tensor needs 16 devices, found 8 .*lower"),
    (
        {"enable_chunked_prefill": False},
        "max_num_batched_tokens must be >= max_model_len, got 16 < 64; raise it or s",
    ),
]


@pytest.mark.parametrize(("fields", "message"), **rows(ENGINE))
def test_engine_config_the_model_cannot_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LLM(load_golden(f"mesh/{MODEL}").path, **BASE | fields)
