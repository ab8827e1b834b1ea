"""Drafts: the tokens of plain decoding in fewer steps, whoever proposes and whatever the engine does meanwhile.

In float32 on CPU, where tokens are equal; with drafts a token's log-probability comes from a prefill row instead of a
decode row, and differs by the order of sums.
"""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import VOCAB_SIZE, layout_name, on_mesh
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from scipy.stats import chisquare
from wrapper_tools import make_wrapper, prefill_step

from jaxinfer import LLM, EngineConfig, RequestOutput, SamplingParams

MATRIX = pytest.mark.matrix
MODEL = "gpt2"  # of the checkpoints, the one that repeats itself most
RANDOM = np.random.default_rng(0)
GREEDY, COMMON = {"temperature": 0.0}, {"logprobs": 1, "ignore_eos": True}
EDITED = [  # never drafted for, but in the batches of those that are
    ([7, 8, 9] * 7, SamplingParams(max_tokens=20, frequency_penalty=1.0, **GREEDY, **COMMON)),
    ([4] * 12, SamplingParams(max_tokens=20, structured={"regex": "[a-d]{9}"}, **GREEDY, **COMMON)),
]
DRAFTED = [
    ([7, 8, 9] * 7, SamplingParams(max_tokens=24, **GREEDY, **COMMON)),
    ([*RANDOM.integers(0, VOCAB_SIZE, 23).tolist()], SamplingParams(max_tokens=24, **GREEDY, **COMMON)),
    ([4] * 12, SamplingParams(max_tokens=30, temperature=0.3, seed=3, **COMMON)),
    ([9, 1, 30, 2] * 4, SamplingParams(max_tokens=30, temperature=0.7, seed=3, **COMMON)),
    ([5] * 17, SamplingParams(max_tokens=30, temperature=0.5, seed=5, n=2, **COMMON)),
]
ASKED = [*EDITED, *DRAFTED]
TIGHT = {"num_kv_pages": 12, "enable_prefix_caching": False}


@pytest.fixture(params=["prompt-lookup"])
def drafts(request) -> dict[str, Any]:
    """Engine settings of every kind of draft."""
    return {"draft_model": request.param, "num_draft_tokens": 3}


@pytest.fixture(scope="module")
def draft_model(tmp_path_factory) -> dict[str, Any]:
    """Engine settings with a draft model that is nearly the model."""
    path, random = tmp_path_factory.mktemp("draft"), np.random.default_rng(0)
    golden = load_golden(f"mesh/{MODEL}").path
    shutil.copy(golden / "config.json", path)
    weights = load_file(golden / "model.safetensors")
    noisy = {name: x + 0.03 * x.std() * random.standard_normal(x.shape).astype(x.dtype) for name, x in weights.items()}
    save_file(noisy, path / "model.safetensors")
    return {"draft_model": str(path), "num_draft_tokens": 3}


def generate(llm: LLM) -> list[RequestOutput]:
    prompts, params = zip(*ASKED, strict=True)
    return llm.generate(list(prompts), list(params), use_tqdm=False)


def tokens_of(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[entry.token_ids for entry in output.outputs] for output in outputs]


def sampled_logprobs(output: RequestOutput) -> list[float]:
    return [
        found[token].logprob
        for entry in output.outputs
        for token, found in zip(entry.token_ids, entry.logprobs, strict=True)
    ]


@functools.cache
def plainly() -> tuple[list[RequestOutput], list[int]]:
    """Without drafts, every prompt by itself on one device, and the steps that each took."""
    with on_mesh(MODEL, (1, 1), tokenizer="byte", enable_prefix_caching=False) as llm:
        outputs, steps = [], []
        for prompt, params in ASKED:
            before = llm.stats().num_steps
            outputs.append(llm.generate(prompt, params))
            steps.append(llm.stats().num_steps - before)
        return outputs, steps


