"""The kernels of a step besides attention, each compared on this device with numpy or with the same steps in plain JAX.

Owns: the comparisons, their inputs and tolerances.
Does not know: how the results are shown; bench/kernels.py runs them beside those of attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.pallas_experts import expert_groups
from jaxinfer.kernels.pallas_gemm import few_rows_linear
from jaxinfer.kernels.pallas_gemv import RowNorm
from jaxinfer.kernels.pallas_norm import add_norm
from jaxinfer.kernels.pallas_sampling import best_first, largest_threshold
from jaxinfer.layers.linear import gated, project
from jaxinfer.layers.moe import expert_dense
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.residual import PendingSum, total

_EPS = 1e-5
_VOCABULARY = 20_000
_EXACT = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One kernel with one kind of input.

    Args:
      case: what is compared.
      dtype: of the inputs.
      tolerance: the largest error that passes.
      error: runs the kernel and returns its largest error, as a share of the largest result where it is no count.
    """

    case: str
    dtype: str
    tolerance: float
    error: Callable[[], float]


def comparisons() -> list[Comparison]:
    """All of them; results in bfloat16 are rounded to 8 bits, twice where two outputs of experts are added."""
    found = [
        Comparison(
            case=f"experts of {num_tokens} tokens",
            dtype=dtype,
            tolerance=tolerance,
            error=functools.partial(_experts_error, num_tokens, dtype),
        )
        for num_tokens in (1, 40, 300)
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2**-7))
    ]
    found += [
        Comparison(
            case="addition and norm",
            dtype=dtype,
            tolerance=tolerance,
            error=functools.partial(_add_norm_error, dtype),
        )
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2**-7))
    ]
    found += [
        Comparison(
            case=f"linear layer of {num_rows} rows, {num_out} features",
            dtype=dtype,
            tolerance=tolerance,
            error=functools.partial(_few_rows_error, num_rows, num_out, dtype),
        )
        for num_rows, num_out in ((2, 1024), (20, 3000), (33, 6144))
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2**-6))
    ]
    sampling = {"best tokens": _best_first_error, "top-k": _count_error}
    found += [Comparison(case=name, dtype="float32", tolerance=_EXACT, error=error) for name, error in sampling.items()]
    # A float32 sum of the vocabulary may be wrong by so much.
    return [*found, Comparison(case="top-p", dtype="float32", tolerance=1e-5, error=_mass_error)]


def _experts_error(num_tokens: int, dtype: str) -> float:
    """Four experts a token of 24, one of which may be none, as on a shard of a mesh."""
    rng = np.random.default_rng(num_tokens)
    chosen = np.stack([rng.permutation(25)[:4] for _ in range(num_tokens)])
    x, gate_up, down = (
        jnp.asarray(rng.standard_normal(dims, np.float32) / dims[-1] ** 0.5, dtype)
        for dims in ((num_tokens, 256), (24, 2 * 192, 256), (24, 256, 192))
    )
    arguments = (x, jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random((num_tokens, 4)), jnp.float32))
    found, expected = (
        jax.jit(functools.partial(call, gate=jax.nn.silu))(*arguments, gate_up, down)
        for call in (expert_groups, expert_dense)
    )
    return _relative(found, expected)


def _few_rows_error(num_rows: int, num_out: int, dtype: str) -> float:
    rng = np.random.default_rng(num_rows)
    x, weight, bias = (
        jnp.asarray(rng.standard_normal(dims, np.float32) / dims[-1] ** 0.5, dtype)
        for dims in ((num_rows, 1100), (num_out, 1100), (num_out,))
    )
    found = jax.jit(lambda x, w, b: few_rows_linear(x, w, bias=b, gate=jax.nn.silu))(x, weight, bias)
    expected = jax.jit(lambda x, w, b: gated(project(x, w) + b, jax.nn.silu))(x, weight, bias)
    return _relative(found, expected)


def _add_norm_error(dtype: str) -> float:
    rng = np.random.default_rng(4)
    x, y, weight = (
        jnp.asarray(rng.standard_normal(dims, np.float32), dtype) for dims in ((33, 1100),) * 2 + ((1100,),)
    )
    norm = RMSNorm(1100, eps=_EPS, num_stages=None, dtype=weight.dtype)
    norm.weight[...] = weight
    new, normed = jax.jit(lambda x, y, weight: add_norm(x, y, RowNorm(weight, _EPS, 0.0)))(x, y, weight)
    expected = jax.jit(lambda x, y: total(PendingSum(x, y)))(x, y)
    return max(_relative(new, expected), _relative(normed, norm(expected)))


def _relative(found: jax.Array, expected: jax.Array) -> float:
    """The largest difference as a share of the largest value; infinite if a result is not finite."""
    one, other = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    if not np.isfinite(one).all():
        return float("inf")
    return float(np.abs(one - other).max() / np.abs(other).max())


def _depths() -> np.ndarray:
    """Rows of values up to 0: flat, ordinary and peaked ones, one with ties, one with few finite values."""
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((6, _VOCABULARY), np.float32) * np.array(
        [[0.05], [1], [6], [1], [1], [30]], np.float32
    )
    logits[3] = np.round(logits[3] * 8) / 8
    logits[4, 50:] = -np.inf
    return -np.abs(logits - logits.max(axis=1, keepdims=True))


def _best_first_error() -> float:
    """How many of the 65 best ids of all rows are wrong."""
    z = _depths()
    call = jax.jit(functools.partial(best_first, count=65))
    _, ids = call(
        jnp.asarray(z[:, :1040].reshape(6, 65, 16)), jnp.broadcast_to(jnp.arange(65, dtype=jnp.int32), (6, 65))
    )
    order = np.argsort(-z[:, :1040], axis=1, kind="stable")[:, :65]
    return float((np.asarray(ids) != order).sum())


def _count_error() -> float:
    """How many thresholds of top-k are wrong."""
    z, counts = _depths(), np.array([1, 40, 64, 900, 60, 10**6])
    found = _threshold(z, counts.astype(np.float32), by_mass=False)
    order = -np.sort(-z, axis=1)
    expected = [row[count - 1] if count <= _VOCABULARY else -np.inf for row, count in zip(order, counts, strict=True)]
    return float((found != np.array(expected, np.float32)).sum())


def _mass_error() -> float:
    """By how much the mass from the threshold on misses top_p, or that beyond it exceeds top_p."""
    z, top_p = _depths(), np.array([0.9, 0.5, 0.99, 0.7, 0.95, 0.01], np.float32)
    found = _threshold(z, top_p, by_mass=True)[:, None]
    mass = np.exp(z.astype(np.float64))
    mass /= mass.sum(axis=1, keepdims=True)
    reached, beyond = (np.where(kept, mass, 0).sum(axis=1) for kept in (z >= found, z > found))
    return float(np.maximum(top_p - reached, beyond - top_p).max(initial=0.0))


def _threshold(z: np.ndarray, target: np.ndarray, *, by_mass: bool) -> np.ndarray:
    search = functools.partial(largest_threshold, by_mass=by_mass, over_shards=lambda sums: sums)
    floor = jnp.full(len(z), -jnp.inf)
    return np.asarray(jax.jit(search)(jnp.asarray(z), floor=floor, target=jnp.asarray(target)))
