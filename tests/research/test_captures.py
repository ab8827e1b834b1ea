"""What a request captures, and what it costs others: nothing."""

import numpy as np
import pytest
from conftest import load_golden

from jaxinfer import LLM, SamplingParams
from jaxinfer.research import add

BASE = {"max_model_len": 96, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 32}
PROMPT = list(range(20, 43))
SITE = "layers.1.residual"


@pytest.fixture(scope="module")
def llm():
    with LLM(load_golden("gqa").path, **BASE) as llm:
        yield llm


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, "capture": [SITE]} | fields)


@pytest.fixture(scope="module")
def everything(llm) -> np.ndarray:
    return llm.generate(PROMPT, params()).captures[SITE]


@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [
        ("all", slice(0, 28)),
        ("prompt", slice(0, 23)),
        ("last", slice(22, 23)),
        ("generated", slice(23, 28)),
        (slice(3, 9), slice(3, 9)),
        (slice(-2, None), slice(21, 28)),
        (slice(40, 50), slice(28, 28)),
    ],
)
def test_capture_tokens_are_those_that_went_through_the_model(llm, everything, tokens, chosen):
    assert everything.shape == (28, 48)
    found = llm.generate(PROMPT, params(capture_tokens=tokens)).captures[SITE]
    np.testing.assert_allclose(found, everything[chosen], atol=1e-5)


def test_capture_without_new_tokens_is_of_the_prompt(llm, everything):
    out = llm.generate(PROMPT, params(max_tokens=0))
    assert out.token_ids == ()
    np.testing.assert_allclose(out.captures[SITE], everything[:23], atol=1e-5)


def test_capture_ends_with_the_text_that_a_stop_token_ends(llm, everything):
    tokens = llm.generate(PROMPT, params()).token_ids
    out = llm.generate(PROMPT, params(stop_token_ids=[tokens[2]]))
    assert out.token_ids == tokens[:3]
    np.testing.assert_allclose(out.captures[SITE], everything[:25], atol=1e-5)


def test_captured_prompt_is_not_read_from_the_prefix_cache_but_output_alone_is(llm, everything):
    first = llm.generate(PROMPT, params(capture=None))
    assert llm.generate(PROMPT, params(capture=None)).num_cached_tokens == 16
    again = llm.generate(PROMPT, params())
    assert (again.num_cached_tokens, again.token_ids) == (0, first.token_ids)
    assert llm.generate(PROMPT, params(capture_tokens=slice(9, 12))).num_cached_tokens == 8
    assert llm.generate(PROMPT, params(capture_tokens="generated")).num_cached_tokens == 16


def test_capture_of_several_samples_has_the_prompt_in_each(llm):
    sites = [SITE, "layers.0.attention.probs", "logits"]
    asked = params(n=3, temperature=1.0, seed=3, capture=sites)
    out = llm.generate(PROMPT, asked)
    for output in out.outputs:
        alone = llm.generate(
            [*PROMPT, *output.token_ids[:-1]], params(max_tokens=0, capture=sites, capture_tokens="prompt")
        )
        for site in sites:
            np.testing.assert_allclose(output.captures[site], alone.captures[site], atol=1e-4, err_msg=site)


def test_captures_of_a_stream_come_with_the_finished_output(llm, everything):
    *growing, last = llm.stream(PROMPT, params())
    assert all(out.captures is None for out in growing)
    np.testing.assert_allclose(last.captures[SITE], everything, atol=1e-5)


def test_captured_attention_weights_are_causal_and_sum_to_one(llm):
    weights = llm.generate(PROMPT, params(capture=["layers.0.attention.probs"])).captures["layers.0.attention.probs"]
    assert weights.shape == (28, 4, 28)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(weights.swapaxes(0, 1), 1).any()


def test_captured_logits_are_those_that_were_sampled_from(llm):
    out = llm.generate(PROMPT, params(capture=["logits"], capture_tokens=slice(-1, None), logprobs=0))
    logits = out.captures["logits"].astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert logits.argmax(1).tolist() == list(out.token_ids)
    found = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
    np.testing.assert_allclose(found, logprobs[np.arange(6), list(out.token_ids)], atol=1e-5)


