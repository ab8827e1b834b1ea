"""How many KV pages fit.

Owns: the reading of free memory and the arithmetic of the pool's size.
Does not know: what pages are used for.
"""

from __future__ import annotations

import os

import jax

CPU_SHARE = 0.5
"""Of a CPU's available memory, at most, for the KV pool."""


def num_kv_pages(
    *,
    device: jax.Device,
    page_bytes: int,
    useful_pages: int,
    activation_bytes: int,
    gpu_memory_utilization: float,
) -> int:
    """Pages of one device's pool, the dump page excluded.

    Args:
      device: where the weights already are.
      page_bytes: bytes of one page on this device, over its layers.
      useful_pages: more than all slots at full length could use is never allocated.
      activation_bytes: to leave free for the steps themselves.
      gpu_memory_utilization: share of a GPU's memory for weights, KV and activations.

    Raises:
      ValueError: not even one page fits; the message says what was free.
    """
    if device.platform == "cpu":
        free = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_SHARE)
    else:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            raise ValueError(f"{device.device_kind} does not report its memory; set num_kv_pages")
        total = stats["bytes_limit"] * gpu_memory_utilization
        free = int(total - stats["bytes_in_use"]) - activation_bytes
    fitting = free // page_bytes
    if fitting < 2:
        raise ValueError(
            f"{max(free, 0) / 2**20:.0f} MiB are free for KV pages of {page_bytes / 2**20:.1f} MiB; "
            f"use a smaller page_size or model, or raise gpu_memory_utilization"
        )
    return min(fitting - 1, useful_pages)
