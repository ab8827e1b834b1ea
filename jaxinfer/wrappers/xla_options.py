"""XLA's options for a program, each with the measurement that justifies it.

Owns: the choice of options, and which programs have matrix products that XLA tunes once for all of them.
Does not know: what the programs compute.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import jax

from jaxinfer.layers.linear import MANY_ROWS


def compiler_options(platform: str, num_tokens: int) -> dict[str, bool | str]:
    """The XLA options of a forward program; empty for XLA's defaults.

    Args:
      platform: JAX's name of the platform, such as "gpu".
      num_tokens: T, the padded tokens of the step.
    """
    if platform == "gpu" and num_tokens >= MANY_ROWS:
        # XLA's autotuner times each matrix product alone. Triton's win there by splitting sums, but every split costs
        # one more kernel, for the addition. Step of an 8B model with 128 rows on an H100: 13.28 ms with Triton's
        # products, 12.68 ms without.
        return {"xla_gpu_enable_triton_gemm": False}
    return {}


def chosen_options(options: Mapping[str, bool | int | float | str] | None) -> dict[str, bool | str]:
    """The options of EngineConfig.xla_options as JAX takes them: it refuses numbers, which XLA reads from text.

    Raises:
      ValueError: the installed XLA does not know an option, or not with this value; the message says which.
    """
    chosen = {name: value if isinstance(value, bool) else str(value) for name, value in (options or {}).items()}
    if chosen:
        try:
            jax.jit(lambda: 0).lower().compile(compiler_options=chosen)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"xla_options must be known to XLA (jax {jax.__version__}): {error}") from error
    return chosen


def tuned_alike(platform: str) -> Mapping[str, Callable[..., Hashable]]:
    """What ProgramCache takes as tuned_alike: XLA tunes matrix products on GPUs, and their shapes follow the tokens.

    Programs that are compiled at the same time would each tune the same products (openxla/xla issue 41620).
    """
    if platform != "gpu":
        return {}
    head = {name: lambda num_rows, *_: ("head", num_rows) for name in ("sample", "sample_edited", "score", "logits")}
    layers = {name: lambda shape, *_: ("layers", shape.num_tokens) for name in ("forward", "chain")}
    return {**layers, **head}
