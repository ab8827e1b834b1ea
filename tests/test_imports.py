"""What a process imports before it needs it: `import jaxinfer` does not bring JAX."""

import subprocess
import sys

import pytest

import jaxinfer
from jaxinfer import public_names

HEAVY = {"jax", "flax", "huggingface_hub", "jinja2", "matplotlib", "pandas", "tokenizers", "tqdm", "jaxinfer.api.llm"}


def imported(program):
    """The modules that a new process has imported once it has run a program."""
    program += "; import sys; print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_import_brings_no_heavy_module():
    modules = imported("import jaxinfer; jaxinfer.__version__")
    assert "jaxinfer" in modules and not modules & HEAVY


def test_public_names_are_those_that_are_imported_at_first_use():
    assert set(public_names.__all__) <= set(dir(jaxinfer))
    assert jaxinfer.__all__ == public_names.__all__
    for name in public_names.__all__:
        assert getattr(jaxinfer, name) is getattr(public_names, name)
    with pytest.raises(AttributeError, match=r"^module 'jaxinfer' has no attribute 'nothing'$"):
        jaxinfer.nothing  # noqa: B018
