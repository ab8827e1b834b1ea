"""logprob_fn: equal to what the engine scores, and its gradients to finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import layout_name, on_mesh

import jaxinfer
from jaxinfer import LLM

LAYOUTS = [(1, 1), (2, 2), (4, 2)]
MODELS = ["llama", "gemma3", "gpt2", "mixtral"]
CI = {("gpt2", (4, 2))}
TOKENS = np.random.default_rng(0).integers(3, 301, (2, 15)).astype(np.int32)


def cases() -> list:
    return [
        pytest.param(
            model,
            layout,
            id=f"{model}-{layout_name(layout)}",
            marks=() if (model, layout) in CI else pytest.mark.matrix,
        )
        for model in MODELS
        for layout in LAYOUTS
    ]


def weighted_sum(logprobs):
    """A loss that treats every token differently."""
    return (logprobs * jnp.cos(jnp.arange(logprobs.size).reshape(logprobs.shape))).sum()


def dot(first, second) -> float:
    return float(sum(jnp.vdot(*pair) for pair in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)))


@pytest.mark.parametrize(("model", "layout"), cases())
def test_logprobs_equal_scores_and_gradients_equal_finite_differences(model, layout):
    with on_mesh(model, layout) as llm:
        logprobs = jaxinfer.logprob_fn(llm)
        found = logprobs(llm.params, TOKENS)
        for row, tokens in zip(found, TOKENS.tolist(), strict=True):
            scored = llm.score(tokens).prompt_logprobs
            expected = [entry[token].logprob for token, entry in zip(tokens[1:], scored[1:], strict=True)]
            np.testing.assert_allclose(row, expected, atol=2e-5)

        def loss(weights):
            return weighted_sum(logprobs(weights, TOKENS))

        params = llm.params
        gradients = jax.grad(loss)(params)
        rng = np.random.default_rng(1)
        direction = jax.tree.map(
            lambda x: jax.device_put(rng.standard_normal(x.shape).astype(np.float32), x.sharding) * (x != 0), params
        )
        value, slope = jax.jvp(loss, (params,), (direction,))
        assert float(value) == pytest.approx(float(loss(params)), rel=1e-6)
        assert dot(gradients, direction) == pytest.approx(float(slope), rel=1e-4)

        def moved(by: float):
            return jax.tree.map(lambda x, d: x + by * d, params, direction)

        # A long step bends, and lets tokens change their experts; a short one drowns in rounding.
        steps = (1e-3, 3e-4, 1e-4, 3e-5)
        differences = [(float(loss(moved(step))) - float(loss(moved(-step)))) / (2 * step) for step in steps]
        assert min(abs(difference / float(slope) - 1) for difference in differences) < 0.01


@pytest.mark.matrix
@pytest.mark.parametrize("layout", [(2, 2), (4, 2)])
def test_gradients_on_a_mesh_are_those_of_one_device(layout, tmp_path):
    """Compared as checkpoint tensors: the gradients, put in the place of weights, are exported."""
    from safetensors.numpy import load_file

    exported = []
    for number, sizes in enumerate([(1, 1), layout]):
        with on_mesh("gpt2", sizes) as llm:
            logprobs = jaxinfer.logprob_fn(llm)
            llm.update_weights(jax.grad(lambda weights, f=logprobs: weighted_sum(f(weights, TOKENS)))(llm.params))
            llm.export(tmp_path / str(number))
        exported.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    for name, expected in exported[0].items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(exported[1][name] / scale, expected / scale, atol=1e-4, err_msg=name)


def test_gradient_of_layers_that_only_pad_a_stage_is_zero():
    with on_mesh("gpt2", (3, 1)) as llm:  # four layers on three stages: the last one is empty
        logprobs = jaxinfer.logprob_fn(llm)
        gradients = jax.grad(lambda weights: weighted_sum(logprobs(weights, TOKENS)))(llm.params)
        for layer in ("0", "1"):
            assert not any(np.asarray(leaf)[2].any() for leaf in jax.tree.leaves(gradients["layers"][layer]))
            assert all(np.asarray(leaf)[1].any() for leaf in jax.tree.leaves(gradients["layers"][layer]))


def test_wrong_arguments_are_errors():
    with on_mesh("llama", (1, 4)) as llm, pytest.raises(ValueError, match=r"tensor_parallel_size <= 2"):
        jaxinfer.logprob_fn(llm)
    with LLM(load_golden("gqa").path, max_model_len=32, num_kv_pages=4) as llm:
        logprobs = jaxinfer.logprob_fn(llm)
        wrong = [np.zeros(dims, np.int32) for dims in [(5,), (1, 1), (1, 34)]] + [np.zeros((1, 5), np.float32)]
        for tokens in wrong:
            with pytest.raises(ValueError, match=r"integers of shape \[texts, tokens\], 2 to 33 tokens, got"):
                logprobs(llm.params, tokens)
        for token in (-1, 320):
            with pytest.raises(ValueError, match=r"tokens must be in 0\.\.319"):
                logprobs(llm.params, np.full((1, 5), token))
        shorter = llm.params | {"norm": {"weight": jnp.ones(3)}}
        with pytest.raises(ValueError, match=r"weights norm\.weight must have shape \[48\], got \[3\]"):
            logprobs(shorter, np.zeros((1, 5), np.int32))
        with pytest.raises(ValueError, match=r"embedding\.weight is in only one of them"):
            logprobs({"norm": llm.params["norm"]}, TOKENS)
