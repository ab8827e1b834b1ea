"""dtype="bfloat16" from end to end on the CPU: greedy tokens and log-probabilities against transformers' in float32."""

from conftest import load_golden

from jaxinfer.bench.golden import TOLERANCES, check


def test_generate_greedy_in_bfloat16_equals_transformers_up_to_rounding():
    """Weights stored in bfloat16, so that only activations round.

    Tokens may part where transformers' is nearly as likely as ours; log-probabilities are as near, up to there.
    """
    found = check(load_golden("bf16").path, "bfloat16")
    assert found.num_tokens >= 36  # of 72; seen: all
    assert found.max_margin <= TOLERANCES["bfloat16"]
    assert found.max_logprob_error <= TOLERANCES["bfloat16"]
    assert found.mean_logprob_error > 1e-4  # float32 is within 1e-6: rounding to 8 bits did happen
