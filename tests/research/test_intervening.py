"""Interventions of requests beside requests without any, and the errors of wrong ones."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden

from jaxinfer import LLM, RequestFailedError, SamplingParams, intervention
from jaxinfer.research import ablate, add, patch, scale

BASE = {"max_model_len": 96, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 32}
PROMPT = list(range(20, 43))
SITE = "layers.0.residual"
VECTOR = np.random.default_rng(0).standard_normal(48).astype(np.float32)


@pytest.fixture(scope="module")
def llm():
    with LLM(load_golden("gqa").path, **BASE) as llm:
        yield llm


def params(*interventions, **fields) -> SamplingParams:
    plain = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, "logprobs": 3}
    return SamplingParams(**plain | fields, interventions=interventions or None)


def logprobs(out) -> list[float]:
    return [entry.logprob for found in out.logprobs for entry in found.values()]


@intervention
def unchanged(x, context):
    return x


def test_plain_requests_beside_changed_ones_are_bit_identical_to_a_run_of_plain_ones(llm):
    prompts = [PROMPT, PROMPT[3:], PROMPT[:11], PROMPT[::-1]]
    plain = llm.generate(prompts, params())
    steered = params(add.at("layers.*.residual", vector=VECTOR))
    mixed = llm.generate(prompts, [steered, params(), steered, params()])
    for index in (1, 3):
        assert mixed[index].token_ids == plain[index].token_ids
        assert logprobs(mixed[index]) == logprobs(plain[index])
    for index in (0, 2):
        assert logprobs(mixed[index]) != logprobs(plain[index])


def test_intervention_that_changes_nothing_is_bit_identical(llm):
    plain, same = llm.generate([PROMPT, PROMPT], [params(), params(unchanged.at("layers.*.mlp.output"))])
    assert same.token_ids == plain.token_ids
    assert logprobs(same) == pytest.approx(logprobs(plain), abs=1e-5)


def test_requests_with_different_vectors_and_windows_share_one_program(llm):
    for factor in (1, 2):  # the second time, the prompt comes from the prefix cache
        vectors = [factor * i * VECTOR for i in range(4)]
        llm.generate([PROMPT] * 4, [params(add.at(SITE, vector=vector, tokens="generated")) for vector in vectors])
    before = llm.stats().num_compilations
    steps = [params(add.at(SITE, vector=VECTOR - i, tokens="generated"), seed=i) for i in range(4)]
    crowd = llm.generate([PROMPT] * 4, steps)
    assert llm.stats().num_compilations == before
    for step, out in zip(steps, crowd, strict=True):
        assert llm.generate(PROMPT, step).token_ids == out.token_ids


def test_tokens_of_an_intervention_are_the_only_ones_that_change(llm):
    base = llm.generate(PROMPT, params(capture=[SITE], max_tokens=0)).captures[SITE]
    for tokens, chosen in (("last", slice(22, 23)), (slice(3, 9), slice(3, 9)), ("prompt", slice(0, 23))):
        found = llm.generate(
            PROMPT, params(add.at(SITE, vector=VECTOR, tokens=tokens), capture=[SITE], max_tokens=0)
        ).captures[SITE]
        expected = base.copy()
        expected[chosen] += VECTOR
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tokens_may_end_beyond_any_text(llm):
    found, expected = (
        llm.generate(PROMPT, params(add.at(SITE, vector=VECTOR, tokens=slice(3, stop)))) for stop in (sys.maxsize, None)
    )
    assert found.token_ids == expected.token_ids


def test_interventions_at_one_site_are_called_in_the_order_given(llm):
    base = llm.generate(PROMPT, params(capture=[SITE], max_tokens=0)).captures[SITE]
    twice, shift = scale.at(SITE, factor=2.0), add.at(SITE, vector=VECTOR)
    for order, expected in (((twice, shift), 2 * base + VECTOR), ((shift, twice), 2 * (base + VECTOR))):
        found = llm.generate(PROMPT, params(*order, capture=[SITE], max_tokens=0)).captures[SITE]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_patched_captures_of_one_prompt_carry_its_answer_over_to_another(llm):
    other = PROMPT[::-1]
    source = llm.generate(other, params(capture=["layers.1.residual"])).captures["layers.1.residual"]
    expected = llm.generate(other, params(max_tokens=1))
    patched = llm.generate(PROMPT, params(patch.at("layers.1.residual", source=source[:23]), max_tokens=1))
    assert patched.token_ids == expected.token_ids
    assert logprobs(patched) == pytest.approx(logprobs(expected), abs=1e-4)


def test_source_of_a_patch_must_be_values_of_tokens(llm):
    source = np.ones((4, 48))
    for given, message in (
        ({"source": source[0]}, r"source must be \[tokens, \.\.\.\] of values like x"),
        ({"source": source[:0]}, "must have an axis of tokens with at least one"),
        ({"source": source, "mask": [True, False]}, "must have equally many tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate(PROMPT, params(patch.at(SITE, **given)))


def test_function_that_no_program_can_have_is_an_error_at_the_call(llm):
    @intervention
    def calls_python(x, context):
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(ValueError, match=r"calls_python at layers\.0\.residual.* cannot be traced"):
        llm.generate(PROMPT, params(calls_python.at(SITE)))
    assert llm.generate(PROMPT, params()).finish_reason == "length"


def test_model_that_interventions_drive_to_nan_fails_the_request(llm):
    plain = llm.generate(PROMPT, params()).token_ids
    huge = add.at("layers.0.mlp.input", vector=np.full(48, 3e38))
    with pytest.raises(RequestFailedError, match="the interventions drive the model to NaN or infinity, first at"):
        llm.generate([PROMPT, PROMPT], [params(), params(huge)])
    assert llm.generate(PROMPT, params()).token_ids == plain


def test_function_sees_position_prompt_and_layer(llm):
    @intervention
    def written(x, context):
        numbers = jnp.stack([context.position, context.prompt_len, context.layer]).astype(x.dtype)
        return jnp.zeros_like(x).at[:3].set(numbers)

    out = llm.generate(PROMPT[:5], params(written.at("layers.1.residual"), capture=["layers.1.residual"]))
    found = out.captures["layers.1.residual"]
    np.testing.assert_array_equal(found[:, :4], [[position, 5, 1, 0] for position in range(10)])


def test_pages_that_an_intervention_changed_are_not_shared_those_in_front_of_it_are(llm):
    prompt = list(range(100, 146))
    steered = params(add.at(SITE, vector=VECTOR))
    first = llm.generate(prompt, steered)
    assert llm.generate(prompt, steered).num_cached_tokens == 0
    plain = llm.generate(prompt, params())
    assert (plain.num_cached_tokens, first.num_cached_tokens) == (0, 0)
    assert llm.generate(prompt, params()).num_cached_tokens == 40
    late = params(add.at(SITE, vector=VECTOR, tokens=slice(17, None)))
    assert llm.generate(prompt, late).num_cached_tokens == 16
    assert llm.generate(prompt, late).token_ids != plain.token_ids


def test_samples_of_a_changed_request_share_its_prompt(llm):
    out = llm.generate(PROMPT, params(add.at(SITE, vector=VECTOR), n=4, temperature=1.0, seed=5))
    for output in out.outputs:
        alone = params(add.at(SITE, vector=VECTOR), temperature=1.0, seed=output.seed)
        assert llm.generate(PROMPT, alone).token_ids == output.token_ids


def test_ablated_head_is_what_its_capture_shows(llm):
    site = "layers.1.attention.heads"
    found = llm.generate(PROMPT, params(ablate.at(site, index=[0, 3]), capture=[site])).captures[site]
    assert not found[:, [0, 3]].any()
    assert found[:, [1, 2]].all()


@intervention
def branching(x, context, *, limit):
    return x if x[0] > limit else -x


@intervention
def shrinking(x, context):
    return x[1:]


@intervention
def unknown_to_xla(x, context):
    return jax.ffi.ffi_call("no such kernel", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="broadcast_all")(x)


@intervention
def split(x, context):
    return x, x


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (
            branching.at(SITE, limit=0.0),
            "branching at layers.0.residual, for x of shape .*cannot be traced.*TracerBool",
        ),
        (shrinking.at(SITE), r"shrinking at layers.0.residual must return a value of x's shape \(48,\), got \(47,\)"),
        (unknown_to_xla.at(SITE), "unknown_to_xla at .* cannot be compiled: .*no such kernel"),
        (split.at(SITE), "split at layers.0.residual must return one array, got tuple"),
        (add.at(SITE, vector=VECTOR[:5]), "intervention add at layers.0.residual, for x.* cannot be traced.*(5,)"),
        (add.at("layers.0.residul", vector=VECTOR), "did you mean 'layers.0.residual'"),
        (add.at("logits", vector=np.zeros(320)), "values at this site can be captured, not changed"),
        (scale.at("layers.0.attention.probs", factor=1.0), "can be captured, not changed; use attention.heads"),
        (patch.at(SITE, source=1.0), "source of intervention patch must have an axis of tokens"),
    ],
)
def test_intervention_that_cannot_be_part_of_the_program_is_one_error_and_the_engine_goes_on(llm, bound, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPT, PROMPT], [params(), params(bound)])
    assert llm.generate(PROMPT, params()).finish_reason == "length"


def test_value_that_is_not_finite_fails_its_request_alone(llm):
    @intervention
    def inverse(x, context, *, number):
        return x / (context.position - number)

    plain = llm.generate([PROMPT, PROMPT[2:]], params())
    stream = llm.stream(PROMPT, params(inverse.at(SITE, number=25), max_tokens=20))
    others = llm.generate([PROMPT, PROMPT[2:]], params())
    with pytest.raises(RequestFailedError, match=r"inverse at layers.0.residual gave NaN or infinity at position 25"):
        list(stream)
    with pytest.raises(RequestFailedError, match="at position 7"):
        llm.generate(PROMPT, params(inverse.at(SITE, number=7)))
    for before, after in zip(plain, others, strict=True):
        assert before.token_ids == after.token_ids
        assert logprobs(before) == pytest.approx(logprobs(after), abs=1e-5)
    assert [out.token_ids for out in llm.generate([PROMPT, PROMPT[2:]], params())] == [o.token_ids for o in plain]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: add.at(SITE, vectr=VECTOR), TypeError, "unknown argument 'vectr'; did you mean 'vector'"),
        (lambda: add.at(SITE), TypeError, "intervention add needs vector"),
        (lambda: add.at(SITE, vector=VECTOR * np.nan), ValueError, "vector of intervention add must be finite"),
        (lambda: add.at(SITE, vector=VECTOR.astype(np.float64) * 1e300), ValueError, "must be finite in float32"),
        (lambda: ablate.at(SITE, index=2**40), ValueError, r"index of intervention ablate must be in -2\*\*31"),
        (lambda: add.at(None, vector=VECTOR), TypeError, r"site must be a name or pattern from llm\.sites"),
        (lambda: add.at(SITE, vector="up"), TypeError, "vector of intervention add must be numbers"),
        (
            lambda: add.at(SITE, vector=VECTOR, tokens="some"),
            ValueError,
            "tokens must be a slice or one of all, prompt",
        ),
        (lambda: intervention(lambda x: x), TypeError, "expected a function"),
        (lambda: intervention(lambda x, context, scale: x), TypeError, r"put a \* in front of the parameters"),
        (lambda: intervention(lambda x, context, *, tokens: x), TypeError, "cannot be called tokens"),
        (lambda: params(add), TypeError, "interventions must be a sequence of what Intervention.at returns"),
        (lambda: add.with_constants(vector=VECTOR).at(SITE, vector=VECTOR), TypeError, "is a constant already"),
    ],
)
def test_wrong_use_is_an_error_where_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_output_with_interventions_has_no_record(llm):
    with pytest.raises(ValueError, match="they cannot be written down"):
        llm.generate(PROMPT, params(add.at(SITE, vector=VECTOR))).record  # noqa: B018


def test_program_of_a_plain_step_knows_nothing_of_taps(llm):
    """The compiled text, save the names of source lines, is that of a wrapper that has never had a tap."""
    llm.generate([PROMPT, PROMPT], [params(), params(add.at(SITE, vector=VECTOR))])
    wrapper = llm._loaded.wrapper
    shape = wrapper.shapes.all_shapes()[0]
    text = wrapper.compiled("forward", shape).as_text()
    assert "tap layers" not in text
    keys = [key for key in wrapper._programs._programs if key[0] == "tapped"]
    assert keys
    assert "tap layers.0.residual" in wrapper._programs.get(*keys[0]).as_text()
    num_tapped = len(keys)
    llm.generate([PROMPT, PROMPT[2:]], params())
    assert len([key for key in wrapper._programs._programs if key[0] == "tapped"]) == num_tapped
