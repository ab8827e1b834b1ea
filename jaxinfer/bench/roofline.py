"""`bench roofline`: how near decode and prefill come to what the device can read and multiply.

Owns: the two measured rates, the bytes and operations of a step computed from the model's shape, the floor.
Does not know: how the engine computes a step.

The floor of a step is the longer of bytes / read bandwidth and operations / matmul rate, both measured here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm.auto import tqdm

from jaxinfer.bench.latency import timed_runs
from jaxinfer.bench.report import draw_by_batch, format_table
from jaxinfer.bench.session import Session
from jaxinfer.config import ModelConfig
from jaxinfer.wrappers.assembly import choose_dtype

_DATASHEET_GB_PER_S = {
    "B200": 8000.0,
    "H200": 4800.0,
    "H100 NVL": 3900.0,
    "H100 PCIe": 2000.0,
    "H100": 3350.0,
    "A100-SXM4-80GB": 2039.0,
    "A100 80GB": 1935.0,
    "A100": 1555.0,
    "L40S": 864.0,
    "L4": 300.0,
    "A10G": 600.0,
    "T4": 320.0,
}
_CALLS = 4
_TRIALS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What a step cannot do without.

    Args:
      num_bytes: read from or written to memory.
      num_ops: floating-point operations of the matrix products, a multiplication and an addition counted as two.
    """

    num_bytes: int
    num_ops: int

    def floor_s(self, rates: DeviceRates) -> float:
        """Seconds that no implementation beats at these rates."""
        return max(self.num_bytes / rates.bytes_per_s, self.num_ops / rates.ops_per_s)

    def bound(self, rates: DeviceRates) -> str:
        """ "memory" or "compute", whichever takes longer."""
        is_memory = self.num_bytes / rates.bytes_per_s > self.num_ops / rates.ops_per_s
        return "memory" if is_memory else "compute"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """What the device reached.

    Args:
      bytes_per_s: reading an array far larger than its caches.
      ops_per_s: a square matrix product in the model's dtype.
      datasheet_bytes_per_s: by the maker; None for a device not in the table.
    """

    bytes_per_s: float
    ops_per_s: float
    datasheet_bytes_per_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineRow:
    """A batch size against its floor; medians over the repeats.

    Args:
      batch_size: rows.
      decode_context: KV positions a row reads, mean over the timed steps.
      prompt_len: tokens of each prompt of the prefill.
      decode, prefill: bytes and operations.
      decode_ms, prefill_ms: measured.
      decode_floor_ms, prefill_floor_ms: computed.
      decode_bound, prefill_bound: "memory" or "compute".
    """

    batch_size: int
    decode_context: float
    prompt_len: int
    decode: StepCost
    prefill: StepCost
    decode_ms: float
    prefill_ms: float
    decode_floor_ms: float
    prefill_floor_ms: float
    decode_bound: str
    prefill_bound: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineResult:
    """Rates and rows; `dtype` is the model's, `repeats` the runs that medians are over."""

    rates: DeviceRates
    rows: tuple[RooflineRow, ...]
    dtype: str
    repeats: int


def decode_cost(config: ModelConfig, *, batch_size: int, context: float, itemsize: int) -> StepCost:
    """One decode step: weights once, the KV of every row, float32 logits written and read once.

    Args:
      config: the model's numbers.
      batch_size: rows.
      context: KV positions each row reads, its new one included.
      itemsize: bytes of a weight and of a KV number.
    """
    used, read = (weights + _head_weights(config) for weights in _product_weights(config, batch_size))
    seen = _positions_seen(config, context)
    rows_embedded = batch_size * config.hidden_size
    num_bytes = (read + rows_embedded) * itemsize
    num_bytes += batch_size * seen * 2 * config.num_kv_heads * config.head_dim * itemsize
    num_bytes += 2 * 4 * batch_size * config.vocab_size
    num_ops = batch_size * (2 * used + 4 * config.num_heads * config.head_dim * seen)
    return StepCost(num_bytes=round(num_bytes), num_ops=round(num_ops))


