"""Which programs get options, and that the installed XLA knows them: an unknown name ends the compilation."""

import jax
import pytest

from jaxinfer.wrappers.xla_options import compiler_options


@pytest.mark.parametrize(("platform", "num_tokens"), [("cpu", 4096), ("gpu", 1), ("gpu", 63)])
def test_compiler_options_few_tokens_or_no_gpu_has_none(platform, num_tokens):
    assert compiler_options(platform, num_tokens) == {}


def test_compiler_options_many_tokens_are_known_to_xla():
    options = compiler_options("gpu", 64)
    assert options == {"xla_gpu_enable_triton_gemm": False}
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options=options)(1.0) == 2
    with pytest.raises(RuntimeError, match="xla_gpu_no_such_option"):
        lowered.compile(compiler_options={"xla_gpu_no_such_option": True})
