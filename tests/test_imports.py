"""What a process imports before it needs it: `import jaxinfer` and --help bring neither JAX nor the benchmarks."""

import subprocess
import sys

import pytest

import jaxinfer
from jaxinfer import public_names

HEAVY = {"jax", "flax", "huggingface_hub", "jinja2", "matplotlib", "pandas", "tokenizers", "tqdm", "jaxinfer.api.llm"}
FOR_OTHER_USES = {"huggingface_hub", "jinja2", "matplotlib", "pandas", "ray", "starlette", "uvicorn", "jaxinfer.bench"}
FOR_OTHER_USES |= {"jaxinfer.serve.http", "jaxinfer.serve.interfaces"}  # all but the settings, which are flags
HELP = "import sys; from jaxinfer.cli import main as cli; sys.argv = {argv}; assert cli._exit_code() == 0"


def imported(program):
    """The modules that a new process has imported once it has run a program."""
    program += "; import sys; print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize(
    "program",
    [
        "import jaxinfer; jaxinfer.__version__",
        HELP.format(argv=["jaxinfer", "--help"]),
        HELP.format(argv=["jaxinfer", "bench", "roofline", "--help"]),
        HELP.format(argv=["jaxinfer", "generate", "--help"]),
    ],
)
def test_import_and_help_bring_no_heavy_module(program):
    modules = imported(program)
    assert "jaxinfer" in modules and not modules & HEAVY


def test_generating_brings_no_module_for_other_uses():
    arguments = ["jaxinfer", "generate", "one", "--max-tokens", "0"]
    modules = imported(HELP.format(argv=arguments))
    assert "jaxinfer.api.llm" in modules and not modules & FOR_OTHER_USES


def test_public_names_are_those_that_are_imported_at_first_use():
    assert set(public_names.__all__) <= set(dir(jaxinfer))
    assert jaxinfer.__all__ == public_names.__all__
    for name in public_names.__all__:
        assert getattr(jaxinfer, name) is getattr(public_names, name)
    with pytest.raises(AttributeError, match=r"^module 'jaxinfer' has no attribute 'nothing'$"):
        jaxinfer.nothing  # noqa: B018


def test_name_that_a_test_replaces_stays_replaced(monkeypatch):
    monkeypatch.setattr(jaxinfer, "LLM", None)
    assert not hasattr(jaxinfer, "nothing") and jaxinfer.LLM is None
