"""Several samples of one prompt: each is a request with a seed of its own, and together they share the prompt's pages.

In float32 on CPU, so that tokens are equal wherever they are compared.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import on_mesh
from scipy.special import softmax
from scipy.stats import chisquare

from jaxinfer import LLM, CompletionOutput, RequestOutput, SamplingParams
from jaxinfer.api.driver import Ticket

pytestmark = pytest.mark.usefixtures("few_programs")

MODEL = "llama"
COMMON = {"ignore_eos": True, "logprobs": 1}
ASKED = [  # filtered; greedy; seeded, more samples than slots
    ([9, 1], SamplingParams(n=2, max_tokens=8, temperature=0.9, top_k=20, seed=2**63 - 1, **COMMON)),
    ([*range(40, 57)], SamplingParams(n=3, max_tokens=6, temperature=0.0, seed=5, **COMMON)),
    ([*range(40, 63)], SamplingParams(n=6, max_tokens=20, temperature=1.0, seed=7, **COMMON)),
]
TEXTS = SamplingParams(n=3, max_tokens=16, temperature=1.0, seed=3, allowed_token_ids=[*b"abcdef"], ignore_eos=True)


def seed_of(seed: int, index: int) -> int:
    """The seed of sample `index`, spelt out: half the number in the first 8 bytes of a hash."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return seed if index == 0 else int.from_bytes(digest[:8], "little") // 2


def sample(llm: LLM) -> list[RequestOutput]:
    prompts, params = zip(*ASKED, strict=True)
    return llm.generate(list(prompts), list(params), use_tqdm=False)


def essence(output: CompletionOutput) -> tuple:
    return output.seed, output.token_ids, output.text, output.finish_reason


def sampled_logprobs(output: CompletionOutput) -> list[float]:
    return [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]


@functools.cache
def one_by_one() -> list[list[CompletionOutput]]:
    """Every sample as a request with n=1, nothing beside it."""
    with on_mesh(MODEL, (1, 1), tokenizer="byte", enable_prefix_caching=False) as llm:
        return [
            [
                llm.generate(prompt, replace(params, n=1, seed=seed_of(params.seed, index))).outputs[0]
                for index in range(params.n)
            ]
            for prompt, params in ASKED
        ]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with on_mesh(MODEL, (1, 1), tokenizer="byte", enable_prefix_caching=False) as llm:
        yield llm


MATRIX = pytest.mark.matrix
TIGHT = {"num_kv_pages": 10, "enable_prefix_caching": False}


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param((1, 1), {}, marks=MATRIX),
        ((1, 1), TIGHT),
        ((2, 2), {"enable_prefix_caching": False}),
        pytest.param((4, 2), {"run_ahead": False}, marks=MATRIX),
        pytest.param((1, 1), {"max_num_batched_tokens": 64}, marks=MATRIX),
        pytest.param((2, 2), TIGHT, marks=MATRIX),
        pytest.param((2, 4), {}, marks=MATRIX),
    ],
    ids=str,
)
def test_generate_n_outputs_equal_requests_of_their_seeds(layout, fields):
    with on_mesh(MODEL, layout, tokenizer="byte", **fields) as llm:
        found, stats = sample(llm), llm.stats()
    for output, expected in zip(found, one_by_one(), strict=True):
        assert [essence(entry) for entry in output.outputs] == [essence(entry) for entry in expected]
        assert [entry.index for entry in output.outputs] == list(range(len(expected)))
        for one, other in zip(output.outputs, expected, strict=True):  # sums in another order
            np.testing.assert_allclose(sampled_logprobs(one), sampled_logprobs(other), rtol=0, atol=1e-4)
    assert (stats.num_preemptions > 0) == ("num_kv_pages" in fields)
    assert stats.kv_pages_used == 0


def test_generate_n_seeds_follow_the_first_and_samples_differ(llm):
    (_, greedy, seeded), (first, again) = sample(llm), llm.generate([[9], [9]], SamplingParams(n=2), use_tqdm=False)
    assert [entry.seed for entry in seeded.outputs] == [seed_of(7, index) for index in range(6)]
    assert len({entry.token_ids for entry in seeded.outputs}) == 6
    assert len({entry.token_ids for entry in greedy.outputs}) == 1
    for output in (first, again):
        assert output.outputs[1].seed == seed_of(output.outputs[0].seed, 1)
    assert first.outputs[0].seed != again.outputs[0].seed


