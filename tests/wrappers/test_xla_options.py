"""Which programs get options, and that the installed XLA knows them: an unknown name ends the compilation."""

import jax
import pytest
from conftest import load_golden
from wrapper_tools import make_wrapper

from jaxinfer.wrappers.programs import ProgramCache
from jaxinfer.wrappers.step_shapes import StepShape
from jaxinfer.wrappers.xla_options import chosen_options, compiler_options, tuned_alike


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


@pytest.mark.parametrize("options", [{"xla_gpu_no_such_option": 1}, {"xla_gpu_enable_triton_gemm": "perhaps"}])
def test_chosen_options_unknown_name_or_value_is_an_error_before_anything_is_loaded(options):
    with pytest.raises(ValueError, match=r"xla_options must be known to XLA .*xla_gpu"):
        chosen_options(options)
    with pytest.raises(ValueError, match="xla_options must be known to XLA"):
        make_wrapper(load_golden("gqa").path, xla_options=options)


def test_xla_options_of_the_settings_reach_every_program_and_win_over_the_engine(monkeypatch):
    seen = []

    def compile(self, name, *arguments):
        seen.append((name, self._options[name](*arguments)))

    monkeypatch.setattr(ProgramCache, "_compile", compile)
    chosen = {"xla_gpu_graph_min_graph_size": 2, "xla_gpu_enable_triton_gemm": True}
    wrapper = make_wrapper(load_golden("gqa").path, xla_options=chosen)
    wrapper.warmup()
    assert {name for name, _ in seen} >= {"forward", "sample", "sample_edited", "copy", "score", "edit", "allow"}
    assert all(options == {**chosen, "xla_gpu_graph_min_graph_size": "2"} for _, options in seen)
    wrapper.close()


def test_tuned_alike_on_gpus_names_the_tokens_that_the_products_have():
    alike = tuned_alike("gpu")
    rows = {"num_logits": 8, "num_prefill": 0}
    assert alike["forward"](StepShape(num_decode=16, **rows)) == ("layers", 16)
    assert alike["sample"](8, None, 20) == alike["sample_edited"](8, 20) == alike["score"](8, 20) == ("head", 8)
    assert tuned_alike("cpu") == {}
