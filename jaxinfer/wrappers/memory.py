"""Finds how many KV pages fit into memory.

Owns: the reading of free memory, the estimate of what else needs it, and the arithmetic of the pool's size.
Does not know: what pages are used for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.config.sizes import size_text
from jaxinfer.kernels.pallas_experts import MAX_TOKENS
from jaxinfer.sampling.logit_edits import EditState
from jaxinfer.wrappers.jax_start import card_bytes
from jaxinfer.wrappers.step_shapes import StepShapes

MEMINFO = Path("/proc/meminfo")
CPU_SHARE = 0.5
"""The share of a CPU machine's available memory that the KV pool may take, at most."""
CPU_POOL_BYTES = 4 * 2**30
"""The KV pool of a CPU is no larger, since the system has to provide the memory when the pool is made, about a second
for this much, and other programs lack it from then on. It holds 90,000 tokens of a 135M model in float32, 18,000 of a
0.6B one."""
POOL_SHARE = 0.95
"""The share of the memory reserved by JAX that is used at most; the rest is for fragmentation and XLA's autotuning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a model takes of a device's memory.

    Args:
      fixed_bytes: bytes of weights and activations.
      page_bytes: bytes of one KV page.
    """

    fixed_bytes: int = 0
    page_bytes: int = 0


def fitting_pages(
    mesh: Mesh,
    *,
    config: EngineConfig,
    model_config: ModelConfig,
    shapes: StepShapes,
    page_bytes: int,
    itemsize: int,
    beside: Footprint,
    num_alike: int,
) -> int:
    """How many KV pages a mesh has room for at present, without the dump page, once the weights are on its devices.

    Args:
      mesh: the mesh.
      config: the engine's settings.
      model_config: the model's numbers.
      shapes: the shapes of steps.
      page_bytes: bytes of one page over all devices.
      itemsize: bytes of a number of activations.
      beside: memory to leave for a second model, which has as many pages.
      num_alike: models of this kind that have yet to be loaded, this one included; on CPUs they share one memory.

    Raises:
      ValueError: not even one page fits, or a device does not report its memory.
    """
    devices = mesh.local_devices
    free = min(free_bytes(device, gpu_memory_utilization=config.gpu_memory_utilization) for device in devices)
    if devices[0].platform == "cpu":
        free //= mesh.size * num_alike  # CPU devices share one memory
    else:
        free -= activation_bytes(model_config, shapes, itemsize)
        free -= edit_bytes(shapes, model_config.vocab_size, num_devices=mesh.size)
    return num_kv_pages(
        free=free - beside.fixed_bytes,
        page_bytes=page_bytes // mesh.size + beside.page_bytes,
        useful_pages=config.max_num_seqs * shapes.table_width,
    )


def free_bytes(device: jax.Device, *, gpu_memory_utilization: float) -> int:
    """Bytes of a device that weights, KV pages and activations may still take.

    Args:
      device: a device of any platform.
      gpu_memory_utilization: share of a GPU's memory that may be used; if JAX has reserved less, POOL_SHARE of that is
        the limit. A CPU has no such share: it gives CPU_SHARE of the available memory, rounded down to a power of two
        so that the next process finds its programs in the compilation cache, which the pool's size is a part of, and
        CPU_POOL_BYTES at most.

    Raises:
      ValueError: the device does not report its memory.
    """
    if device.platform == "cpu":
        free = min(int(available_bytes() * CPU_SHARE), CPU_POOL_BYTES)
        return 1 << free.bit_length() >> 1  # also for no bytes
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError(f"{device.device_kind} does not report its memory; set num_kv_pages")
    limit = stats["bytes_limit"]
    all_bytes = card_bytes(limit) if device.platform == "gpu" else limit
    return int(min(all_bytes * gpu_memory_utilization, limit * POOL_SHARE)) - stats["bytes_in_use"]


def require_room(mesh: Mesh, *, num_pages: int, page_bytes: int) -> None:
    """Refuses a KV pool that the memory of this process's devices has no room for.

    Args:
      mesh: the mesh.
      num_pages: pages of the pool, the dump page included.
      page_bytes: bytes of one page over all devices.

    Raises:
      ValueError: it is larger than what is free; the message says by how much.
    """
    devices = mesh.local_devices
    needed = num_pages * page_bytes // mesh.size
    if devices[0].platform == "cpu":
        needed, free = needed * len(devices), available_bytes()  # CPU devices share one memory
    else:
        stats = [device.memory_stats() or {} for device in devices]
        if not all("bytes_limit" in entry for entry in stats):
            return
        free = min(entry["bytes_limit"] - entry["bytes_in_use"] for entry in stats)
    if needed > free:
        raise ValueError(
            f"num_kv_pages must fit into the memory: {num_pages - 1} pages take {size_text(needed)}, {size_text(free)} "
            f"are free; lower num_kv_pages, or leave it out for as many as fit"
        )


def available_bytes(meminfo: Path = MEMINFO) -> int:
    """Bytes of the machine's memory that programs can still have.

    On Linux this is what the kernel calls available: free pages, and those of the page cache that it would give up.
    Free pages alone would be too few: once a machine has read a few checkpoints, nearly all its memory is page cache.
    Elsewhere it is what sysconf tells: the free pages, or all of them (macOS).

    Args:
      meminfo: the file in which Linux reports its memory.
    """
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    for name, _, size in (line.partition(":") for line in lines):
        if name == "MemAvailable":
            return int(size.split()[0]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def num_kv_pages(*, free: int, page_bytes: int, useful_pages: int) -> int:
    """How many KV pages one device's pool gets, without the dump page.

    Args:
      free: bytes for the pool.
      page_bytes: bytes of one page on this device, over its layers.
      useful_pages: pages that all slots would need at full length; the pool is never larger.

    Raises:
      ValueError: not even one page fits beside the dump page; the message says what was free.
    """
    fitting = free // page_bytes
    if fitting < 2:
        raise ValueError(
            f"{max(free, 0) / 2**20:.0f} MiB are free for KV pages of {page_bytes / 2**20:.1f} MiB; "
            f"use a smaller page_size or model, or raise gpu_memory_utilization"
        )
    return min(fitting - 1, useful_pages)


def activation_bytes(config: ModelConfig, shapes: StepShapes, itemsize: int) -> int:
    """A generous estimate of what activations take on one device in the largest step.

    It counts residual, QKV, feed-forward and float32 logits, and the page tables of the pipeline's ring.
    """
    largest = shapes.all_shapes()[-1]
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_token = 4 * config.hidden_size + 2 * (q_size + 2 * kv_size) + 3 * config.ffn_size
    experts = config.experts_per_token * (config.expert_ffn_size + config.hidden_size)
    numbers = largest.num_tokens * per_token + min(largest.num_tokens, MAX_TOKENS) * experts
    rows = shapes.num_stages * (largest.num_decode + largest.num_prefill) * shapes.table_width
    return (numbers + 4 * largest.num_logits * config.vocab_size) * max(itemsize, 4) + 4 * rows


def edit_bytes(shapes: StepShapes, vocab_size: int, *, num_devices: int) -> int:
    """Bytes that the logit edits of all slots take on one device, once a request has any.

    Args:
      shapes: the shapes of steps.
      vocab_size: tokens of the vocabulary, which is spread over the devices.
      num_devices: devices of the mesh.
    """
    slice_size = -(-vocab_size // num_devices)
    leaves = jax.eval_shape(lambda: jax.tree.leaves(EditState.zeros(shapes.num_slots + 1, slice_size)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
