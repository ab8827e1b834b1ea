"""Captures and interventions against transformers: its modules' values, and what its hooks make of the same edits.

Everything is compared in a crowd that is chunked, preempted and, in one case, decoded with drafts.
"""

import dataclasses
import functools

import numpy as np
import pytest
from conftest import GOLDEN
from mesh_tools import BASE, layout_name

from jaxinfer import LLM, SamplingParams, intervention

FAMILIES = ["llama", "gemma3", "gpt2", "mixtral"]
LAYOUTS = [(1, 1), (2, 2), (4, 2)]
SETTINGS = {
    "chunks": {},
    "tight pool": {"num_kv_pages": 11},
    "drafts": {"draft_model": "prompt-lookup", "num_draft_tokens": 3},
}
CI = {("llama", (1, 1), "drafts"), ("gemma3", (2, 2), "tight pool")}
ROOM = {"max_num_seqs": 6, "max_num_batched_tokens": 32}
"""Enough for few programs: a request that comes later may need one that does more than those before it."""
TOLERANCE = 1e-4
"""Of float32 arithmetic in another order, relative to the largest value at a site."""


@intervention
def steer(x, context, *, vector):
    return x + vector


@intervention
def unchanged(x, context):
    return x


@intervention
def without_head(x, context, *, head):
    return x.at[head].set(0.0)


@intervention
def scaled(x, context, *, scale):
    return x * scale


@intervention
def shifted(x, context, *, vector):
    return x + vector.reshape(1, -1)[:, : x.size].reshape(x.shape)


def edits_of(found) -> dict:
    """The edits of make_sites.py as interventions."""
    vector = found["vector"]
    return {
        "steer": steer.at("layers.2.residual", tokens=slice(-1, None), vector=vector),
        "head": without_head.at("layers.1.attention.heads", head=3),
        "mlp": scaled.at("layers.3.mlp.output", tokens="prompt", scale=0.5),
        "values": shifted.at("layers.2.attention.values", vector=vector),
    }


@functools.cache
def load(family: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "sites" / f"{family}.npz"))


def cases() -> list:
    """Those of CI are a cover of families, layouts and settings; `pytest -m matrix` runs the others as well."""
    return [
        pytest.param(
            *case,
            id=f"{case[0]}-{layout_name(case[1])}-{case[2]}",
            marks=() if case in CI else pytest.mark.matrix,
        )
        for family in FAMILIES
        for layout in LAYOUTS
        for setting in SETTINGS
        for case in [(family, layout, setting)]
    ]


@pytest.mark.parametrize(("family", "layout", "setting"), cases())
def test_captures_and_interventions_in_a_crowd_equal_transformers(family, layout, setting, few_programs):
    found = load(family)
    sites = [name.removeprefix("at.") for name in found if name.startswith("at.")]
    prompt, edit_prompt = found["prompt"].tolist(), found["edit_prompt"].tolist()
    num_outputs, num_edited = len(found["output"]), len(found["edit.steer"])
    stages, shards = layout
    fields = BASE | ROOM | SETTINGS[setting] | {"pipeline_parallel_size": stages, "tensor_parallel_size": shards}
    greedy = {"temperature": 0.0, "ignore_eos": True}
    captured = SamplingParams(max_tokens=num_outputs, capture=sites, **greedy)
    edited = {
        name: SamplingParams(max_tokens=num_edited, interventions=[edit], logprobs=0, **greedy)
        for name, edit in edits_of(found).items()
    }
    company = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    with LLM(GOLDEN / "mesh" / family, **fields) as llm:
        for site in sites:
            assert llm.sites()[site].dims[:-1] == found[f"at.{site}"].shape[1:-1]
        prompts = [prompt, *[edit_prompt] * len(edited), list(range(40, 70)), edit_prompt, prompt]
        no_op = [unchanged.at("layers.1.mlp.output"), unchanged.at("layers.3.residual")]
        params = [captured, *edited.values(), company, company, dataclasses.replace(captured, interventions=no_op)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        preemptions = llm.stats().num_preemptions
    assert (preemptions > 0) == (setting == "tight pool")
    for out in (outputs[0], outputs[-1]):
        assert out.token_ids == tuple(found["output"])
        assert list(out.captures) == sites
        for site in sites:
            expected = found[f"at.{site}"]
            assert out.captures[site].shape == expected.shape
            scale = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(out.captures[site] / scale, expected / scale, atol=TOLERANCE, err_msg=site)
    for name, out in zip(edited, outputs[1:], strict=False):
        assert out.token_ids == tuple(found[f"edit.{name}"]), name
        logprobs = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
        np.testing.assert_allclose(logprobs, found[f"edit_logprobs.{name}"], atol=TOLERANCE)
