"""How many KV pages fit.

Owns: the reading of free memory, the estimate of what else takes it, and the arithmetic of the pool's size.
Does not know: what pages are used for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxinfer.config import ModelConfig
from jaxinfer.layers.moe import EXPERT_BLOCK
from jaxinfer.sampling.logit_edits import EditState
from jaxinfer.wrappers.jax_start import card_bytes
from jaxinfer.wrappers.step_batch import StepShapes

MEMINFO = Path("/proc/meminfo")
CPU_SHARE = 0.5
"""Of a CPU's available memory, at most, for the KV pool."""
POOL_SHARE = 0.95
"""Of what JAX has taken of a GPU, at most; the rest is for fragments, and for what XLA tries out while it compiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a model takes of a device's memory.

    Args:
      fixed_bytes: weights and activations.
      page_bytes: of one KV page.
    """

    fixed_bytes: int = 0
    page_bytes: int = 0


def free_bytes(device: jax.Device, *, gpu_memory_utilization: float) -> int:
    """Bytes of a device that weights, KV pages and activations may still take.

    Args:
      device: of any platform.
      gpu_memory_utilization: share of a GPU's memory that may be used, as far as JAX was started with as much; a CPU
        gives CPU_SHARE of what is available.

    Raises:
      ValueError: the device does not report its memory.
    """
    if device.platform == "cpu":
        return int(available_bytes() * CPU_SHARE)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError(f"{device.device_kind} does not report its memory; set num_kv_pages")
    limit = stats["bytes_limit"]
    all_bytes = card_bytes(limit) if device.platform == "gpu" else limit
    return int(min(all_bytes * gpu_memory_utilization, limit * POOL_SHARE)) - stats["bytes_in_use"]


def available_bytes(meminfo: Path = MEMINFO) -> int:
    """Bytes of the machine's memory that programs can still have.

    On Linux, what the kernel says is available: free pages, and those of the page cache that it would give up. On a
    machine that has read a few checkpoints nearly all memory is page cache, and hardly any page free. Elsewhere, what
    sysconf knows: the free pages, or all of them (macOS).

    Args:
      meminfo: of Linux.
    """
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    for name, _, size in (line.partition(":") for line in lines):
        if name == "MemAvailable":
            return int(size.split()[0]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def num_kv_pages(*, free: int, page_bytes: int, useful_pages: int) -> int:
    """Pages of one device's pool, the dump page excluded.

    Args:
      free: bytes for the pool.
      page_bytes: bytes of one page on this device, over its layers.
      useful_pages: more than all slots at full length could use is never allocated.

    Raises:
      ValueError: not even one page fits; the message says what was free.
    """
    fitting = free // page_bytes
    if fitting < 2:
        raise ValueError(
            f"{max(free, 0) / 2**20:.0f} MiB are free for KV pages of {page_bytes / 2**20:.1f} MiB; "
            f"use a smaller page_size or model, or raise gpu_memory_utilization"
        )
    return min(fitting - 1, useful_pages)


def activation_bytes(config: ModelConfig, shapes: StepShapes, itemsize: int) -> int:
    """A generous estimate of a device's ring and largest step: residual, QKV, feed-forward and float32 logits."""
    largest = shapes.all_shapes()[-1]
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_token = 4 * config.hidden_size + 2 * (q_size + 2 * kv_size) + 3 * config.ffn_size
    experts = config.num_experts * (3 * config.expert_ffn_size + 2 * config.hidden_size)
    numbers = largest.num_tokens * per_token + min(largest.num_tokens, EXPERT_BLOCK) * experts
    rows = shapes.num_stages * (largest.num_decode + largest.num_prefill) * shapes.table_width
    return (numbers + 4 * largest.num_logits * config.vocab_size) * max(itemsize, 4) + 4 * rows


def edit_bytes(shapes: StepShapes, vocab_size: int, *, num_devices: int) -> int:
    """What the logit edits of all slots take on one device, once a request has any.

    Args:
      shapes: of the steps.
      vocab_size: tokens of the model, spread over the devices.
      num_devices: of the mesh.
    """
    slice_size = -(-vocab_size // num_devices)
    leaves = jax.eval_shape(lambda: jax.tree.leaves(EditState.zeros(shapes.num_slots + 1, slice_size)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