def check_equals_plain_decoding(layout, fields):
    expected, _ = plainly()
    with on_mesh(MODEL, layout, tokenizer="byte", **fields) as llm:
        found = generate(llm)
        stats = llm.stats()
        if llm.config.enable_prefix_caching:
            assert tokens_of(generate(llm)) == tokens_of(found)
            assert llm.stats().prefix_cache_hits > stats.prefix_cache_hits
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(sampled_logprobs(one), sampled_logprobs(other), rtol=0, atol=1e-4)
    assert 0 < stats.accepted_draft_tokens < stats.draft_tokens
    assert (stats.num_preemptions > 0) == ("num_kv_pages" in fields)
    assert stats.kv_pages_used == 0


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param((1, 1), TIGHT, marks=MATRIX),
        ((2, 1), {"max_num_batched_tokens": 64}),
        pytest.param((4, 2), {"max_num_batched_tokens": 64, "enable_prefix_caching": False}, marks=MATRIX),
        pytest.param((1, 1), {"run_ahead": False}, marks=MATRIX),
        pytest.param((1, 1), {"max_num_batched_tokens": 64}, marks=MATRIX),
        pytest.param((1, 1), {"num_draft_tokens": 15}, marks=MATRIX),
        pytest.param((2, 4), TIGHT, marks=MATRIX),
    ],
    ids=str,
)
@pytest.mark.usefixtures("few_programs")
def test_generate_with_drafts_equals_plain_decoding(drafts, layout, fields):
    check_equals_plain_decoding(layout, drafts | fields)


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ((1, 1), TIGHT),
        pytest.param((2, 2), {"max_num_batched_tokens": 64}, marks=MATRIX),
        pytest.param((4, 2), TIGHT, marks=MATRIX),
        pytest.param((1, 4), {"run_ahead": False}, marks=MATRIX),
    ],
    ids=str,
)
@pytest.mark.usefixtures("few_programs")
def test_generate_with_draft_model_equals_plain_decoding(draft_model, layout, fields):
    check_equals_plain_decoding(layout, draft_model | fields)


@MATRIX  # CI compares the tokens of plain decoding, which is more
@pytest.mark.usefixtures("few_programs")
def test_generate_with_draft_model_samples_the_models_distribution(draft_model):
    """Three tokens of two choices each, 300 times, against the model's own logits; all but the first are drafted."""
    prompt, count, temperature = [5, 17, 200, 31], 300, 1.5
    wrapper = make_wrapper(load_golden(f"mesh/{MODEL}").path, max_model_len=64, max_num_batched_tokens=48)
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, share in texts.items():
            logits = wrapper.logits(prefill_step(wrapper, [*prompt, *text]))[0]
            best = np.argsort(-logits)[:2]
            for token, part in zip(best.tolist(), softmax(logits[best] / temperature), strict=True):
                longer[(*text, token)] = share * float(part)
        texts = longer
    wrapper.close()
    params = SamplingParams(n=count, max_tokens=3, temperature=temperature, top_k=2, seed=2, ignore_eos=True)
    with on_mesh(MODEL, (1, 1), max_num_seqs=16, max_num_batched_tokens=256, **draft_model) as llm:
        found = Counter(output.token_ids for output in llm.generate(prompt, params).outputs)
        stats = llm.stats()
    assert 0 < stats.accepted_draft_tokens < stats.draft_tokens
    assert found.keys() <= texts.keys()
    assert chisquare([found[text] for text in texts], [count * share for share in texts.values()]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"draft_model": "demo"},
            ValueError,
            "draft_model must have the vocabulary of the model, 301 tokens, got 4096",
        ),
        (
            {"draft_model": "./nowhere"},
            FileNotFoundError,
            "draft_model: no such checkpoint directory or hub id: ./nowhere",
        ),
    ],
    ids=str,
)
def test_llm_wrong_draft_model_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        on_mesh(MODEL, (1, 1), **fields)


