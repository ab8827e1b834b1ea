"""Starts JAX with a share of a GPU's memory, and warns if a GPU is not used as it could be.

Owns: JAX's environment variables for memory, what they mean in bytes, and the search for a GPU that JAX does not see.
Does not know: models, what the memory is used for.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax._src import xla_bridge

logger = logging.getLogger(__name__)

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", FRACTION)
_CHOICES = (*_FRACTIONS, "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR")
"""Variables that say how JAX reserves a GPU's memory; if the user has set one of them, none is changed."""
DEFAULT_FRACTION = 0.75
"""The share of a GPU's memory that JAX reserves unless told otherwise."""
_CLOSE = 0.01
"""JAX may have so much less memory than asked for, as a share, without a warning."""


def start_jax(*, gpu_memory_utilization: float) -> list[jax.Device]:
    """Starts JAX, unless it runs already, with a share of every GPU's memory.

    A warning in the log says if the machine has a GPU that JAX does not see, or if JAX was started before with a
    smaller share.

    Args:
      gpu_memory_utilization: the share. It is set as XLA_PYTHON_CLIENT_MEM_FRACTION, which child processes inherit,
        unless the user has set this or a related variable.

    Returns:
      The devices of this process.
    """
    if not _has_started() and not any(name in os.environ for name in _CHOICES):
        os.environ[FRACTION] = f"{gpu_memory_utilization:g}"
    devices = jax.local_devices()
    for line in (_unseen_gpu(devices[0]), _missing_memory(devices[0], gpu_memory_utilization)):
        if line is not None:
            logger.warning(line)
    return devices


def card_bytes(bytes_limit: int) -> float:
    """The whole memory of a GPU in bytes, from what JAX has reserved of it (bytes_limit) and the share that this is."""
    chosen = next((os.environ[name] for name in _FRACTIONS if os.environ.get(name)), DEFAULT_FRACTION)
    return bytes_limit / float(chosen)


def _has_started() -> bool:
    """Whether it is too late to set environment variables, which JAX reads when it looks for plugins as it starts."""
    return xla_bridge.backends_are_initialized() or getattr(xla_bridge, "_plugins_registered", False)


def _missing_memory(device: Any, share: float) -> str | None:
    stats = (device.memory_stats() or {}) if device.platform == "gpu" else {}
    if "bytes_limit" not in stats:
        return None
    limit, wanted = stats["bytes_limit"], card_bytes(stats["bytes_limit"]) * share
    if limit >= wanted * (1 - _CLOSE):
        return None
    return (
        f"JAX was started with {limit / 2**30:.1f} GiB of the GPU's memory, gpu_memory_utilization {share:g} asks for "
        f"{wanted / 2**30:.1f} GiB; make the LLM before anything else uses JAX, or set {FRACTION}={share:g} before that"
    )


def _unseen_gpu(device: Any) -> str | None:
    has_chosen = getattr(jax.config, "jax_platforms", None) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if device.platform != "cpu" or has_chosen or not num_nvidia_gpus():
        return None
    return (
        f"this machine has an NVIDIA GPU, but JAX {jax.__version__} runs on the CPU, without a plugin that fits: "
        "pip install 'jaxinfer[cuda12]' (or cuda13) and restart Python; JAX_PLATFORMS=cpu says that the CPU is meant"
    )


def num_nvidia_gpus(dev: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs there are, by their device files or, as WSL has none, by what nvidia-smi lists."""
    if found := list(dev.glob("nvidia[0-9]*")):
        return len(found)
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
