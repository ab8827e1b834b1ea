"""The user's logits processors and samplers: against the engine's own, on meshes, beside other requests, and wrong."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import BASE as MESH_BASE
from mesh_tools import VOCAB_SIZE, layout_name, on_mesh

from jaxinfer import LLM, RequestFailedError, SamplingParams, logits_processor, sampler

BASE = {"max_model_len": 96, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 32}
PROMPT = list(range(20, 43))


@logits_processor
def biased(logits, context, *, bias):
    return logits + bias[jnp.minimum(context.token_ids, bias.shape[0] - 1)]


@logits_processor
def less_frequent(logits, context, *, penalty):
    return logits - penalty * context.output_counts


@logits_processor
def typical(logits, context, *, mass):
    """Tokens whose surprise is nearest to the entropy, up to a mass of 0.5: it needs every reduction."""
    logprobs = logits - context.logsumexp(logits)
    kept = jnp.where(logits == -jnp.inf, 0.0, logprobs)
    entropy = -context.sum(jnp.exp(logprobs) * kept)
    distance = jnp.where(logits == -jnp.inf, jnp.inf, jnp.abs(-kept - entropy))
    near, ids = context.top_k(-distance, 16)
    masses = jnp.cumsum(jnp.exp(context.gather(logprobs, ids)))
    limit = -near[jnp.minimum(jnp.searchsorted(masses, mass), 15)]
    return jnp.where(distance <= limit, logits + 0 * context.max(kept), -jnp.inf)


@sampler
def tempered(logits, context, *, temperature):
    return logits / temperature + context.gumbel


@pytest.fixture(scope="module")
def llm():
    with LLM(load_golden("gqa").path, **BASE) as llm:
        yield llm


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "seed": 3, "logprobs": 1} | fields)


BIAS = np.random.default_rng(0).normal(size=320).astype(np.float32) * 2
PAIRS = {
    "bias": (
        {"logits_processors": [biased.using(bias=BIAS)]},
        {"logit_bias": {token: float(bias) for token, bias in enumerate(BIAS)}},
    ),
    "penalty": (
        {"logits_processors": [less_frequent.using(penalty=2.0)], "temperature": 0.5, "max_tokens": 64},
        {"frequency_penalty": 2.0, "temperature": 0.5, "max_tokens": 64},
    ),
    "sampler": ({"sampler": tempered.using(temperature=3.0)}, {"temperature": 3.0}),
    "greedy": ({"logits_processors": [biased.using(bias=0 * BIAS)], "temperature": 0.0}, {"temperature": 0.0}),
    "with edits": (
        {"logits_processors": [biased.using(bias=BIAS)], "presence_penalty": 1.0, "top_p": 0.8},
        {"logit_bias": dict(enumerate(BIAS.tolist())), "presence_penalty": 1.0, "top_p": 0.8},
    ),
    "structured": (
        {"sampler": tempered.using(temperature=0.8), "structured": {"regex": "[a-d ]{40}"}},
        {"temperature": 0.8, "structured": {"regex": "[a-d ]{40}"}},
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_functions_that_do_what_the_engine_can_give_the_same_tokens(llm, kind):
    own, engine = PAIRS[kind]
    prompt = "The house" if kind == "structured" else PROMPT
    mine, theirs, plain = llm.generate([prompt] * 3, [params(**own), params(**engine), params()])
    assert mine.token_ids == theirs.token_ids
    assert llm.generate(prompt, params()).token_ids == plain.token_ids
    if kind != "greedy":
        assert mine.token_ids != plain.token_ids
    for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
        assert {t: e.logprob for t, e in a.items()} == pytest.approx({t: e.logprob for t, e in b.items()}, abs=1e-5)


def run(llm: LLM) -> list[tuple[int, ...]]:
    bias = np.random.default_rng(1).normal(size=VOCAB_SIZE).astype(np.float32)
    kinds = [
        {"logits_processors": [typical.using(mass=0.5)]},
        {"logits_processors": [biased.using(bias=bias), typical.using(mass=0.3)], "temperature": 1.3},
        {"sampler": tempered.using(temperature=1.1), "logits_processors": [less_frequent.using(penalty=2.0)]},
        {},
    ]
    prompts = [list(range(20 + i, 44 + 2 * i)) for i in range(8)]
    asked = [params(**kinds[i % 4] | {"seed": i}) for i in range(8)]
    return [out.token_ids for out in llm.generate(prompts, asked, use_tqdm=False)]


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param((2, 2), {"num_kv_pages": 14}, marks=pytest.mark.matrix),
        ((1, 2), {}),
        pytest.param((4, 2), {}, marks=pytest.mark.matrix),
        pytest.param((1, 4), {"draft_model": "prompt-lookup"}, marks=pytest.mark.matrix),
    ],
    ids=lambda value: layout_name(value) if isinstance(value, tuple) else "",
)
def test_functions_see_the_whole_vocabulary_on_every_mesh(layout, fields, few_programs):
    with on_mesh("llama", (1, 1)) as llm:
        expected = run(llm)
    with on_mesh("llama", layout, **fields) as llm:
        assert run(llm) == expected
    assert MESH_BASE["max_num_seqs"] == 4  # half of the requests wait


def test_typical_sampling_keeps_what_numpy_keeps(llm):
    asked = params(logits_processors=[typical.using(mass=0.4)], capture=["logits"], capture_tokens=slice(-1, None))
    out = llm.generate(PROMPT, asked)
    for logits, token in zip(out.captures["logits"].astype(np.float64), out.token_ids, strict=True):
        logprobs = logits - np.logaddexp.reduce(logits)
        distance = np.abs(-logprobs + (np.exp(logprobs) * logprobs).sum())
        order = np.argsort(distance)
        count = min(int(np.searchsorted(np.cumsum(np.exp(logprobs[order])), 0.4)) + 1, 16)
        assert token in order[:count]


def test_requests_with_different_parameters_share_one_program(llm):
    counts = []
    for scale in (1, 2, 3):  # from the second call on, the prompt comes from the prefix cache
        asked = [params(logits_processors=[less_frequent.using(penalty=i * scale)]) for i in range(4)]
        llm.generate([PROMPT] * 4, asked)
        counts.append(llm.stats().num_compilations)
    assert counts[1] == counts[2]


def test_outputs_are_counted_after_preemption_and_in_forks():
    never_again = params(logits_processors=[less_frequent.using(penalty=1e6)], temperature=0.0, max_tokens=40)
    with LLM(load_golden("gqa").path, **BASE | {"num_kv_pages": 12}) as llm:
        outputs = llm.generate([PROMPT, PROMPT[2:], PROMPT[4:]], never_again)
        assert llm.stats().num_preemptions > 0
        for out in outputs:
            assert len(set(out.token_ids)) == 40
        fork = llm.fork(outputs[0], at=15, sampling_params=dataclasses.replace(never_again, max_tokens=25))
        assert fork.token_ids == outputs[0].token_ids[15:]


def test_masked_tokens_stay_masked(llm):
    @logits_processor
    def flat(logits, context):
        return jnp.zeros_like(logits)

    out = llm.generate(PROMPT, params(logits_processors=[flat.using()], allowed_token_ids=[5, 9, 11], max_tokens=30))
    assert set(out.token_ids) == {5, 9, 11}


@logits_processor
def shorter(logits, context):
    return logits[1:]


@logits_processor
def branching(logits, context):
    return logits if logits[0] > 0 else -logits


@logits_processor
def nothing_left(logits, context, *, position):
    return jnp.where(context.position == position, -jnp.inf, logits)


@sampler
def undefined(logits, context):
    return logits * jnp.nan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logits_processors": [shorter.using()]}, r"processor shorter must return an array of the logits' shape"),
        ({"logits_processors": [branching.using()]}, "logits processor branching cannot be traced: TracerBool"),
        ({"logits_processors": [tempered.using(temperature=1)]}, "must be logits processors, got sampler tempered"),
    ],
)
def test_wrong_function_is_one_error_at_the_call(llm, fields, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPT, params(**fields))
    with pytest.raises(TypeError, match=r"sampler must be what a sampler's using\(\) returns"):
        params(sampler=biased.using(bias=BIAS))
    with pytest.raises(TypeError, match="sampler tempered needs temperature"):
        tempered.using()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"logits_processors": [nothing_left.using(position=26)]},
            "nothing_left gave NaN or infinity, or left no token",
        ),
        ({"sampler": undefined.using()}, "sampler undefined gave NaN or infinity, or left no token, at position 23"),
    ],
)
def test_result_that_cannot_be_used_fails_its_request_alone(llm, fields, message):
    expected = llm.generate(PROMPT[4:], params()).token_ids
    stream = llm.stream(PROMPT[4:], params())
    with pytest.raises(RequestFailedError, match=message):
        llm.generate(PROMPT, params(**fields))
    assert list(stream)[-1].token_ids == expected
