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
from mesh_tools import LAYOUTS, MODELS, layout_name, on_mesh, requests_of, run

from jaxinfer import LLM, RequestOutput, SamplingParams

FEATURES = {
    "chunked prefill": {"enable_prefix_caching": False},
    "preemption": {"num_kv_pages": 10, "enable_prefix_caching": False},
    "prefix cache": {},
    "aborts": {"enable_prefix_caching": False},
    "step shapes": {"enable_prefix_caching": False, "max_num_batched_tokens": 32},
}


def run_among_aborts(llm: LLM, model: str) -> list[RequestOutput]:
    """As run, while other requests come and leave in mid-flight."""
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        outputs = pool.submit(run, llm, model)
        for length in (30, 3, 17, 9, 1):
            with closing(llm.stream(list(range(length)), params)) as stream:
                assert all(not output.finished for output in itertools.islice(stream, 1 + length % 4))
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
    """CI runs every model on a layout of its own, and every feature at least once; `-m matrix` runs the rest."""
    layouts = [(2, 2), (1, 8), (4, 1), (4, 2), (2, 4)]
    cover = set(zip(MODELS, layouts, itertools.cycle(list(FEATURES)[:-1]), strict=False))
    cover.add(("llama", (2, 2), "step shapes"))
    marked = []
    for case in itertools.product(MODELS, LAYOUTS, FEATURES):
        name = "-".join((case[0], layout_name(case[1]), case[2]))
        marked.append(pytest.param(*case, marks=() if case in cover else pytest.mark.matrix, id=name))
    return marked


@pytest.mark.parametrize(("model", "layout", "feature"), cases())
def test_generate_layout_gives_the_tokens_of_one_device(model, layout, feature, request):
    if feature != "step shapes":
        request.getfixturevalue("few_programs")
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


def test_too_few_devices_says_how_to_simulate_more():
    message = r"4 pipeline x 4 tensor needs 16 devices, found 8 .*device_count=16 to simulate them"
    with pytest.raises(ValueError, match=message):
        on_mesh("llama", (4, 4))
