"""Integers of any size in requests: taken for what they mean or refused at submission, and nobody else is disturbed."""

import pytest
from conftest import load_golden

from jaxinfer import LLM, BeamSearchParams, SamplingParams

LARGE = (2**31, 2**32 + 1, 2**63, 2**64)
LIMIT = 48


@pytest.fixture(scope="module")
def llm():
    with LLM(load_golden("gqa").path, max_model_len=LIMIT, max_num_seqs=16, page_size=8, num_kv_pages=128) as llm:
        yield llm


def outputs(llm, params):
    """Of requests beside a greedy one, which gets what transformers gets."""
    golden = load_golden("gqa")
    neighbour = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = llm.generate([golden.prompts[0]] * (1 + len(params)), [neighbour, *params], use_tqdm=False)
    assert list(found[0].token_ids) == golden.greedy[0][:12]
    return [output.token_ids for output in found[1:]]


def test_large_top_k_is_off(llm):
    fields = {"max_tokens": 12, "ignore_eos": True, "seed": 3, "temperature": 3.0}
    off, *found = outputs(llm, [SamplingParams(top_k=top_k, **fields) for top_k in (0, 320, *LARGE)])
    assert found == [off] * len(found) and len(set(off)) > 6


def test_large_lengths_end_at_max_model_len(llm):
    fields = {"temperature": 0, "stop_token_ids": range(300)}
    unbound = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    params = [
        *(SamplingParams(temperature=0, max_tokens=size, ignore_eos=True) for size in LARGE),
        *(SamplingParams(temperature=0, max_tokens=3, truncate_prompt_tokens=size, ignore_eos=True) for size in LARGE),
        *(SamplingParams(max_tokens=size, min_tokens=size, **fields) for size in LARGE),
    ]
    longest, *found = outputs(llm, [unbound, *params])
    room = LIMIT - len(load_golden("gqa").prompts[0])
    assert len(longest) == room and found[:4] == [longest] * 4
    assert found[4:8] == [longest[:3]] * 4
    assert all(len(tokens) == room and min(tokens) >= 300 for tokens in found[8:]), "stop tokens were held back"


def test_large_seeds_are_seeds_of_their_own(llm):
    seeds = [1, 2**31, 2**32 + 1, 2**63 - 1]
    params = [SamplingParams(temperature=3.0, seed=seed, max_tokens=12, ignore_eos=True) for seed in [*seeds, *seeds]]
    found = outputs(llm, params)
    assert found[:4] == found[4:] and len(set(map(tuple, found))) == 4


def test_large_beam_search_length_ends_at_max_model_len(llm):
    prompt = load_golden("gqa").prompts[0]
    fields = {"beam_width": 2, "ignore_eos": True, "early_stopping": "never", "length_penalty": 50.0}
    params = [BeamSearchParams(max_tokens=size, **fields) for size in (LIMIT, *LARGE)]
    found = llm.beam_search([prompt] * len(params), params, use_tqdm=False)
    assert [output.token_ids for output in found] == [found[0].token_ids] * len(params)


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda size: SamplingParams(n=size), "n must be <= 16384, got"),
        (lambda size: SamplingParams(stop_token_ids=[size]), "stop_token_ids has token"),
        (lambda size: SamplingParams(allowed_token_ids=[size]), "allowed_token_ids has token"),
        (lambda size: SamplingParams(logit_bias={size: 1.0}), "logit_bias has token"),
        (lambda size: SamplingParams(seed=max(size, 2**63)), r"seed must be in 0\.\."),
        (lambda size: SamplingParams(priority=size), "priority must be in"),
        (lambda size: SamplingParams(priority=-size - 1), "priority must be in"),
        (lambda size: SamplingParams(logprobs=size), "logprobs must be in"),
    ],
)
def test_large_number_without_a_meaning_is_refused(llm, make, message, size):
    with pytest.raises(ValueError, match=message):
        llm.generate([1], make(size))
    with pytest.raises(ValueError, match="prompt token 1 is"):
        llm.generate([1, size])


@pytest.mark.parametrize("size", LARGE)
def test_large_token_id_ends_no_beam_search(llm, size):
    with pytest.raises(ValueError, match="stop_token_ids has token"):
        llm.beam_search([1], BeamSearchParams(stop_token_ids=[size]))