def test_sites_are_listed_with_shapes_and_found_by_pattern(llm):
    sites = llm.sites()
    assert sites["layers.1.attention.keys"].dims == (2, 12)
    assert sites["logits"].dims == (320,)
    assert [site.name for site in sites.find("layers.*.residual")] == ["layers.0.residual", "layers.1.residual"]
    assert next(iter(sites)) == "embedding"
    assert list(sites)[-2:] == ["final_norm", "logits"]
    assert "layers.1.attention.keys     2 x 12  float32" in repr(sites)
    assert "<td>2 x 12</td>" in sites._repr_html_()


def test_captures_of_other_samples_come_whole_or_not_at_all(llm):
    asked = params(n=2, temperature=1.0, seed=3, stop_token_ids=list(range(300)), min_tokens=1)
    for out in llm.stream(PROMPT, asked):
        shapes = [None if output.captures is None else len(output.captures[SITE]) for output in out.outputs]
        assert all(
            length is None or length == 23 + len(output.token_ids) - 1
            for length, output in zip(shapes, out.outputs, strict=True)
        )
    assert None not in shapes
    prompt_only = llm.generate(PROMPT, params(n=3, max_tokens=0))
    first, *others = (output.captures[SITE] for output in prompt_only.outputs)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.matrix
def test_taps_with_gpu_kernels_equal_those_without():
    found = []
    for backend in ("xla", "pallas"):
        with LLM(load_golden("gqa").path, **BASE, attention_backend=backend) as llm:
            sites = ["embedding", "layers.*.*.*", "layers.*.residual", "final_norm"]
            edits = [add.at(f"layers.{site}", vector=np.ones(48)) for site in ("0.residual", "1.mlp.output")]
            asked = [params(capture=sites, interventions=edits), params(capture=None)]
            found.append(llm.generate([PROMPT, PROMPT[4:]], asked, use_tqdm=False))
    for plain, fused in zip(*found, strict=True):
        assert plain.token_ids == fused.token_ids
    for site, values in found[0][0].captures.items():
        np.testing.assert_allclose(found[1][0].captures[site], values, atol=1e-4, err_msg=site)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capture": ["layers.1.resid"]}, "did you mean 'layers.1.residual'"),
        ({"capture": ["layers.7.residual"]}, "the model has layers 0..1"),
        ({"capture": ["layers.*.probs"]}, "no site 'layers.\\*.probs'; did you mean"),
    ],
)
def test_capture_of_an_unknown_site_is_an_error_that_names_the_nearest(llm, fields, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPT, params(**fields))
    assert llm.generate(PROMPT, params()).finish_reason == "length"


@pytest.mark.parametrize("value", ["first", slice(None, None, 2), 3, slice(1.5, None), slice(True, None)])
def test_capture_tokens_of_another_kind_are_an_error(value):
    with pytest.raises((TypeError, ValueError), match="capture_tokens must be a slice"):
        params(capture_tokens=value)


def test_capture_of_too_much_is_refused_with_the_knobs_to_turn():
    with LLM(load_golden("gqa").path, **BASE, max_research_bytes=30_000) as llm:
        with pytest.raises(ValueError, match=r"a step could take .*max_num_batched_tokens or raise max_research_bytes"):
            llm.generate(PROMPT, params(capture=["layers.*.attention.*"]))
        assert llm.generate(PROMPT, params()).captures[SITE].shape == (28, 48)
        with pytest.raises(ValueError, match=r"captures could take .*the limit of a call.*fewer prompts a call"):
            llm.generate([PROMPT] * 20, params())
        with pytest.raises(ValueError, match=r"the parameters take .*lower max_num_seqs"):
            llm.generate(PROMPT, params(interventions=[add.at(SITE, vector=np.zeros((40, 48)))]))
        assert len(llm.generate([PROMPT] * 5, params())) == 5


def test_output_with_captures_compares_and_converts_as_one_without(llm):
    plain, captured = llm.generate([PROMPT, PROMPT], [params(capture=None), params()])
    assert plain.outputs[0].token_ids == captured.outputs[0].token_ids
    assert "captures" not in captured.as_dict()["outputs"][0]
    assert captured.record.sampling_params.capture is None
