"""The comparisons pass where kernels are right, and see a kernel that is wrong."""

import jax.numpy as jnp
import pytest

from jaxinfer.bench import kernels, step_kernels
from jaxinfer.bench.step_kernels import comparisons

# Pallas' interpreter takes seconds to compile what tests/layers and tests/sampling have in CI as well.
CASES = [
    pytest.param(
        entry,
        marks=() if entry.case == "addition and norm" else pytest.mark.matrix,
        id=f"{entry.case}-{entry.dtype}",
    )
    for entry in comparisons()
]


@pytest.mark.parametrize("comparison", CASES)
def test_comparison_of_a_right_kernel_is_within_its_tolerance(comparison):
    assert 0 <= comparison.error() <= comparison.tolerance


def test_measure_names_what_is_wrong_and_what_fails(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(step_kernels, "add_norm", lambda x, *arguments: (jnp.zeros(x.shape), jnp.zeros(x.shape)))
    monkeypatch.setattr(step_kernels, "largest_threshold", broken)
    chosen = [entry for entry in comparisons() if entry.case in ("addition and norm", "top-p", "best tokens")]
    result = kernels.measure([], [], others=chosen)
    assert not result.is_ok
    assert {(row.case, row.is_ok, row.failure) for row in result.rows} == {
        ("addition and norm", False, ""),
        ("best tokens", True, ""),
        ("top-p", False, "RuntimeError: no such kernel"),
    }
    assert "WRONG: pallas float32 addition and norm" in kernels.render(result)
    assert not kernels.measure([], [], others=chosen, backends=["xla"]).rows
