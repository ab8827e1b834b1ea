"""EngineConfig: every wrong value is refused in words, numbers of any kind are accepted, nothing changes later."""

from __future__ import annotations

import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from jaxinfer.config.engine_config import EngineConfig

COUNTS = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "page_size": 8, "max_model_len": 2, "num_kv_pages": 1}
COUNTS |= dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"), 1)
OPTIONAL = ("max_model_len", "num_kv_pages")
FLAGS = ("enable_prefix_caching", "enable_chunked_prefill", "run_ahead")
NO_NUMBERS = (True, False, np.True_, "8", 8.0, np.float32(8), [8], np.array([8]), 8j)

WRONG = [
    *((name, low - 1, ValueError, f">= {low}") for name, low in COUNTS.items()),
    *((name, value, TypeError, "int") for name in COUNTS for value in NO_NUMBERS),
    *((name, None, TypeError, "int") for name in COUNTS if name not in OPTIONAL),
    *((name, value, TypeError, "True or False") for name in FLAGS for value in (0, 1, None, "yes", np.int64(1))),
    ("page_size", 24, ValueError, "power of two"),
    ("page_size", np.int32(48), ValueError, "power of two"),
    ("max_num_batched_tokens", 63, ValueError, ">= max_num_seqs"),
    ("seed", -1, ValueError, "in 0..9223372036854775807"),
    ("seed", 2**63, ValueError, "in 0..9223372036854775807"),
    ("seed", np.uint64(2**63), ValueError, "in 0..9223372036854775807"),
    *(("seed", value, TypeError, "int in 0..") for value in (None, *NO_NUMBERS)),
    *(
        ("gpu_memory_utilization", value, ValueError, "in (0, 1]")
        for value in (0, -0.1, 1.1, math.nan, math.inf, 10**400)
    ),
    *(("gpu_memory_utilization", value, TypeError, "in (0, 1]") for value in (None, True, np.True_, "0.9", [0.9], 1j)),
    *(("dtype", value, ValueError, "auto, float32, bfloat16, float16") for value in ("int8", "", None, 32, np.float32)),
    *(("quantization", value, ValueError, "None or int8") for value in ("int4", "", 8, True)),
    *(("xla_options", value, TypeError, "mapping of") for value in ("x=1", ["x"], {1: 2}, {"x": None}, {"x": [1]})),
    *(("attention_backend", value, ValueError, "auto, reference, xla") for value in ("flash", None, True)),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG)
def test_engine_config_wrong_value_names_field_value_and_range(name, value, error, allowed) -> None:
    with pytest.raises(error, match=f"^{name} must be ") as caught:
        EngineConfig(**{name: value})
    assert allowed in str(caught.value)
    assert str(value) in str(caught.value) or repr(value) in str(caught.value)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint16])
def test_engine_config_integers_become_int(kind) -> None:
    config = EngineConfig(max_num_seqs=kind(3), max_model_len=kind(99), num_kv_pages=kind(7), seed=kind(5))
    config = dataclasses.replace(config, page_size=kind(16), max_num_batched_tokens=kind(32))
    assert config == EngineConfig(
        max_num_seqs=3, max_model_len=99, num_kv_pages=7, seed=5, page_size=16, max_num_batched_tokens=32
    )
    assert all(type(value) in (int, float, bool, str, type(None)) for value in dataclasses.asdict(config).values())


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)])
def test_engine_config_numbers_become_float(value) -> None:
    config = EngineConfig(gpu_memory_utilization=value)
    assert type(config.gpu_memory_utilization) is float and config == EngineConfig(gpu_memory_utilization=0.5)
    assert EngineConfig(gpu_memory_utilization=1).gpu_memory_utilization == 1.0


def test_engine_config_xla_options_are_a_copy() -> None:
    options = {"xla_gpu_graph_min_graph_size": 2, "xla_gpu_enable_triton_gemm": False}
    config = EngineConfig(xla_options=options)
    options.clear()
    assert config.xla_options == {"xla_gpu_graph_min_graph_size": 2, "xla_gpu_enable_triton_gemm": False}


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [("max_num_seq", "; did you mean 'max_num_seqs'?"), ("page_sise", "; did you mean 'page_size'?"), ("zzz", "")],
)
def test_engine_config_unknown_keyword_names_nearest(keyword: str, hint: str) -> None:
    with pytest.raises(TypeError) as caught:
        EngineConfig(**{keyword: 1})
    assert str(caught.value) == f"unknown argument {keyword!r}{hint}"


def test_engine_config_is_frozen_hashable_and_picklable() -> None:
    value = EngineConfig()
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))
    assert pickle.loads(pickle.dumps(value)) == value and hash(value) == hash(dataclasses.replace(value))
