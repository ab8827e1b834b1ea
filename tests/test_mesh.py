"""The mesh: every layout gives the tokens of one device, whatever the engine does meanwhile.

On eight simulated CPU devices, in float32. Greedy tokens are transformers' as well; seeded ones and log-probabilities
are compared with one device that serves every prompt by itself.
"""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from conftest import load_golden

from jaxinfer import LLM, RequestOutput, SamplingParams

LAYOUTS = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (4, 1), (4, 2), (2, 4)]
MODELS = ["llama", "qwen3", "gemma3", "gpt2", "mixtral"]
BASE = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 16}
FEATURES = {
    "chunked prefill": {"enable_prefix_caching": False},
    "preemption": {"num_kv_pages": 10, "enable_prefix_caching": False},
    "prefix cache": {},
    "aborts": {"enable_prefix_caching": False},
    "step shapes": {"enable_prefix_caching": False, "max_num_batched_tokens": 32},
}
VOCAB_SIZE = 301


def layout_name(layout: tuple[int, int]) -> str:
    return "x".join(map(str, layout))


def on_mesh(model: str, layout: tuple[int, int], **fields) -> LLM:
    stages, shards = layout
    sizes = {"pipeline_parallel_size": stages, "tensor_parallel_size": shards}
    return LLM(load_golden(f"mesh/{model}").path, **BASE | sizes | fields)


def requests_of(model: str) -> list[tuple[list[int], SamplingParams]]:
    """The golden prompts, greedy, and between them seeded ones of every sampler that share a beginning."""
    golden = load_golden(f"mesh/{model}")
    beginning = np.random.default_rng(1).integers(0, VOCAB_SIZE, 17).tolist()
    samplers = [{"temperature": 0.9, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.2}]
    pairs = []
    for number, (prompt, sampler) in enumerate(zip(golden.prompts, samplers, strict=True)):
        pairs.append((prompt, SamplingParams(max_tokens=14, temperature=0.0, logprobs=1, ignore_eos=True)))
        seeded = SamplingParams(max_tokens=18, seed=number, logprobs=1, ignore_eos=True, **sampler)
        pairs.append((beginning + prompt[:9], seeded))
    return pairs


def run(llm: LLM, model: str) -> list[RequestOutput]:
    prompts, params = zip(*requests_of(model), strict=True)
    return llm.generate(list(prompts), list(params), use_tqdm=False)


def run_among_aborts(llm: LLM, model: str) -> list[RequestOutput]:
    """As run, while other requests come and leave in mid-flight."""
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        outputs = pool.submit(run, llm, model)
        for length in (30, 3, 17, 9, 1):
            with closing(llm.stream(list(range(length)), params)) as stream:
                tokens = [len(output.token_ids) for output in itertools.islice(stream, 1 + length % 4)]
            assert tokens == list(range(1, 2 + length % 4))
        found = outputs.result()
    llm.generate([1], SamplingParams(max_tokens=1))  # runs behind the last abort
    return found


@functools.cache
def alone(model: str) -> list[RequestOutput]:
    """Every prompt by itself on one device."""
    with on_mesh(model, (1, 1), max_num_seqs=1, enable_prefix_caching=False) as llm:
        return [llm.generate(prompt, params) for prompt, params in requests_of(model)]


def sampled_logprobs(output: RequestOutput) -> list[float]:
    assert output.logprobs is not None
    return [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]


def cases() -> list:
    """CI runs every larger layout with every model and both with every feature, step shapes excepted; `-m matrix` the
    rest."""
    numbered = itertools.product(enumerate(MODELS), enumerate(LAYOUTS), enumerate(FEATURES))
    chosen = {("llama", (4, 2), "step shapes"), ("gemma3", (2, 1), "step shapes")}
    marked = []
    for (i, model), (j, layout), (k, feature) in numbered:
        in_cover = layout != (1, 1) and (i + j) % (len(FEATURES) - 1) == k
        marks = () if in_cover or (model, layout, feature) in chosen else pytest.mark.matrix
        name = f"{model}-{layout_name(layout)}-{feature}"
        marked.append(pytest.param(model, layout, feature, marks=marks, id=name))
    return marked


@pytest.mark.parametrize(("model", "layout", "feature"), cases())
def test_generate_layout_gives_the_tokens_of_one_device(model, layout, feature, request):
    if feature != "step shapes":
        request.getfixturevalue("one_shape")
    with on_mesh(model, layout, **FEATURES[feature]) as llm:
        if feature == "aborts":
            found = run_among_aborts(llm, model)
        else:
            found = run(llm, model)
        if feature == "prefix cache":
            again = run(llm, model)
            assert [output.token_ids for output in again] == [output.token_ids for output in found]
        stats = llm.stats()
    expected, greedy = alone(model), load_golden(f"mesh/{model}").greedy
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert [list(output.token_ids) for output in found[::2]] == [tokens[:14] for tokens in greedy]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(sampled_logprobs(one), sampled_logprobs(other), rtol=0, atol=1e-4)
    assert stats.kv_pages_used == 0
    assert (stats.num_preemptions > 0) == (feature == "preemption")
    assert (stats.prefix_cache_hits > 0) == (feature == "prefix cache")
