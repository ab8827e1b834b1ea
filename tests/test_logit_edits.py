"""Masks, bias and penalties against numpy on a model's own logits, in any company and on any mesh."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import VOCAB_SIZE, on_mesh
from test_sampling import numbers_of, sample
from wrapper_tools import make_wrapper, prefill_step

from jaxinfer import SamplingParams
from jaxinfer.wrappers.step_batch import SamplerVariant

pytestmark = pytest.mark.usefixtures("few_programs")

MODEL = "llama"
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9] * 7, [4] * 12, [9, 1], [200, 5, 17], [33] * 3]
GREEDY, RANDOM = {"temperature": 0.0}, {"temperature": 1.3, "seed": 11}
STOP = {"stop_token_ids": list(range(0, VOCAB_SIZE, 3)), "ignore_eos": True}
WISHES = [
    {"repetition_penalty": 1.8} | GREEDY,
    {"allowed_token_ids": [3, 7, 30, 31, 32, 250], "logit_bias": {7: 2.0, 9: 100.0}} | RANDOM,
    {"presence_penalty": 1.5, "frequency_penalty": 0.75} | GREEDY,
    {"logit_bias": dict.fromkeys(range(0, VOCAB_SIZE, 2), -100.0), "repetition_penalty": 0.5} | RANDOM,
    {"min_tokens": 9, **STOP} | GREEDY,
    {"min_tokens": 4, "frequency_penalty": -2.0, "top_k": 9, **STOP} | RANDOM,
]
PARAMS = [SamplingParams(**{"max_tokens": 14, "ignore_eos": True} | wish) for wish in WISHES]
PLAIN = SamplingParams(max_tokens=14, ignore_eos=True, temperature=1.0, seed=5)


def edit(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """DESIGN's order, spelt out: masks, bias, repetition penalty, presence and frequency penalties."""
    logits = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        logits[np.setdiff1d(np.arange(len(logits)), params.allowed_token_ids)] = -np.inf
    if len(output) < params.min_tokens:
        logits[list(params.stop_token_ids)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *output}:
        scale = 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
        logits[token] *= scale
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return logits


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Token by token from the logits of whole texts, edited by numpy."""
    wrapper = make_wrapper(load_golden(f"mesh/{MODEL}").path, max_model_len=64, max_num_batched_tokens=48)
    texts = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        output: list[int] = []
        while len(output) < params.max_tokens:
            logits = edit(wrapper.logits(prefill_step(wrapper, prompt + output))[0], params, prompt, output)
            best, second = np.sort(logits)[:-3:-1]
            assert params.temperature or best - second > 1e-4  # float32 decides as float64 does
            numbers = numbers_of(1, temperature=params.temperature, top_k=params.top_k, seed=params.seed)
            token = int(sample("full", logits[None], numbers, position=len(prompt) + len(output))[0])
            output.append(token)
            if token in (params.stop_token_ids or ()):
                break
        texts.append(output)
    wrapper.close()
    return texts


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param((1, 1), {"max_num_seqs": 1}, marks=pytest.mark.matrix),
        ((1, 1), {"num_kv_pages": 9, "enable_prefix_caching": False}),
        ((2, 2), {"run_ahead": False}),
        pytest.param((4, 2), {}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_generate_edits_equal_numpy_in_any_company(layout, fields, expected):
    with on_mesh(MODEL, layout, **fields) as llm:
        plain = llm.generate([9, 1], PLAIN)
        outputs = llm.generate([*PROMPTS, [9, 1]], [*PARAMS, PLAIN], use_tqdm=False)
        after = llm.generate([9, 1], PLAIN)  # in a slot whose edits must be gone
        assert (llm.stats().num_preemptions > 0) == ("num_kv_pages" in fields)
    assert [list(output.token_ids) for output in outputs[:-1]] == expected
    assert outputs[-1].token_ids == plain.token_ids == after.token_ids


def test_expected_tokens_show_what_was_asked(expected):
    """Only allowed tokens; no stop token before min_tokens, and one afterwards."""
    assert set(expected[1]) <= set(PARAMS[1].allowed_token_ids)
    for params, tokens in zip(PARAMS[4:], expected[4:], strict=True):
        assert not set(tokens[: params.min_tokens]) & set(params.stop_token_ids)
    assert any(tokens[-1] in STOP["stop_token_ids"] for tokens in expected[4:])


def test_generate_plain_batches_run_no_edited_program():
    everything = [
        SamplingParams(max_tokens=4, presence_penalty=1.0, ignore_eos=True),
        SamplingParams(max_tokens=4, bad_words=["a"], n=2),
        SamplingParams(max_tokens=4, structured={"regex": "[ab]+"}, logprobs=2),
        SamplingParams(max_tokens=1, prompt_logprobs=3),
    ]
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with on_mesh(MODEL, (1, 1), tokenizer="byte", enable_prefix_caching=False) as llm:
        wrapper = llm._loaded.wrapper
        plain = llm.generate(PROMPTS, greedy, use_tqdm=False)
        programs = dict(wrapper._programs._programs)
        assert {name for name, *_ in programs} == {"forward", "sample"} and not wrapper._arrays.edits
        llm.generate(PROMPTS[: len(everything)], everything, use_tqdm=False)
        llm.beam_search(PROMPTS[0])
        assert len(wrapper._programs._programs) > len(programs)
        called: list[tuple] = []
        get = wrapper._programs.get
        wrapper._programs.get = lambda *key: called.append(key) or get(*key)
        again = llm.generate(PROMPTS, greedy, use_tqdm=False)
    assert set(called) <= set(programs)
    assert [output.token_ids for output in again] == [output.token_ids for output in plain]


def test_greedy_program_computes_nothing_but_the_best_token():
    """Its text has the inputs of a plain step and neither noise nor a softmax, unlike that of the full sampler."""
    wrapper = make_wrapper(load_golden(f"mesh/{MODEL}").path, max_model_len=64)
    head, state, rows = 1, 4, 5
    inputs = head + state + 1 + rows  # and the hidden states

    def entry(variant: SamplerVariant) -> str:
        return wrapper.compiled("sample", 4, variant, None).as_text()

    greedy, full = entry(SamplerVariant.GREEDY), entry(SamplerVariant.FULL)
    for text in (greedy, full):
        assert len(set(re.findall(r"parameter\((\d+)\)", text[text.index("ENTRY") :]))) <= inputs
    for operation in ("exponential", "log-plus-one", "shift-right-logical"):
        assert f" {operation}(" not in greedy
    assert " shift-right-logical(" in full
    wrapper.close()


def test_generate_logprobs_are_of_the_raw_logits():
    plain, biased = (
        SamplingParams(temperature=0, max_tokens=1, logprobs=5, logit_bias=bias) for bias in (None, {250: 100.0})
    )
    with on_mesh(MODEL, (1, 1)) as llm:
        one, other = llm.generate([[1, 2, 3]] * 2, [plain, biased], use_tqdm=False)
    assert other.token_ids == (250,)
    (first,), (second,) = one.logprobs, other.logprobs
    assert {token: second[token].logprob for token in first} == {token: first[token].logprob for token in first}
    assert second[250].logprob < min(entry.logprob for entry in first.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, r"logit_bias has token 301, expected ids in 0..300"),
        ({"allowed_token_ids": [5, 999]}, r"allowed_token_ids has token 999, expected ids in 0..300"),
        (
            {"allowed_token_ids": [3, 6], "stop_token_ids": [3, 6], "min_tokens": 2},
            r"min_tokens 2 holds back all of allowed_token_ids",
        ),
    ],
)
def test_generate_impossible_edits_are_refused_and_the_engine_goes_on(fields, message):
    with on_mesh(MODEL, (1, 1)) as llm:
        with pytest.raises(ValueError, match=message):
            llm.generate([1, 2], SamplingParams(**fields))
        assert llm.generate([1, 2], SamplingParams(max_tokens=1)).finished
