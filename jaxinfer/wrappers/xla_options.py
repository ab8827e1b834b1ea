"""XLA's options for a program, each with the measurement that it is kept for.

Owns: the choice. Does not know: what the programs compute.
"""

from __future__ import annotations

_MANY_TOKENS = 64
"""Tokens from which a step's products are left to cuBLAS."""


def compiler_options(platform: str, num_tokens: int) -> dict[str, str | bool]:
    """Options for a forward program of so many tokens, empty for XLA's defaults.

    Args:
      platform: JAX's name of it.
      num_tokens: T of the step.
    """
    if platform == "gpu" and num_tokens >= _MANY_TOKENS:
        # The autotuner takes each product alone. Triton's win there with split sums, whose addition is one more kernel
        # each: 8B shape on an H100, 128 rows: 13.28 ms with Triton's products, 12.68 without; 32 rows: 7.87 and 7.98.
        return {"xla_gpu_enable_triton_gemm": False}
    return {}
