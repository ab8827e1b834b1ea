"""`bench roofline`: how near decode and prefill come to the limits of the device.

The floor of a step is the longer of bytes / read bandwidth and operations / matmul rate. No step can be faster.

Owns: the measurement of these two rates, the bytes and operations of a step (computed from the model's shape), and the
floor.
Does not know: how the engine computes a step.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm.auto import tqdm

from jaxinfer.bench.device_profile import Profile, record
from jaxinfer.bench.device_profile import render as render_profile
from jaxinfer.bench.report import draw_by_batch, format_table
from jaxinfer.bench.session import Session
from jaxinfer.config.attention_span import WHOLE_TEXT, AttentionSpan
from jaxinfer.config.model_config import ModelConfig
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
PROFILED_STEPS = 4
_CALLS = 4
_TRIALS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """The work that a step needs at least.

    Args:
      num_bytes: bytes read from or written to memory.
      num_ops: floating-point operations of the matrix products; a multiplication and an addition count as two.
    """

    num_bytes: int
    num_ops: int

    def floor_s(self, rates: DeviceRates) -> float:
        """The least seconds that the step can take at these rates."""
        return max(self.num_bytes / rates.bytes_per_s, self.num_ops / rates.ops_per_s)

    def bound(self, rates: DeviceRates) -> str:
        """ "memory" or "compute", whichever takes longer."""
        is_memory = self.num_bytes / rates.bytes_per_s > self.num_ops / rates.ops_per_s
        return "memory" if is_memory else "compute"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """The rates of the device.

    Args:
      bytes_per_s: measured, reading an array far larger than the caches.
      ops_per_s: measured, in the product of two square matrices in the model's dtype.
      datasheet_bytes_per_s: the memory bandwidth that the maker states; None for a device that is not in the table.
    """

    bytes_per_s: float
    ops_per_s: float
    datasheet_bytes_per_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineRow:
    """A decode step of a batch, or the prefill of one prompt, beside its floor.

    Args:
      kind: "decode" or "prefill".
      batch_size: rows of the decode step; 1 for a prefill.
      num_positions: KV positions that a row reads, mean over the timed steps; for a prefill, the prompt's tokens.
      cost: the bytes and operations needed.
      ms: measured time, median over the repeats.
      floor_ms: the least time, computed from the cost.
      bound: "memory" or "compute", whichever sets the floor.
      host_share: share of `ms` during which the device waits for the host; None without a profile of a GPU.
      profile: a profile of some further steps; None if none was asked for.
    """

    kind: str
    batch_size: int
    num_positions: float
    cost: StepCost
    ms: float
    floor_ms: float
    bound: str
    host_share: float | None
    profile: Profile | None

    @property
    def title(self) -> str:
        """A short name of what is measured, for tables and file names."""
        if self.kind == "decode":
            return f"decode batch {self.batch_size} context {self.num_positions:.0f}"
        return f"prefill {self.num_positions:.0f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineResult:
    """The rates of the device, and all rows.

    Args:
      rates: the device's.
      rows: the decode steps in the order of the batch sizes, then the prefills.
      dtype: the model's.
      repeats: runs over which medians are taken.
      compile_s: seconds until all programs were compiled.
    """

    rates: DeviceRates
    rows: tuple[RooflineRow, ...]
    dtype: str
    repeats: int
    compile_s: float


def decode_cost(
    config: ModelConfig,
    *,
    batch_size: int,
    context: float,
    itemsize: int,
    weight_itemsize: int | None = None,
    span: AttentionSpan = WHOLE_TEXT,
) -> StepCost:
    """The cost of a decode step: weights read once, every row's KV read, float32 logits written and read once.

    Args:
      config: the model's numbers.
      batch_size: rows.
      context: KV positions that each row reads, the new one included.
      itemsize: bytes of a KV number.
      weight_itemsize: bytes of a weight; None for as many.
      span: what the engine's settings let a token see.
    """
    used, read = (weights + _head_weights(config) for weights in _product_weights(config, batch_size))
    seen = _positions_seen(config, context, span)
    rows_embedded = batch_size * config.hidden_size
    num_bytes = (read + rows_embedded) * (weight_itemsize or itemsize)
    num_bytes += batch_size * seen * 2 * config.num_kv_heads * config.head_dim * itemsize
    num_bytes += 2 * 4 * batch_size * config.vocab_size
    num_ops = batch_size * (2 * used + 4 * config.num_heads * config.head_dim * seen)
    return StepCost(num_bytes=round(num_bytes), num_ops=round(num_ops))


def prefill_cost(
    config: ModelConfig,
    *,
    batch_size: int,
    prompt_len: int,
    itemsize: int,
    weight_itemsize: int | None = None,
    span: AttentionSpan = WHOLE_TEXT,
) -> StepCost:
    """The cost of prefilling prompts up to the first token: weights read once, KV written and read once.

    Each prompt computes the logits of its last position only.

    Args:
      config: the model's numbers.
      batch_size: prompts.
      prompt_len: tokens of each.
      itemsize: bytes of a KV number.
      weight_itemsize: bytes of a weight; None for as many.
      span: what the engine's settings let a token see.
    """
    num_tokens = batch_size * prompt_len
    (used, read), head = _product_weights(config, num_tokens), _head_weights(config)
    kv_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    num_bytes = (read + head + num_tokens * config.hidden_size) * (weight_itemsize or itemsize)
    num_bytes += num_tokens * 2 * kv_per_token * itemsize
    num_bytes += 2 * 4 * batch_size * config.vocab_size
    seen = sum(_positions_seen(config, position + 1, span) for position in range(prompt_len))
    num_ops = 2 * used * num_tokens + batch_size * (2 * head + 4 * config.num_heads * config.head_dim * seen)
    return StepCost(num_bytes=round(num_bytes), num_ops=round(num_ops))


def _head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _product_weights(config: ModelConfig, num_tokens: int) -> tuple[float, float]:
    """How many weights multiply one token, and how many a step of num_tokens tokens reads; embedding and head apart.

    Norms and biases, a few weights in ten thousand, are counted like the others. An expert is read if any token chooses
    it; tokens are assumed to choose evenly and independently.
    """
    tables = 1 if config.tie_word_embeddings else 2
    weights = config.num_parameters - tables * _head_weights(config)
    if not config.num_experts:
        return weights, weights
    experts = 3 * len(config.expert_layers) * config.num_experts * config.hidden_size * config.expert_ffn_size
    share = config.experts_per_token / config.num_experts
    return weights - experts * (1 - share), weights - experts * (1 - share) ** num_tokens


def _positions_seen(config: ModelConfig, context: float, span: AttentionSpan) -> float:
    """KV positions that one row reads, summed over all layers; a layer with a window reads only that."""
    spans = map(span.within, config.layer_windows)
    return sum(context if own.window is None else min(context, own.window + own.sink_tokens) for own in spans)


def datasheet_bytes_per_s(device_kind: str) -> float | None:
    """The maker's memory bandwidth of a device, by the name JAX gives it; None for an unknown one."""
    return next((1e9 * rate for name, rate in _DATASHEET_GB_PER_S.items() if name in device_kind), None)