@pytest.mark.usefixtures("few_programs")
def test_generate_accepted_drafts_are_steps_that_are_not_taken(drafts):
    (expected, plain_steps), repetitive = plainly(), [2, 4]
    with on_mesh(MODEL, (1, 1), tokenizer="byte", **TIGHT, **drafts) as llm:
        for number in repetitive:
            before = llm.stats()
            output = llm.generate(*ASKED[number])
            after = llm.stats()
            assert tokens_of([output]) == tokens_of([expected[number]])
            accepted = after.accepted_draft_tokens - before.accepted_draft_tokens
            assert accepted > 0
            assert after.num_steps - before.num_steps < plain_steps[number]
        assert llm.stats().draft_acceptance_rate == llm.stats().accepted_draft_tokens / llm.stats().draft_tokens


@pytest.mark.usefixtures("few_programs")
def test_generate_with_drafts_ends_where_plain_decoding_does(drafts):
    """At a stop token or a stop string among accepted drafts nothing behind it is reported; max_tokens and
    max_model_len hold."""
    (prompt, params), tokens = ASKED[4], plainly()[0][4].token_ids
    with on_mesh(MODEL, (1, 1), tokenizer="byte", **TIGHT, **drafts) as llm:
        for count in (1, 2, 3, 7, 22):
            assert llm.generate(prompt, replace(params, max_tokens=count)).token_ids == tokens[:count]
        for stop in set(tokens):
            output = llm.generate(prompt, replace(params, stop_token_ids=[stop]))
            assert output.token_ids == tokens[: tokens.index(stop) + 1]
            assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
        whole = llm.generate(prompt, replace(params, max_tokens=None))
        assert whole.token_ids[:30] == tokens and len(whole.token_ids) == 64 - len(prompt)
        streamed = list(llm.stream(prompt, params))
        assert "".join(output.delta for output in streamed) == streamed[-1].text
        places = [(first, length) for first in range(1, 30, 3) for length in (1, 3)]
        for stop in {whole.text[first : first + length] for first, length in places}:
            output = llm.generate(prompt, replace(params, max_tokens=None, stop=stop))
            assert (output.text, output.finish_reason) == (whole.text.partition(stop)[0], "stop")
            assert output.outputs[0].stop_reason == stop


@MATRIX  # tests/wrappers/test_step_shapes.py has the shapes that steps with drafts need
def test_warmup_with_drafts_knows_every_program_that_is_needed(drafts, monkeypatch):
    wanted: list[tuple] = []
    with on_mesh(MODEL, (1, 1), tokenizer="byte", max_num_seqs=1, **drafts) as llm:
        programs = llm._loaded.wrapper._programs
        monkeypatch.setattr(programs, "compile_all", wanted.extend)
        llm.warmup()
        assert llm.generate(*ASKED[4]).token_ids == plainly()[0][4].token_ids
        assert llm.stats().accepted_draft_tokens > 0
        assert set(programs._programs) <= set(wanted)
        assert any(name == "forward" and rest[0].row_len == 4 for name, *rest in programs._programs)


@MATRIX
@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=layout_name)
def test_warmup_with_drafts_then_nothing_compiles(drafts, layout):
    with on_mesh(MODEL, layout, tokenizer="byte", max_num_seqs=2, **drafts) as llm:
        llm.warmup()
        before = llm.stats().num_compilations
        generate(llm)
        assert llm.stats().accepted_draft_tokens > 0
        assert llm.stats().num_compilations == before


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_draft_tokens": 0}, ValueError, r"num_draft_tokens must be in 1\.\.15, got 0"),
        ({"num_draft_tokens": 16}, ValueError, r"num_draft_tokens must be in 1\.\.15, got 16"),
        ({"num_draft_tokens": 2.0}, TypeError, r"num_draft_tokens must be an int in 1\.\.15, got 2.0"),
        ({"draft_model": ""}, TypeError, "draft_model must be a checkpoint's directory or hub id, .* got ''"),
        ({"draft_model": 3}, TypeError, "draft_model must be a checkpoint's directory or hub id, .* got 3"),
    ],
    ids=str,
)
def test_engine_config_wrong_drafts_name_field_value_and_range(fields, error, message):
    with pytest.raises(error, match=message):
        EngineConfig(**fields)