def prefill_cost(config: ModelConfig, *, batch_size: int, prompt_len: int, itemsize: int) -> StepCost:
    """All prompts from nothing to their first token: weights once, KV written and read once, logits of one position.

    Args:
      config: the model's numbers.
      batch_size: prompts.
      prompt_len: tokens of each.
      itemsize: bytes of a weight and of a KV number.
    """
    num_tokens = batch_size * prompt_len
    (used, read), head = _product_weights(config, num_tokens), _head_weights(config)
    kv_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    num_bytes = (read + head + num_tokens * (config.hidden_size + 2 * kv_per_token)) * itemsize
    num_bytes += 2 * 4 * batch_size * config.vocab_size
    seen = sum(_positions_seen(config, position + 1) for position in range(prompt_len))
    num_ops = 2 * used * num_tokens + batch_size * (2 * head + 4 * config.num_heads * config.head_dim * seen)
    return StepCost(num_bytes=round(num_bytes), num_ops=round(num_ops))


def _head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _product_weights(config: ModelConfig, num_tokens: int) -> tuple[float, float]:
    """Weights without embedding and head that one token is multiplied by, and that a step of some tokens reads.

    Norms and biases, a few in ten thousand, count as products. Experts are read if any token asks them; tokens are
    taken to choose evenly and independently.
    """
    tables = 1 if config.tie_word_embeddings else 2
    weights = config.num_parameters - tables * _head_weights(config)
    if not config.num_experts:
        return weights, weights
    experts = 3 * len(config.expert_layers) * config.num_experts * config.hidden_size * config.expert_ffn_size
    share = config.experts_per_token / config.num_experts
    return weights - experts * (1 - share), weights - experts * (1 - share) ** num_tokens


def _positions_seen(config: ModelConfig, context: float) -> float:
    """KV positions one row reads over all layers, windows respected."""
    windows = config.windows or (None,) * config.num_layers
    return sum(context if window is None else min(context, window) for window in windows)


def datasheet_bytes_per_s(device_kind: str) -> float | None:
    """The maker's memory bandwidth of a device, by the name JAX gives it; None for an unknown one."""
    return next((1e9 * rate for name, rate in _DATASHEET_GB_PER_S.items() if name in device_kind), None)


