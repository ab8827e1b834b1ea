"""Forks: what follows in the middle of a generated text equals what followed there, and what a fresh prompt gives."""

import pytest
from conftest import load_golden
from mesh_tools import on_mesh

from jaxinfer import LLM, SamplingParams
from jaxinfer.research import add

BASE = {"max_model_len": 96, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 32}
PROMPT = list(range(20, 41))


@pytest.fixture(scope="module")
def llm():
    with LLM(load_golden("gqa").path, **BASE) as llm:
        yield llm


KINDS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 4},
    "filtered": {"seed": 4, "top_p": 0.7},
    "penalties": {"seed": 4, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "structured": {"seed": 4, "structured": {"regex": "[a-z ]{60}"}},
    "bad words": {"seed": 4, "bad_words": ["a", "e"]},
    "steered": {"seed": 4, "interventions": [add.at("layers.0.residual", tokens="generated", vector=[2.0] * 48)]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fork_with_the_original_settings_gives_what_followed(llm, kind):
    params = SamplingParams(max_tokens=14, ignore_eos=True, logprobs=2, **KINDS[kind])
    out = llm.generate("The house" if kind == "structured" else PROMPT, params)
    for at in (0, 1, 6, -3, len(out.token_ids) - 1):
        num_kept = at if at >= 0 else len(out.token_ids) + at
        fork = llm.fork(
            out,
            at=at,
            sampling_params=SamplingParams(max_tokens=14 - num_kept, ignore_eos=True, logprobs=2, **KINDS[kind]),
        )
        assert fork.token_ids == out.token_ids[num_kept:]
        assert fork.prompt_token_ids == out.prompt_token_ids + out.token_ids[:num_kept]
        assert fork.num_forked_tokens == num_kept
        for mine, theirs in zip(fork.logprobs, out.logprobs[num_kept:], strict=True):
            assert {token: entry.logprob for token, entry in mine.items()} == pytest.approx(
                {token: entry.logprob for token, entry in theirs.items()}, abs=1e-5
            )


def test_fork_equals_a_fresh_prompt_and_shares_its_pages(llm):
    out = llm.generate(PROMPT, SamplingParams(max_tokens=20, seed=1, ignore_eos=True))
    params = SamplingParams(max_tokens=8, seed=9, ignore_eos=True)
    fork = llm.fork(out, at=12, n=4, sampling_params=params)
    assert fork.num_cached_tokens == 32  # of 33
    assert len({output.token_ids for output in fork.outputs}) == 4
    with LLM(load_golden("gqa").path, **BASE | {"enable_prefix_caching": False}) as fresh:
        text = [*PROMPT, *out.token_ids[:12]]
        expected = fresh.generate(text, SamplingParams(max_tokens=8, seed=9, ignore_eos=True, n=4))
    assert [output.token_ids for output in fork.outputs] == [output.token_ids for output in expected.outputs]


@pytest.mark.parametrize(
    "layout", [(1, 1), pytest.param((2, 2), marks=pytest.mark.matrix), pytest.param((4, 2), marks=pytest.mark.matrix)]
)
@pytest.mark.parametrize("setting", [pytest.param("tight pool", marks=pytest.mark.matrix), "drafts"])
def test_forks_in_a_crowd_equal_what_followed(layout, setting, few_programs):
    settings = {"tight pool": {"num_kv_pages": 14}, "drafts": {"draft_model": "prompt-lookup"}}[setting]
    params = [SamplingParams(max_tokens=24, seed=seed, ignore_eos=True, top_k=30) for seed in range(5)]
    prompts = [list(range(20 + 7 * i, 38 + 9 * i)) for i in range(5)]
    with on_mesh("llama", layout, **settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for seed, out in enumerate(outputs):
            rest = SamplingParams(max_tokens=14, seed=seed, ignore_eos=True, top_k=30)
            assert llm.fork(out, at=10, sampling_params=rest).token_ids == out.token_ids[10:]


def test_fork_without_parameters_takes_the_output_s_with_another_seed(llm):
    out = llm.generate("The house", SamplingParams(max_tokens=12, min_tokens=10, temperature=1.3, seed=3, stop=["zzz"]))
    fork = llm.fork(out, at=4, n=2)
    params = fork.sampling_params
    assert (params.max_tokens, params.min_tokens, params.temperature, params.stop, params.n) == (8, 6, 1.3, ("zzz",), 2)
    assert len({out.outputs[0].seed, *(output.seed for output in fork.outputs)}) == 3
    assert fork.prompt.startswith("The house")
    again = llm.fork(fork, at=2, index=1)
    assert again.prompt_token_ids == fork.prompt_token_ids + fork.outputs[1].token_ids[:2]
    assert again.num_forked_tokens == 6
    assert again.prompt.startswith(fork.prompt)


def test_parameters_of_a_fork_follow_from_the_sample_that_is_forked(llm):
    out = llm.generate("The house", SamplingParams(n=3, max_tokens=20, seed=3, stop=["e"], min_tokens=2))
    lengths = [len(output.token_ids) for output in out.outputs]
    assert len(set(lengths)) > 1
    for index, length in enumerate(lengths):
        assert llm.fork(out, at=-1, index=index).sampling_params.max_tokens == 20 - (length - 1)


def test_log_probabilities_of_a_fork_s_prompt_are_those_of_all_its_tokens(llm):
    out = llm.generate(PROMPT, SamplingParams(max_tokens=6, seed=1, ignore_eos=True, logprobs=0))
    fork = llm.fork(out, at=4, sampling_params=SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert len(fork.prompt_logprobs) == len(fork.prompt_token_ids) == 25
    for mine, theirs, token in zip(fork.prompt_logprobs[21:], out.logprobs, out.token_ids, strict=False):
        assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-5)


def test_prompt_of_a_fork_is_the_text_so_far_with_a_cut_character_marked():
    with LLM(load_golden("gqa").path, tokenizer="byte", **BASE) as llm:
        params = SamplingParams(max_tokens=7, structured={"choice": ["wörter"]}, temperature=0.0)
        out = llm.generate("a", params)
        forks = [llm.fork(out, at=at, sampling_params=params) for at in range(1, 5)]
        assert [fork.prompt for fork in forks] == ["aw", "aw\ufffd", "awö", "awör"]
        assert [fork.text for fork in forks] == ["örter", "rter", "rter", "ter"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"at": 13}, IndexError, r"at must be in -12..12, the text's tokens, got 13"),
        ({"at": -13}, IndexError, "at must be in"),
        ({"at": 0, "index": 1}, IndexError, r"index must be in 0..0"),
        ({"at": "x"}, TypeError, "at must be an int"),
        ({"at": True}, TypeError, "at must be an int"),
        ({"at": 0, "sampling_params": 3}, TypeError, "sampling_params must be SamplingParams"),
        ({"at": 3, "sampling_params": SamplingParams(max_tokens=500)}, ValueError, None),
    ],
)
def test_wrong_forks_are_errors_at_the_call(llm, arguments, error, message):
    out = llm.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
    if message is None:
        assert llm.fork(out, **arguments).finish_reason in ("length", "stop")
        return
    with pytest.raises(error, match=message):
        llm.fork(out, **arguments)
    with pytest.raises(TypeError, match="fork needs the RequestOutput of a generation, got str"):
        llm.fork("text", at=1)
    with pytest.raises(ValueError, match="a fork has no record of its own"):
        llm.fork(out, at=3).record  # noqa: B018
