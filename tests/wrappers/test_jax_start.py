"""JAX starts with the share of a GPU that the settings ask for; the log says when a GPU is not used as it could be."""

import inspect
import logging
from types import SimpleNamespace

import jax
import pytest
from jax._src import xla_bridge

from jaxinfer import LLM
from jaxinfer.api import loaded_engine
from jaxinfer.cli.info import system_facts
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.wrappers import jax_start, memory

GIB = 2**30
VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing chosen by the user."""
    for name in (*VARIABLES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the test sets
        monkeypatch.delenv(name)


def gpu(limit, **stats):
    return SimpleNamespace(
        platform="gpu", device_kind="Test GPU", memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": 0} | stats
    )


def start(monkeypatch, *, device, has_started, share=0.9, **chosen):
    """Starts JAX as a process would that has this first device; the fraction it was started with."""
    monkeypatch.setattr(jax_start, "_has_started", lambda: has_started)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    inspect.unwrap(jax_start.start_jax)(gpu_memory_utilization=share)
    return jax_start.os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_start_jax_takes_the_share_of_the_card_and_says_nothing(monkeypatch, caplog):
    assert start(monkeypatch, device=gpu(72 * GIB), has_started=False) == "0.9"
    assert not caplog.records
    assert jax_start.card_bytes(72 * GIB) == 80 * GIB


@pytest.mark.parametrize("name", VARIABLES)
def test_start_jax_leaves_what_the_user_has_chosen(monkeypatch, caplog, name):
    """JAX refuses both names of the fraction at once, too."""
    value = "0.5" if "FRACTION" in name else "false"
    found = start(monkeypatch, device=gpu(80 * GIB), has_started=False, share=0.5, **{name: value})
    assert found == (value if name == "XLA_PYTHON_CLIENT_MEM_FRACTION" else None)
    assert not caplog.records


def test_start_jax_too_late_says_what_is_missing_and_how_to_get_it(monkeypatch, caplog):
    assert start(monkeypatch, device=gpu(60 * GIB), has_started=True) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "JAX was started with 60.0 GiB" in record.message
    assert "gpu_memory_utilization 0.9 asks for 72.0 GiB" in record.message
    assert "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in record.message


@pytest.mark.parametrize(
    ("limit", "chosen", "share", "most"),
    [
        (72, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, 0.9, 72 * 0.95),  # of what JAX took, fragments are left out
        (72, {"XLA_CLIENT_MEM_FRACTION": "0.9"}, 0.5, 40),  # a second LLM that asks for less of the card
        (60, {}, 0.9, 60 * 0.95),  # JAX was up before, with its own share
        (60, {}, 0.6, 48),
    ],
)
def test_free_bytes_gpu_is_its_share_of_the_card_within_what_jax_took(monkeypatch, limit, chosen, share, most):
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    device = gpu(limit * GIB, bytes_in_use=7 * GIB)
    free = inspect.unwrap(memory.free_bytes)(device, gpu_memory_utilization=share)
    assert free == pytest.approx((most - 7) * GIB, abs=2)


def test_start_of_jax_is_seen(monkeypatch):
    jax.devices()
    assert jax_start._has_started()
    monkeypatch.setattr(xla_bridge, "_backends", {})
    assert jax_start._has_started(), "the plugins have read the environment already"
    monkeypatch.setattr(xla_bridge, "_plugins_registered", False)
    assert not jax_start._has_started()


class StartedError(Exception):
    """JAX would start now."""


def test_llm_starts_jax_with_its_share_before_anything_asks_for_devices(monkeypatch):
    def start_jax(*, gpu_memory_utilization):
        raise StartedError(gpu_memory_utilization)

    def devices(*_):
        raise AssertionError("JAX was started without the share")

    monkeypatch.setattr(loaded_engine, "start_jax", start_jax)
    for name in ("devices", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, devices)
    with pytest.raises(StartedError, match=r"0\.55"):
        LLM(gpu_memory_utilization=0.55)


def with_gpu(monkeypatch):
    """A machine with an NVIDIA GPU on which JAX runs on the CPU."""
    monkeypatch.setattr(jax_start, "num_nvidia_gpus", lambda: 1)
    unchosen = {"config": SimpleNamespace(jax_platforms=None)}
    monkeypatch.setattr(jax_start, "jax", SimpleNamespace(**vars(jax) | unchosen))


def unseen(caplog):
    return [record.message for record in caplog.records if "NVIDIA GPU" in record.message]


def test_system_facts_of_a_gpu_that_jax_does_not_see_name_the_remedy(monkeypatch, caplog):
    with_gpu(monkeypatch)
    system_facts(EngineConfig())
    (line,) = unseen(caplog)
    assert "runs on the CPU" in line and "pip install 'jaxinfer[cuda12]'" in line and "\n" not in line


def test_llm_on_a_machine_with_a_gpu_that_jax_does_not_see_says_so_once(monkeypatch, caplog):
    with_gpu(monkeypatch)
    LLM(num_kv_pages=2, max_model_len=64, draft_model="demo").close()
    assert len(unseen(caplog)) == 1


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_start_jax_gpu_that_the_user_has_hidden_is_no_news(monkeypatch, caplog, hidden):
    with_gpu(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    system_facts(EngineConfig())
    assert not unseen(caplog)


def test_start_jax_where_the_cpu_was_asked_for_is_no_news(monkeypatch, caplog):
    monkeypatch.setattr(jax_start, "num_nvidia_gpus", lambda: 1)
    assert jax.config.jax_platforms == "cpu"  # by JAX_PLATFORMS
    system_facts(EngineConfig())
    assert not unseen(caplog)


@pytest.mark.parametrize(
    ("files", "listed", "found"),
    [
        (["nvidia0"], None, True),
        (["nvidiactl", "nvidia-uvm"], None, False),
        ([], None, False),
        ([], "GPU 0: NVIDIA A100 (UUID: GPU-1)\n", True),
        ([], "No devices found.\n", False),
    ],
)
def test_nvidia_gpu_is_found_by_its_file_or_by_nvidia_smi(tmp_path, monkeypatch, files, listed, found):
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "bin").mkdir()
    if listed is not None:
        command = tmp_path / "bin" / "nvidia-smi"
        command.write_text(f"#!/bin/sh\n[ $1 = -L ] && /bin/echo '{listed.strip()}'\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert (jax_start.num_nvidia_gpus(tmp_path) > 0) is found
