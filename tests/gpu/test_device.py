"""What only a GPU can show: its kernels and programs give what the oracle and transformers give.

`pytest -m gpu` runs these; where JAX finds no GPU they are skipped. Each is a command of `jaxinfer bench` in a process
of its own, because this one keeps to the CPU, with XLA's optimisation off (conftest.py).
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import CASES, GOLDEN

from jaxinfer.bench.kernels import small_cases
from jaxinfer.bench.step_kernels import comparisons
from jaxinfer.kernels.paged_attention import BACKENDS

pytestmark = pytest.mark.gpu
LIMIT_S = 1200


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python as a user starts it: JAX chooses the device, XLA optimises."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.fixture(scope="module")
def gpu() -> None:
    """Skips where JAX finds no GPU; a GPU that JAX fails to start is an error."""
    found = run_python("-c", "import jax; print(jax.default_backend())")
    assert found.returncode == 0, found.stderr
    if found.stdout.strip() != "gpu":
        pytest.skip(
            f"needs a GPU and JAX's plugin for it (pip install 'jaxinfer[cuda12]'); found {found.stdout.strip()}"
        )


@pytest.fixture
def bench(gpu, tmp_path):
    """The result of a command of `jaxinfer bench` on the GPU; what is wrong in it gives status 1."""

    def bench(*arguments: str) -> dict[str, Any]:
        file = tmp_path / "record.json"
        run = run_python("-m", "jaxinfer", "bench", *arguments, "--json", str(file))
        assert run.returncode == 0, run.stdout + run.stderr
        record = json.loads(file.read_text())
        assert record["device"]["platform"] == "gpu"
        return record["result"]

    return bench


def test_kernels_on_the_gpu_equal_their_oracles(bench):
    rows = bench("kernels")["rows"]
    compared = [row for row in rows if row["ms"] is None]
    assert len(compared) == len(small_cases()) * (len(BACKENDS) - 1) + len(comparisons())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_golden_checkpoints_on_the_gpu_equal_transformers(bench, dtype):
    cases = bench("golden", str(GOLDEN), "--dtype", dtype, "--budget-seconds", str(LIMIT_S))["cases"]
    assert sorted(case["name"] for case in cases) == CASES
    assert all(case["is_right"] for case in cases)