def measure_rates(dtype: Any, *, read_bytes: int, matmul_size: int) -> DeviceRates:
    """The device's read bandwidth and matmul rate, each the best of several trials.

    Args:
      dtype: of the matrices.
      read_bytes: size of the array that is summed; far above the caches.
      matmul_size: rows and columns of the square matrices.
    """
    array = jax.block_until_ready(jnp.ones((read_bytes // 2**14, 2**12), jnp.float32))
    # Two ways to read it; how well XLA's reduction uses all cores differs by platform and version.
    reads = (jax.jit(lambda x: x.sum(axis=1)), jax.jit(lambda x: x @ jnp.ones(x.shape[1], x.dtype)))
    read_s = min(_best_seconds(read, array) for read in reads)
    matrix = jnp.ones((matmul_size, matmul_size), dtype)
    precision = lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else lax.Precision.DEFAULT  # as the layers'
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    return DeviceRates(
        bytes_per_s=array.nbytes / read_s,
        ops_per_s=2 * matmul_size**3 / _best_seconds(product, matrix),
        datasheet_bytes_per_s=datasheet_bytes_per_s(jax.devices()[0].device_kind),
    )


def _best_seconds(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    jax.block_until_ready(function(argument))
    trials = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        jax.block_until_ready([function(argument) for _ in range(_CALLS)])
        trials.append((time.perf_counter() - started) / _CALLS)
    return min(trials)


def measure(
    session: Session,
    batch_sizes: Sequence[int],
    *,
    context: int,
    num_steps: int,
    repeats: int,
    read_bytes: int,
    matmul_size: int,
    seed: int = 0,
) -> RooflineResult:
    """Measures the device's rates, then every batch size against them.

    Args:
      session: with slots and context for the largest batch.
      batch_sizes: rows of a decode step.
      context: KV positions in the middle of the timed steps; the prompts are half of num_steps shorter.
      num_steps: decode steps timed at once.
      repeats: timed runs, after one that is not.
      read_bytes, matmul_size: of measure_rates.
      seed: of the prompts.

    Raises:
      ValueError: the context is too short for the steps, the settings hold no such batch, or the mesh is larger than
        one device.
    """
    for name in ("pipeline_parallel_size", "tensor_parallel_size"):
        if getattr(session.config, name) != 1:
            raise ValueError(
                f"roofline compares with one device: {name} must be 1, got {getattr(session.config, name)}"
            )
    prompt_len = context - num_steps // 2
    if prompt_len < 1:
        raise ValueError(f"context must be above half of the {num_steps} timed steps, got {context}")
    dtype = choose_dtype(session.config.dtype, jax.default_backend())
    rates = measure_rates(dtype, read_bytes=read_bytes, matmul_size=matmul_size)
    rows = []
    for batch_size in tqdm(batch_sizes, desc="roofline", unit="batch", disable=None, leave=False):
        times = timed_runs(session, batch_size, prompt_len, num_steps, repeats, seed)
        decode_context = statistics.mean(entry.mean_context for entry in times)
        shape = {"batch_size": batch_size, "itemsize": dtype.itemsize}
        decode = decode_cost(session.model_config, context=decode_context, **shape)
        prefill = prefill_cost(session.model_config, prompt_len=prompt_len, **shape)
        rows.append(
            RooflineRow(
                batch_size=batch_size,
                decode_context=decode_context,
                prompt_len=prompt_len,
                decode=decode,
                prefill=prefill,
                decode_ms=1e3 * statistics.median(entry.decode_s for entry in times),
                prefill_ms=1e3 * statistics.median(entry.prefill_s for entry in times),
                decode_floor_ms=1e3 * decode.floor_s(rates),
                prefill_floor_ms=1e3 * prefill.floor_s(rates),
                decode_bound=decode.bound(rates),
                prefill_bound=prefill.bound(rates),
            )
        )
    return RooflineResult(rates=rates, rows=tuple(rows), dtype=dtype.name, repeats=repeats)


def render(result: RooflineResult) -> str:
    """The rates, then decode and prefill, one row a batch size."""
    rates = result.rates
    sheet = rates.datasheet_bytes_per_s
    lines = [
        f"read bandwidth {rates.bytes_per_s / 1e9:.1f} GB/s measured, "
        + (f"{sheet / 1e9:.0f} by datasheet" if sheet else "no datasheet figure for this device"),
        f"matmul {rates.ops_per_s / 1e12:.3g} TFLOP/s measured, {result.dtype}",
        "",
    ]
    for kind, length, tokens in (("decode", "context", "decode_context"), ("prefill", "prompt", "prompt_len")):
        header = ["batch", length, "MB", "GFLOP", "bound", "floor ms", f"{kind} ms", "of floor", "tok/s"]
        lines += [format_table(header, [_cells(row, kind, getattr(row, tokens)) for row in result.rows]), ""]
    return "\n".join([*lines, f"medians of {result.repeats} runs after a warm-up"])


def _cells(row: RooflineRow, kind: str, length: float) -> list[Any]:
    cost, bound, floor_ms, ms = (getattr(row, kind + end) for end in ("", "_bound", "_floor_ms", "_ms"))
    num_tokens = row.batch_size * (row.prompt_len if kind == "prefill" else 1)
    shares = [f"{100 * floor_ms / ms:.0f}%", 1e3 * num_tokens / ms]
    return [row.batch_size, round(length), cost.num_bytes / 1e6, cost.num_ops / 1e9, bound, floor_ms, ms, *shares]


def draw(result: RooflineResult, axes: Any) -> None:
    """The measured decode step and its floor against the batch size."""
    series = {
        "decode step, measured": [row.decode_ms for row in result.rows],
        "the device's floor": [row.decode_floor_ms for row in result.rows],
    }
    title = f"Decode step, {result.dtype}, {result.rates.bytes_per_s / 1e9:.0f} GB/s"
    draw_by_batch(axes, [row.batch_size for row in result.rows], series, value="ms per step", title=title)