def rate_sizes(platform: str) -> tuple[int, int]:
    """Sizes that tell a device's rates: bytes to read, far above its caches, and rows of the square product.

    Args:
      platform: JAX's name of the platform, such as "gpu".
    """
    return (512 * 2**20, 2048) if platform == "cpu" else (4096 * 2**20, 8192)


def measure_rates(dtype: Any, *, read_bytes: int, matmul_size: int) -> DeviceRates:
    """The device's read bandwidth and matmul rate, each the best of several trials.

    Args:
      dtype: of the matrices.
      read_bytes: size of the array that is summed; far above the caches.
      matmul_size: rows and columns of the square matrices.
    """
    # The numbers are random, since products of equal numbers take less power and so less time: with the 8B shape on an
    # H100, a prompt of one token repeated 8,192 times took 205 ms, a random one 232 ms.
    keys = jax.random.split(jax.random.key(0))
    array = jax.block_until_ready(jax.random.normal(keys[0], (read_bytes // 2**14, 2**12)))
    # The array is read in two ways, since XLA's reduction uses all cores on some platforms and versions only.
    reads = (jax.jit(lambda x: x.sum(axis=1)), jax.jit(lambda x: x @ jnp.ones(x.shape[1], x.dtype)))
    read_s = min(_best_seconds(read, array) for read in reads)
    matrix = jax.random.normal(keys[1], (matmul_size, matmul_size), dtype)
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
    prefill_lens: Sequence[int],
    num_steps: int,
    repeats: int,
    read_bytes: int,
    matmul_size: int,
    seed: int = 0,
    profiled: bool = False,
    keep: Path | None = None,
) -> RooflineResult:
    """Measures the device's rates, then decode steps at every batch size and the prefill of every prompt length.

    Args:
      session: the engine, with slots and context for the largest batch and the longest prompt.
      batch_sizes: numbers of rows of a decode step.
      context: KV positions of a row in the middle of the timed steps; prompts are shorter by half of these steps.
      prefill_lens: lengths in tokens of prompts that are prefilled alone.
      num_steps: launches of decode steps in one timed run; a launch can hold several steps.
      repeats: timed runs, after one for warm-up.
      read_bytes, matmul_size: as in measure_rates.
      seed: of the prompts.
      profiled: whether to record some steps of every row with the profiler as well.
      keep: folder for the profiler's files; None keeps none.

    Raises:
      ValueError: the context is too short for the steps, the engine's settings have no room for a batch, or the mesh is
        larger than one device.
    """
    for name in ("pipeline_parallel_size", "tensor_parallel_size"):
        if getattr(session.config, name) != 1:
            raise ValueError(
                f"roofline compares with one device: {name} must be 1, got {getattr(session.config, name)}"
            )
    all_steps = max(num_steps * session.chain_len(size) for size in batch_sizes) * (repeats + 1)
    if context <= all_steps // 2:
        raise ValueError(f"context must be above half of the {all_steps} steps of all runs, got {context}")
    dtype = choose_dtype(session.config.dtype, jax.default_backend())
    rates = measure_rates(dtype, read_bytes=read_bytes, matmul_size=matmul_size)
    bench = _Bench(
        batch_sizes=batch_sizes,
        context=context,
        prefill_lens=prefill_lens,
        num_steps=num_steps,
        repeats=repeats,
        seed=seed,
        profiled=profiled,
        keep=keep,
        rates=rates,
        itemsize=dtype.itemsize,
        weight_itemsize=session.decoder.layout.matrix_dtype.itemsize,
    )

    started = time.perf_counter()
    rehearsal = dataclasses.replace(bench, profiled=False)
    session.compile_for(lambda session: _run_all(rehearsal, session))
    compile_s = time.perf_counter() - started
    rows = _run_all(bench, session)
    return RooflineResult(rates=rates, rows=rows, dtype=dtype.name, repeats=repeats, compile_s=compile_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bench:
    """The arguments of measure, and the device's rates."""

    batch_sizes: Sequence[int]
    context: int
    prefill_lens: Sequence[int]
    num_steps: int
    repeats: int
    seed: int
    profiled: bool
    keep: Path | None
    rates: DeviceRates
    itemsize: int
    weight_itemsize: int


def _run_all(bench: _Bench, session: Session) -> tuple[RooflineRow, ...]:
    work = [(_decode, size) for size in bench.batch_sizes] + [(_prefill, length) for length in bench.prefill_lens]
    bar = tqdm(work, desc="roofline", unit="row", disable=None, leave=False)
    return tuple(run(bench, session, number) for run, number in bar)


def _decode(bench: _Bench, session: Session, batch_size: int) -> RooflineRow:
    # Steps are counted in launches, as those in flight when a run begins or ends blur its time.
    num_steps = bench.num_steps * session.chain_len(batch_size)
    prompt_len = bench.context - num_steps * (bench.repeats + 1) // 2
    with session.decoding(session.prompts(batch_size, prompt_len, bench.seed, batch_size)) as decoding:
        decoding.run(num_steps)
        first = decoding.mean_len
        seconds = statistics.median(decoding.run(num_steps) for _ in range(bench.repeats))
        context = (first + decoding.mean_len - 1) / 2  # the first timed step reads `first` positions
        cost = decode_cost(
            session.model_config,
            batch_size=batch_size,
            context=context,
            itemsize=bench.itemsize,
            weight_itemsize=bench.weight_itemsize,
            span=session.config.span,
        )
        num_steps = max(min(bench.num_steps, PROFILED_STEPS), session.chain_len(batch_size))
        return _row(bench, "decode", batch_size, context, cost, seconds, lambda: decoding.run(num_steps), num_steps)


def _prefill(bench: _Bench, session: Session, length: int) -> RooflineRow:
    def run(number: int) -> float:
        prompts = session.prompts(1, length, bench.seed, length, number)  # new ones, not in the prefix cache
        started = time.perf_counter()
        session.generate(prompts, 1)
        return time.perf_counter() - started

    seconds = statistics.median([run(number) for number in range(bench.repeats + 1)][1:])
    cost = prefill_cost(
        session.model_config,
        batch_size=1,
        prompt_len=length,
        itemsize=bench.itemsize,
        weight_itemsize=bench.weight_itemsize,
        span=session.config.span,
    )
    return _row(bench, "prefill", 1, length, cost, seconds, lambda: run(bench.repeats + 1), 1)


def _row(
    bench: _Bench,
    kind: str,
    batch_size: int,
    num_positions: float,
    cost: StepCost,
    seconds: float,
    again: Callable[[], object],
    num_steps: int,
) -> RooflineRow:
    profile = None
    if bench.profiled:
        keep = bench.keep and bench.keep / f"{kind}-{batch_size}-{num_positions:.0f}.xplane.pb.gz"
        try:
            profile = record(again, num_steps=num_steps, keep=keep)
        except (RuntimeError, OSError) as error:  # the times are worth having without the profiler
            print(f"warning: no profile of {kind} {batch_size}: {error}", file=sys.stderr)
    return RooflineRow(
        kind=kind,
        batch_size=batch_size,
        num_positions=num_positions,
        cost=cost,
        ms=1e3 * seconds,
        floor_ms=1e3 * cost.floor_s(bench.rates),
        bound=cost.bound(bench.rates),
        host_share=profile.idle_share(1e3 * seconds) if profile is not None and profile.is_device else None,
        profile=profile,
    )


def render(result: RooflineResult) -> str:
    """The rates, a table with one decode step or prefill per row, then the profiles."""
    rates = result.rates
    sheet = rates.datasheet_bytes_per_s
    lines = [
        f"read bandwidth {rates.bytes_per_s / 1e9:.1f} GB/s measured, "
        + (f"{sheet / 1e9:.0f} by datasheet" if sheet else "no datasheet figure for this device"),
        f"matmul {rates.ops_per_s / 1e12:.3g} TFLOP/s measured, {result.dtype}",
        "",
    ]
    for kind, length in (("decode", "context"), ("prefill", "prompt")):
        header = ["batch", length, "MB", "GFLOP", "bound", "floor ms", f"{kind} ms", "of floor", "tok/s", "host"]
        if cells := [_cells(row) for row in result.rows if row.kind == kind]:
            lines += [format_table(header, cells), ""]
    lines.append(f"medians of {result.repeats} runs after a warm-up; programs ready after {result.compile_s:.1f} s")
    lines.append("host: share of the step during which the device waits; needs the profiler of a GPU")
    for row in result.rows:
        if row.profile is not None:
            lines += ["", render_profile(row.title, row.profile)]
    return "\n".join(lines)


def _cells(row: RooflineRow) -> list[Any]:
    num_tokens = row.num_positions if row.kind == "prefill" else row.batch_size
    host = "-" if row.host_share is None else f"{100 * row.host_share:.0f}%"
    costs = [row.cost.num_bytes / 1e6, row.cost.num_ops / 1e9, row.bound, row.floor_ms, row.ms]
    share = f"{100 * row.floor_ms / row.ms:.0f}%"
    return [row.batch_size, round(row.num_positions), *costs, share, 1e3 * num_tokens / row.ms, host]


def draw(result: RooflineResult, axes: Any) -> None:
    """Plots the measured decode step and its floor against the batch size."""
    rows = [row for row in result.rows if row.kind == "decode"]
    series = {
        "decode step, measured": [row.ms for row in rows],
        "the device's floor": [row.floor_ms for row in rows],
    }
    title = f"Decode step, {result.dtype}, {result.rates.bytes_per_s / 1e9:.0f} GB/s"
    draw_by_batch(axes, [row.batch_size for row in rows], series, value="ms per step", title=title)
