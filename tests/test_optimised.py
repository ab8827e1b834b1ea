"""Programs that XLA optimises, as users run them; all other tests compile without optimisation (conftest.py)."""

import pytest
from conftest import GOLDEN
from processes import run_python

# Attention over everything; and in the matrix experts, and attention in windows with norms of queries and keys.
CASES = [("gqa",), pytest.param(("mixtral", "gemma3"), marks=pytest.mark.matrix)]
SCRIPT = """
import sys
import numpy as np
from jaxinfer import LLM, SamplingParams

params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
for path in sys.argv[1:]:
    expected = np.load(f"{path}/expected.npz")
    prompts = [expected[f"prompt_{i}"].tolist() for i in range(3)]
    with LLM(path, max_num_seqs=1, page_size=8, num_kv_pages=64, max_num_batched_tokens=16) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for number, output in enumerate(outputs):
        assert list(output.token_ids) == expected[f"greedy_{number}"].tolist(), (path, number)
        logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        np.testing.assert_allclose(logprobs, expected[f"logprobs_{number}"], atol=2e-4, err_msg=path)
    print(path)
"""


@pytest.mark.parametrize("cases", CASES, ids="-".join)
def test_golden_cases_with_optimisation_equal_transformers(cases):
    """In a process of its own, since XLA reads its flags once."""
    paths = [str(GOLDEN / case) for case in cases]
    assert run_python(SCRIPT, *paths, XLA_FLAGS="").split() == paths
