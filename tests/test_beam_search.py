"""Beam search at the user's door: transformers' texts and scores, on meshes, in a tight pool, beside other requests."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDEN, load_golden
from mesh_tools import on_mesh
from safetensors.numpy import load_file

from jaxinfer import LLM, BeamSearchParams, RequestOutput, SamplingParams
from jaxinfer.checkpoint.directory import read_json

pytestmark = pytest.mark.usefixtures("few_programs")

MATRIX = pytest.mark.matrix
CASES = json.loads((GOLDEN / "beam" / "cases.json").read_text())
MESH_CASES = [case for case in CASES if case["checkpoint"] == "mesh/llama"]
BEAMS = {"max_num_seqs": 6, "max_num_batched_tokens": 16}  # as wide as the widest case
FIELDS = BEAMS | {"max_model_len": 64, "page_size": 8, "num_kv_pages": 64}
TOLERANCE = 1e-3
"""Float32 forward passes, ours and theirs: sums of up to 24 log-probabilities, times a length where it counts so."""


def params_of(case: dict, **fields) -> BeamSearchParams:
    names = ("beam_width", "max_tokens", "length_penalty", "early_stopping", "num_return_sequences")
    wishes = {"stop_token_ids": case["eos"], "ignore_eos": True} | fields
    return BeamSearchParams(**{name: case[name] for name in names}, **wishes)


def search(llm: LLM, cases: list[dict], **fields) -> list[RequestOutput]:
    prompts = [case["prompt"] for case in cases]
    return llm.beam_search(prompts, [params_of(case, **fields) for case in cases], use_tqdm=False)


def assert_equal_to_golden(outputs: list[RequestOutput], cases: list[dict]) -> None:
    for case, output in zip(cases, outputs, strict=True):
        texts = output.outputs
        assert [list(entry.token_ids) for entry in texts] == case["sequences"]
        np.testing.assert_allclose([entry.score for entry in texts], case["scores"], rtol=0, atol=TOLERANCE)
        ends = [tokens[-1] if tokens[-1] in case["eos"] else None for tokens in case["sequences"]]
        assert [entry.finish_reason for entry in texts] == ["length" if end is None else "stop" for end in ends]
        assert [entry.stop_reason for entry in texts] == ends
        assert [entry.index for entry in texts] == list(range(len(texts)))
        assert output.finished


@pytest.mark.parametrize("checkpoint", ["gqa", *(pytest.param(name, marks=MATRIX) for name in ("gemma3", "qwen3"))])
def test_beam_search_golden_cases_equal_transformers(checkpoint):
    cases = [case for case in CASES if case["checkpoint"] == checkpoint]
    with LLM(load_golden(checkpoint).path, **FIELDS) as llm:
        outputs = search(llm, cases)
        assert_equal_to_golden(outputs, cases)
        for output in outputs:
            alone = llm.beam_search(list(output.prompt_token_ids), output.beam_search_params)
            assert [entry.token_ids for entry in alone.outputs] == [entry.token_ids for entry in output.outputs]
            if llm.tokenizer is not None:
                assert_text_is_decoded(llm, output)
        assert llm.stats().kv_pages_used == 0


def assert_text_is_decoded(llm: LLM, output: RequestOutput) -> None:
    """Of prompt and tokens without the end token, less that of the prompt."""
    prompt = list(output.prompt_token_ids)
    for entry in output.outputs:
        tokens = list(entry.token_ids)[: -1 if entry.finish_reason == "stop" else None]
        assert llm.tokenizer.decode(prompt) + entry.text == llm.tokenizer.decode(prompt + tokens)
        assert entry.text == entry.delta != ""


def num_pages(case: dict) -> int:
    """That a search must find room for, if its beams had nothing in common."""
    return case["beam_width"] * -(-(len(case["prompt"]) + case["max_tokens"]) // 8)


TIGHT = {"num_kv_pages": 12, "enable_prefix_caching": False}


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param((1, 1), TIGHT, marks=MATRIX),
        pytest.param((4, 2), {"enable_prefix_caching": False}, marks=MATRIX),
        ((2, 2), {"run_ahead": False}),
        pytest.param((1, 1), {}, marks=MATRIX),
        pytest.param((4, 2), TIGHT, marks=MATRIX),
        pytest.param((2, 4), {"max_num_batched_tokens": 64}, marks=MATRIX),
    ],
    ids=str,
)
def test_beam_search_beside_other_requests_equals_transformers(layout, fields):
    golden = load_golden("mesh/llama")
    cases = [case for case in MESH_CASES if num_pages(case) <= fields.get("num_kv_pages", 64)]
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with on_mesh("llama", layout, **BEAMS | fields) as llm, ThreadPoolExecutor(1) as pool:
        others = pool.submit(llm.generate, golden.prompts, greedy, use_tqdm=False)
        outputs = search(llm, cases, priority=-1)
        assert [list(output.token_ids) for output in others.result()] == [tokens[:20] for tokens in golden.greedy]
        stats = llm.stats()
    assert_equal_to_golden(outputs, cases)
    assert stats.num_preemptions > 0 or "num_kv_pages" not in fields  # others may wait for slots that beams hold
    assert (stats.num_requests_finished, stats.num_requests_running) == (3 + len(cases), 0)
    assert stats.kv_pages_used == 0


@pytest.mark.parametrize("end", [72, [72, 160]])
def test_beam_search_end_tokens_of_the_checkpoint_end_texts(end):
    case = next(case for case in MESH_CASES if case["eos"] == [72, 160])
    path = load_golden("mesh/llama").path
    config = read_json(path / "config.json") | {"eos_token_id": end}
    others = None if isinstance(end, list) else [160]
    with LLM.from_params(config, load_file(path / "model.safetensors"), **FIELDS | TIGHT) as llm:
        (output,) = search(llm, [case], stop_token_ids=others, ignore_eos=False)
    assert [list(entry.token_ids) for entry in output.outputs] == case["sequences"]
    assert {(entry.finish_reason, entry.stop_reason) for entry in output.outputs} == {("stop", None), ("length", None)}


def test_beam_search_of_a_diverged_model_is_aborted_and_the_engine_goes_on():
    path = load_golden("gqa").path
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    with LLM.from_params(read_json(path / "config.json"), weights, **FIELDS) as llm:
        output = llm.beam_search([5, 6], BeamSearchParams(beam_width=2, max_tokens=3))
        assert (output.finish_reason, output.token_ids) == ("abort", ())
        assert llm.generate([5, 6], SamplingParams(max_tokens=2)).finished
        assert llm.stats().kv_pages_used == 0
