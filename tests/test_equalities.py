"""What must not change a result: company, order, batch, chunk and page sizes, preemption, prefix hits, run-ahead.

In float32 on CPU every token is equal, greedy and seeded; the golden maker asserts that the two best logits are far
apart wherever greedy outputs are compared with transformers.
"""

import dataclasses
import functools

import numpy as np
import pytest
from conftest import CASES, load_golden

from jaxinfer import LLM, SamplingParams

NUM_PROMPTS = 10
BASE = {"max_model_len": 96, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 32}


def make_prompts() -> list[list[int]]:
    """Prompts of 1 to 60 tokens; three of them share a beginning of 20 tokens, two are equal."""
    random = np.random.default_rng(7)
    lengths = [1, 3, 8, 9, 17, 30, 60, 24, 31, 31]
    prompts = [random.integers(0, 320, length).tolist() for length in lengths]
    for prompt in prompts[7:]:
        prompt[:20] = prompts[6][:20]
    prompts[9] = list(prompts[8])
    return prompts


def make_params() -> list[SamplingParams]:
    """Greedy rows between random ones of every sampler."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 1.2},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05, "top_k": 100},
    ]
    return [
        SamplingParams(max_tokens=12 + number, ignore_eos=True, seed=number, **kinds[number % len(kinds)])
        for number in range(NUM_PROMPTS)
    ]


PROMPTS, PARAMS = make_prompts(), make_params()


def outputs_of(llm: LLM, order=range(NUM_PROMPTS), prompts=PROMPTS) -> list[tuple[int, ...]]:
    results = llm.generate([prompts[i] for i in order], [PARAMS[i] for i in order], use_tqdm=False)
    by_number = dict(zip(order, results, strict=True))
    return [by_number[number].token_ids for number in range(NUM_PROMPTS)]


@functools.cache
def alone() -> list[tuple[int, ...]]:
    """Every prompt by itself, one after the other, nothing shared."""
    with LLM(load_golden("gqa").path, **BASE | {"max_num_seqs": 1, "enable_prefix_caching": False}) as llm:
        return [llm.generate(prompt, params).token_ids for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


VARIATIONS = {
    "crowd": {},
    "three slots": {"max_num_seqs": 3},
    "sixteen slots": {"max_num_seqs": 16},
    "small chunks": {"max_num_batched_tokens": 16},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 128},
    "page of 16": {"page_size": 16},
    "page of 64": {"page_size": 64},
    "tight pool": {"num_kv_pages": 10},
    "tight pool without prefix cache": {"num_kv_pages": 10, "enable_prefix_caching": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "no run-ahead": {"run_ahead": False},
    "no run-ahead, tight pool": {"run_ahead": False, "num_kv_pages": 10},
    "reference attention": {"attention_backend": "reference"},
    "GPU kernels": {"attention_backend": "pallas"},
}


# Every run compiles programs of its own: CI runs the variations that differ most, `-m matrix` the others.
MATRIX_ONLY = {
    "three slots",
    "sixteen slots",
    "whole prompts",
    "page of 16",
    "page of 64",
    "tight pool without prefix cache",
    "no run-ahead",
    "no prefix cache",
    "GPU kernels",
}


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    "variation",
    [pytest.param(name, marks=pytest.mark.matrix if name in MATRIX_ONLY else ()) for name in VARIATIONS],
)
def test_generate_tokens_do_not_depend_on_the_engine(variation):
    with LLM(load_golden("gqa").path, **BASE | VARIATIONS[variation]) as llm:
        assert outputs_of(llm) == alone()
        stats = llm.stats()
    if "tight" in variation:
        assert stats.num_preemptions
    assert stats.kv_pages_used == 0


FAMILY_VARIATIONS = ["crowd", "small chunks", "page of 64", "tight pool", "no run-ahead"]
FAMILIES = ["gemma3", "gpt2", "qwen2"]
PAIRS = [(family, variation) for family in FAMILIES for variation in FAMILY_VARIATIONS]


@pytest.fixture(scope="module")
def family(request) -> tuple[str, list[list[int]], list[tuple[int, ...]]]:
    """A case (windows on some layers, learned positions), prompts of its vocabulary, and what each gives by itself
    with the plain attention."""
    prompts = [[token % 256 for token in prompt] for prompt in PROMPTS]
    fields = {"max_num_seqs": 1, "enable_prefix_caching": False, "attention_backend": "reference"}
    with LLM(load_golden(request.param).path, **BASE | fields) as llm:
        pairs = zip(prompts, PARAMS, strict=True)
        return request.param, prompts, [llm.generate(prompt, params).token_ids for prompt, params in pairs]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.matrix  # test_mesh.py compares families with one device in CI
@pytest.mark.parametrize(("family", "variation"), PAIRS, ids=map("-".join, PAIRS), indirect=["family"], scope="module")
def test_generate_other_families_do_not_depend_on_the_engine(variation, family):
    case, prompts, expected = family
    with LLM(load_golden(case).path, **BASE | VARIATIONS[variation]) as llm:
        assert outputs_of(llm, prompts=prompts) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"enable_prefix_caching": False}, marks=pytest.mark.matrix),
        pytest.param({"run_ahead": False}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
@pytest.mark.usefixtures("few_programs")
def test_generate_all_but_the_oldest_preempted_tokens_stay_the_same(fields):
    """Four requests that grow to 9 pages each share 10 pages."""
    prompts = PROMPTS[1:5]
    params = [dataclasses.replace(entry, max_tokens=50) for entry in PARAMS[1:5]]
    with LLM(load_golden("gqa").path, **BASE) as llm:
        expected = [llm.generate(prompt, entry).token_ids for prompt, entry in zip(prompts, params, strict=True)]
    with LLM(load_golden("gqa").path, **BASE | {"num_kv_pages": 10} | fields) as llm:
        results = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats().num_preemptions >= 3
    assert [result.token_ids for result in results] == expected


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.matrix)])
@pytest.mark.usefixtures("few_programs")
def test_generate_tokens_do_not_depend_on_the_order_of_arrival(seed):
    order = np.random.default_rng(seed).permutation(NUM_PROMPTS).tolist()
    with LLM(load_golden("gqa").path, **BASE) as llm:
        assert outputs_of(llm, order) == alone()


@pytest.mark.usefixtures("few_programs")
def test_generate_second_run_hits_the_prefix_cache_and_repeats_itself():
    with LLM(load_golden("gqa").path, **BASE | {"num_kv_pages": 200}) as llm:
        assert outputs_of(llm) == alone()
        hits = llm.stats().prefix_cache_hits
        assert outputs_of(llm) == alone()
        assert llm.stats().prefix_cache_hits > hits + 100


# Of the others CI compares the logits (test_decoder_wrapper.py); `-m matrix` runs them all.
IN_CI = {"gemma3", "gpt2", "gqa", "mistral", "mixtral", "phi3_long", "qwen3"}


@pytest.mark.parametrize(
    "golden",
    [pytest.param(case, marks=() if case in IN_CI else pytest.mark.matrix) for case in CASES],
    indirect=True,
)
def test_generate_greedy_golden_checkpoints_equal_transformers(golden):
    # One after the other: the fewest programs to compile; company is what the tests above are about.
    with LLM(golden.path, max_num_seqs=1, page_size=8, num_kv_pages=64, max_num_batched_tokens=16) as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
        results = llm.generate(golden.prompts, params, use_tqdm=False)
    for number, result in enumerate(results):
        assert list(result.token_ids) == golden.greedy[number]
        logprobs = [entry[token].logprob for entry, token in zip(result.logprobs, result.token_ids, strict=True)]
        np.testing.assert_allclose(logprobs, golden.expected[f"logprobs_{number}"], atol=2e-4)


@pytest.mark.parametrize(
    "golden",
    [pytest.param(case, marks=() if case == "qwen3" else pytest.mark.matrix) for case in CASES],
    indirect=True,
)
def test_generate_greedy_with_gpu_kernels_equals_transformers(golden):
    """Short texts in Pallas' interpreter; 8 tokens lie on two pages."""
    with LLM(
        golden.path,
        attention_backend="pallas",
        max_num_seqs=1,
        page_size=8,
        num_kv_pages=64,
        max_num_batched_tokens=16,
        max_model_len=64,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
        results = llm.generate(golden.prompts, params, use_tqdm=False)
    for number, result in enumerate(results):
        assert list(result.token_ids) == golden.greedy[number][:8]
        logprobs = [entry[token].logprob for entry, token in zip(result.logprobs, result.token_ids, strict=True)]
        np.testing.assert_allclose(logprobs, golden.expected[f"logprobs_{number}"][:8], atol=2e-4)


@pytest.mark.usefixtures("few_programs")
def test_logprobs_chunks_and_preemption_agree_to_rounding():
    """Tokens are equal, log-probabilities differ by the order of sums only."""
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=3)
    found = []
    for fields in ({}, {"max_num_batched_tokens": 16, "num_kv_pages": 10}):
        with LLM(load_golden("gqa").path, **BASE | fields) as llm:
            results = llm.generate(PROMPTS, params, use_tqdm=False)
        found.append([[entry[t].logprob for entry, t in zip(r.logprobs, r.token_ids, strict=True)] for r in results])
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
