"""How many pages fit, and what is said when none does."""

import inspect
from types import SimpleNamespace

import jax
import pytest
from wrapper_tools import make_wrapper

from jaxinfer.checkpoint import directory
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.models.registry import parse_model_config
from jaxinfer.wrappers import memory
from jaxinfer.wrappers.memory import (
    Footprint,
    activation_bytes,
    available_bytes,
    edit_bytes,
    fitting_pages,
    free_bytes,
    num_kv_pages,
)
from jaxinfer.wrappers.step_shapes import StepShapes


@pytest.mark.parametrize(("free", "useful", "pages"), [(1000, 50, 9), (1000, 4, 4), (200, 50, 1), (299, 50, 1)])
def test_num_kv_pages_leaves_one_for_the_dump_page(free, useful, pages):
    assert num_kv_pages(free=free, page_bytes=100, useful_pages=useful) == pages


@pytest.mark.parametrize("free", [199, 0, -5])
def test_num_kv_pages_no_room_raises(free):
    with pytest.raises(ValueError, match=r"0 MiB are free for KV pages of 0.0 MiB; use a smaller page_size or model"):
        num_kv_pages(free=free, page_bytes=100, useful_pages=50)


def free_on_gpu(**stats):
    device = SimpleNamespace(platform="gpu", device_kind="Test GPU", memory_stats=lambda: stats)
    return inspect.unwrap(free_bytes)(device, gpu_memory_utilization=0.9)  # without the tests' own type checker


def test_free_bytes_gpu_is_what_jax_took_less_fragments_and_what_is_in_use():
    assert free_on_gpu(bytes_limit=1000, bytes_in_use=300) == 950 - 300


def test_pool_without_room_names_the_knob(gqa):
    with pytest.raises(ValueError, match=r"num_kv_pages must fit .*: 1000000000 pages take .* are free; lower"):
        make_wrapper(gqa.path, num_kv_pages=10**9)


def test_free_bytes_silent_device_raises():
    with pytest.raises(ValueError, match="Test GPU does not report its memory; set num_kv_pages"):
        free_on_gpu()


@pytest.mark.parametrize(
    ("available", "expected"), [(64, 4), (8, 4), (7.9, 2), (4.1, 2), (0.3, 0.125), (1e-9, 2**-30), (0, 0)]
)
def test_free_bytes_cpu_is_half_of_the_memory_as_a_power_of_two_up_to_four_gibibytes(monkeypatch, available, expected):
    monkeypatch.setattr(memory, "available_bytes", lambda: round(available * 2**30 + 1))
    assert free_bytes(jax.devices()[0], gpu_memory_utilization=0.9) == expected * 2**30


FULL_PAGE_CACHE = """MemTotal:       16000000 kB
MemFree:          100000 kB
MemAvailable:   12000000 kB
Cached:         11900000 kB
"""


def test_available_bytes_counts_the_page_cache_which_makes_room(tmp_path):
    (tmp_path / "meminfo").write_text(FULL_PAGE_CACHE)
    assert available_bytes(tmp_path / "meminfo") == 12_000_000 * 1024


@pytest.mark.parametrize("text", [None, FULL_PAGE_CACHE.replace("MemAvailable", "MemOther")])
@pytest.mark.parametrize("sizes", [{"SC_AVPHYS_PAGES": 7, "SC_PHYS_PAGES": 70}, {"SC_PHYS_PAGES": 7}])
def test_available_bytes_without_meminfo_asks_the_system_for_free_or_else_all_pages(tmp_path, monkeypatch, text, sizes):
    """macOS has neither the file nor the number of free pages."""
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    sizes = sizes | {"SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory, "os", SimpleNamespace(sysconf=sizes.__getitem__, sysconf_names=sizes))
    assert available_bytes(tmp_path / "meminfo") == 7 * 4096


@pytest.mark.parametrize(("pipe", "tensor"), [(1, 1), (2, 2)])
def test_edit_bytes_are_what_the_edits_of_all_slots_take_on_a_device(gqa, pipe, tensor):
    wrapper = make_wrapper(gqa.path, max_num_seqs=5, pipeline_parallel_size=pipe, tensor_parallel_size=tensor)
    edits = wrapper._step_programs.allocate_edits()
    found = sum(array.addressable_shards[0].data.nbytes for array in edits)
    assert found > 5 * 320 * 11 // (pipe * tensor)
    assert edit_bytes(wrapper.shapes, wrapper._vocab_size, num_devices=pipe * tensor) == found
    wrapper.close()


@pytest.mark.parametrize(("platform", "pages"), [("gpu", 9), ("cpu", 4)])
def test_fitting_pages_leave_room_for_activations_and_edits_or_for_models_that_share_a_memory(
    gqa, monkeypatch, platform, pages
):
    model_config = parse_model_config(directory.read_json(gqa.path / "config.json"))
    config = EngineConfig()
    shapes = StepShapes.on_platform(platform, config, max_model_len=256)
    others = activation_bytes(model_config, shapes, 4) + edit_bytes(shapes, 320, num_devices=1)
    free = 10 * 1024 + (others if platform == "gpu" else 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device, **_: free)
    found = inspect.unwrap(fitting_pages)(  # without the tests' own type checker
        SimpleNamespace(local_devices=[SimpleNamespace(platform=platform)], size=1),
        config=config,
        model_config=model_config,
        shapes=shapes,
        page_bytes=1024,
        itemsize=4,
        beside=Footprint(),
        num_alike=2,
    )
    assert found == pages
