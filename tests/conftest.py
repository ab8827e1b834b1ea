"""Shared fixtures: shape checking for every test, a private compilation cache, golden checkpoints."""

import gc
import importlib.util
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    # Functions of JAX arrays are checked when they are traced. Code on numpy arrays runs in every step, where checks
    # would take a fifth of all time: tests check the arrays that it makes (shape_checker.assert_shapes).
    package = Path(importlib.util.find_spec("jaxinfer").origin).parent
    traced = [path for path in package.rglob("*.py") if "from jaxtyping import Array" in path.read_text()]
    modules = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in traced]
    install_import_hook(modules, "shape_checker.check")

# Golden files are compared in float32 on the CPU, also where there is a GPU (`jaxinfer bench gpu` is for that).
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The mesh's tests take eight devices, all others the first. Nearly all time goes into compiling programs that run once:
# each in one piece, since the tests keep all cores busy as it is, and without fusion emitters, which later versions
# always use, in half of the time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if version("jax").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# Equal programs of different tests (and of parallel workers) are compiled once.
os.environ.setdefault("JAXINFER_CACHE_DIR", tempfile.mkdtemp(prefix="jaxinfer-test-xla-"))

MOST_MAPPINGS = 25_000
GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))


@dataclass(frozen=True)
class Golden:
    """A checkpoint and what transformers made of it."""

    path: Path
    expected: dict[str, np.ndarray]

    @property
    def prompts(self) -> list[list[int]]:
        return [self.expected[f"prompt_{i}"].tolist() for i in range(3)]

    @property
    def greedy(self) -> list[list[int]]:
        return [self.expected[f"greedy_{i}"].tolist() for i in range(3)]


def load_golden(case: str) -> Golden:
    return Golden(path=GOLDEN / case, expected=dict(np.load(GOLDEN / case / "expected.npz")))


@pytest.fixture(params=CASES)
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def gqa() -> Golden:
    return load_golden("gqa")


def pytest_collection_finish() -> None:
    """Looks for garbage more rarely: modules and traced programs are many objects that stay, and going through them
    again and again takes a twelfth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 10)


@pytest.fixture(scope="session", autouse=True)
def _bound_programs() -> Callable[[], None]:
    """Forgets programs when they are many, as a process without free mappings dies.

    XLA's CPU backend takes dozens of mappings of memory for a program, of which Linux allows a process 65,530.
    """
    from shared_programs import share_programs  # after the import hook

    forget, mappings = share_programs(), Path("/proc/self/maps")

    def bound() -> None:
        if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
            forget()

    return bound


@pytest.fixture(scope="module", autouse=True)
def _few_mappings(_bound_programs) -> None:
    _bound_programs()


@pytest.fixture(autouse=True)
def _few_mappings_in_a_matrix(request, _bound_programs) -> None:
    if request.node.get_closest_marker("matrix"):
        _bound_programs()


@pytest.fixture
def few_programs(monkeypatch) -> None:
    """Pads every step to the largest shape and samples it by the most general sampler, so that little is compiled."""
    from shared_programs import take_few_programs  # after the import hook

    take_few_programs(monkeypatch.setattr)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