def test_stream_n_deltas_of_every_output_add_up(llm):
    prompt = [*b"a prompt of more than one page"]
    outputs = list(llm.stream(prompt, TEXTS))
    expected = llm.generate(prompt, TEXTS)
    for index, final in enumerate(outputs[-1].outputs):
        assert "".join(output.outputs[index].delta for output in outputs) == final.text != ""
    assert [essence(entry) for entry in outputs[-1].outputs] == [essence(entry) for entry in expected.outputs]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


@pytest.mark.parametrize("stopped", [0, 2])
def test_generate_n_stop_string_ends_one_and_not_the_others(llm, stopped):
    prompt = [*range(40, 63)]
    texts = [entry.text for entry in llm.generate(prompt, TEXTS).outputs]
    words = {text[i : i + 3] for i, text in itertools.product(range(9), [texts[stopped]])}
    stop = min(word for word in words if sum(word in text for text in texts) == 1)
    found = llm.generate(prompt, replace(TEXTS, stop=stop)).outputs
    assert [entry.text for entry in found] == [text.partition(stop)[0] for text in texts]
    assert [entry.finish_reason for entry in found] == ["stop" if i == stopped else "length" for i in range(3)]
    assert [entry.stop_reason for entry in found] == [stop if i == stopped else None for i in range(3)]


@pytest.mark.parametrize("num_read", [0, 1, 7])
def test_stream_n_closing_ends_all_samples_also_those_that_wait_for_the_first(llm, num_read):
    expected = llm.generate(*ASKED[0])
    with closing(llm.stream(ASKED[2][0], replace(ASKED[2][1], max_tokens=40))) as stream:
        outputs = list(itertools.islice(stream, num_read))
        assert len(outputs) == num_read or outputs[-1].finished
    assert llm.generate(*ASKED[0]).outputs == expected.outputs
    stats = llm.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_pages_used) == (0, 0, 0)


def test_generate_n_prompt_is_computed_once_and_its_pages_are_shared(llm):
    """40 tokens and 8 more: 6 pages of 8 by itself. Of the 39 that samples share 4 pages are full."""
    params = SamplingParams(n=4, max_tokens=8, temperature=1.0, seed=1, ignore_eos=True)
    rows, used, done = llm.stats().num_rows_live, [], threading.Event()

    def look(ticket: Ticket) -> None:  # between two steps
        used.append(llm.stats().kv_pages_used)
        output = ticket.take()
        if output is not None and output.finished:
            done.set()

    llm.start(llm.prepare([*range(40)], params), on_update=look)
    assert done.wait(60)
    prompt_rows = 3 + 3 * 1  # blocks of 16 for the first, one token for each of the others
    assert llm.stats().num_rows_live - rows == prompt_rows + 4 * 7
    assert max(used) == 4 + 4 * 2


@pytest.mark.parametrize("temperature", [1.0, pytest.param(1.5, marks=MATRIX)])
def test_generate_n_first_tokens_are_distributed_as_the_model_says(llm, temperature):
    """400 samples against transformers' logits; tokens expected less than 5 times count as one."""
    golden = load_golden(f"mesh/{MODEL}")
    params = SamplingParams(n=400, max_tokens=1, temperature=temperature, seed=11, ignore_eos=True)
    output = llm.generate(golden.prompts[0], params)
    assert golden.expected["positions_0"][-1] == len(golden.prompts[0]) - 1
    expected = 400 * softmax(golden.expected["logits_0"][-1].astype(np.float64) / temperature)
    found = np.bincount([entry.token_ids[0] for entry in output.outputs], minlength=len(expected))
    often = expected >= 5
    assert often.sum() >= 5
    bins = [np.append(counts[often], counts[~often].sum()) for counts in (found, expected)]
    assert chisquare(*bins).pvalue > 1e-3
