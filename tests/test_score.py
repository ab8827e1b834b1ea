"""Log-probabilities of prompts and what is made of them: transformers' own, whatever the engine does meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import CASES, load_golden
from mesh_tools import on_mesh
from scipy.special import log_softmax

from jaxinfer import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.usefixtures("few_programs")

MATRIX = pytest.mark.matrix
MODEL = "gemma3"  # windows on some of its layers
TOP = 5
TOLERANCE = 1e-3
"""Float32 forward passes, ours and theirs; log-probabilities down to -20 or so."""
FIELDS = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 16}


def assert_equal_to_golden(outputs: list[RequestOutput], case: str) -> None:
    """Wherever transformers' logits are kept: value and rank of the prompt's token, and the best ones."""
    golden = load_golden(case)
    for number, (prompt, output) in enumerate(zip(golden.prompts, outputs, strict=True)):
        assert output.prompt_token_ids == tuple(prompt)
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        positions, logits = (golden.expected[f"{name}_{number}"] for name in ("positions", "logits"))
        for position, row in zip(positions[:-1], log_softmax(logits[:-1].astype(np.float64), axis=-1), strict=True):
            token, found = prompt[position + 1], output.prompt_logprobs[position + 1]
            best = np.argsort(-row, kind="stable")[:TOP].tolist()
            assert list(found) == [token, *(other for other in best if other != token)]
            assert [found[other].rank for other in best] == [1, 2, 3, 4, 5]
            assert found[token].rank == 1 + (row > row[token]).sum()
            np.testing.assert_allclose(
                [entry.logprob for entry in found.values()], row[list(found)], rtol=0, atol=TOLERANCE
            )


IN_CI = ("gpt2",)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in IN_CI else MATRIX) for case in CASES])
def test_score_golden_checkpoints_equal_transformers(case):
    with LLM(load_golden(case).path, **FIELDS) as llm:
        assert_equal_to_golden(llm.score(load_golden(case).prompts, prompt_logprobs=TOP, use_tqdm=False), case)


TIGHT = {"num_kv_pages": 10, "enable_prefix_caching": False}


def sampled_logprobs(output: RequestOutput) -> list[float]:
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    return [found[token].logprob for token, found in pairs if found is not None]


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param((1, 1), TIGHT, marks=MATRIX),
        ((2, 2), {}),
        pytest.param((4, 2), {}, marks=MATRIX),
        pytest.param((2, 2), TIGHT, marks=MATRIX),
        pytest.param((2, 4), {"max_num_batched_tokens": 64}, marks=MATRIX),
        pytest.param((1, 4), {"run_ahead": False}, marks=MATRIX),
    ],
    ids=str,
)
def test_generate_prompt_logprobs_equal_transformers_in_any_company(layout, fields):
    """Scored prompts of one to three chunks, each with and without a continuation, beside plain ones."""
    golden = load_golden(f"mesh/{MODEL}")
    wishes = {"temperature": 0.0, "ignore_eos": True}
    plain, only = SamplingParams(max_tokens=16, **wishes), SamplingParams(max_tokens=0, prompt_logprobs=TOP, n=2)
    continued = SamplingParams(max_tokens=16, prompt_logprobs=TOP, **wishes)
    with on_mesh(MODEL, layout, **fields) as llm:
        params = [plain] * 3 + [continued] * 3 + [only] * 3
        outputs = llm.generate(golden.prompts * 3, params, use_tqdm=False)
        stats = llm.stats()
    assert [output.prompt_logprobs for output in outputs[:3]] == [None] * 3
    assert [list(output.token_ids) for output in outputs[:6]] == [tokens[:16] for tokens in golden.greedy] * 2
    assert_equal_to_golden(outputs[3:6], f"mesh/{MODEL}")
    assert_equal_to_golden(outputs[6:], f"mesh/{MODEL}")
    for one, other in zip(outputs[3:6], outputs[6:], strict=True):  # all positions, in other chunks
        np.testing.assert_allclose(sampled_logprobs(one), sampled_logprobs(other), rtol=0, atol=1e-4)
    ends = [(entry.token_ids, entry.finish_reason) for output in outputs[6:] for entry in output.outputs]
    assert ends == [((), "length")] * 6
    assert (stats.num_preemptions > 0) == ("num_kv_pages" in fields)
    assert stats.kv_pages_used == 0


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with on_mesh("llama", (1, 1), tokenizer="byte") as llm:
        yield llm


def test_score_reads_no_prefix_cache_and_writes_it(llm):
    prompt = [*range(100, 141)]
    first, second = llm.score(prompt), llm.score(prompt)
    assert first.num_cached_tokens == second.num_cached_tokens == 0
    assert llm.generate(prompt, SamplingParams(max_tokens=1)).num_cached_tokens == 40
    third = llm.score([*prompt, 7])
    assert third.num_cached_tokens == 0
    assert first.prompt_logprobs == second.prompt_logprobs == third.prompt_logprobs[:-1]


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_stream_max_tokens_zero_is_one_finished_empty_output(llm, prompt_logprobs):
    params = SamplingParams(max_tokens=0, prompt_logprobs=prompt_logprobs)
    (output,) = llm.stream("ab", params)
    assert (output.text, output.delta, output.token_ids) == ("", "", ())
    assert (output.finished, output.finish_reason) == (True, "length")
    if prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs[0] is None and list(output.prompt_logprobs[1]) == [98]
        assert output.prompt_logprobs[1][98].decoded_token == "b"


def test_score_one_token_has_one_entry_of_none(llm):
    assert llm.score([5]).prompt_logprobs == (None,)
    assert [output.prompt_logprobs for output in llm.score([[5], [6]], use_tqdm=False)] == [(None,)] * 2
    assert llm.score([]) == []


def test_perplexity_one_window_is_that_of_transformers(llm):
    golden = load_golden("mesh/llama")
    prompt = golden.prompts[0]
    rows = log_softmax(golden.expected["logits_0"].astype(np.float64), axis=-1)
    expected = sum(rows[position][token] for position, token in enumerate(prompt[1:]))
    found = llm.perplexity(prompt)
    assert found.num_tokens == len(prompt) - 1 and found.num_bytes is found.bits_per_byte is None
    assert found.value == pytest.approx(math.exp(-expected / found.num_tokens), rel=TOLERANCE)


def test_perplexity_without_a_window_takes_what_the_pages_hold():
    tokens = [5 + number % 90 for number in range(40)]
    with on_mesh("llama", (1, 1), num_kv_pages=2) as llm:
        assert llm.perplexity(tokens) == llm.perplexity(tokens, window=15)
    with on_mesh("llama", (1, 1), max_model_len=2) as llm, pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        llm.perplexity(tokens)


@pytest.mark.parametrize(("num_bytes", "window", "stride"), [(150, 24, 10), (151, None, None), (64, 63, 1), (9, 2, 1)])
def test_perplexity_sliding_windows_equal_their_scores_added_up(llm, num_bytes, window, stride):
    """Every token counts in the first window that holds it; more windows than run at once."""
    text = "".join(chr(97 + number * number % 23) for number in range(num_bytes))
    found = llm.perplexity(text, window=window, stride=stride)
    window, stride = window or 63, stride or 31
    logprobs: dict[int, float] = {}
    start = 0
    while len(logprobs) < num_bytes - 1:
        for position, value in enumerate(sampled_logprobs(llm.score(text[start : start + window])), start + 1):
            logprobs.setdefault(position, value)
        start += stride
    assert found.num_tokens == len(logprobs) and found.num_bytes == num_bytes
    # The same programs in other company: float32 sums in another order.
    assert found.logprob == pytest.approx(sum(logprobs.values()), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(-sum(logprobs.values()) / math.log(2) / num_bytes, rel=1e-5)
