"""`bench kernels`: compares the kernels with their oracles on this device, and times those of attention.

A backend that cannot run a case fails that case only.

Owns: the grid of small cases, the two large cases in the shape of an 8B model, their bytes and operations.
Does not know: how a backend works.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxinfer.bench.report import format_table
from jaxinfer.bench.step_kernels import Comparison
from jaxinfer.kernels.paged_attention import BACKENDS, paged_attention

ORACLE = "reference"
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest allowed error of results of size one. Float32 results differ by the order of sums, bfloat16 ones by two
roundings to 8 bits of mantissa. TF32 products, which must not be used for float32, would be off by 1e-3."""
_PAGE_SIZE = 64
_CALLS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCase:
    """One call of paged attention.

    Args:
      name: what the case tests.
      num_rows, num_queries: R and Q.
      num_heads, num_kv_heads, head_dim: N, K and H.
      max_len: KV positions of the longest row.
      dtype: of queries and pages.
      same_text: whether the rows are consecutive blocks of one prompt; else each row has a text of its own, with
        lengths from 0 to max_len.
      full: whether every row has num_queries live queries and (unless they share a text) max_len positions.
      features: any of the keywords window, sink_tokens, softcap and sinks=True.
    """

    name: str
    num_rows: int
    num_queries: int
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    max_len: int = 200
    dtype: str = "float32"
    same_text: bool = False
    full: bool = False
    features: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRow:
    """One case's result on one backend.

    Args:
      case, dtype, backend: names of the case, its dtype and the backend.
      tolerance: the largest max_error that passes.
      max_error: largest absolute difference from the oracle or, for a timed case, from the first backend that ran; NaN
        if the case failed or was not compared.
      failure: the first line of the backend's error; empty if it ran.
      ms: time of one call; None for a case that is not timed.
      bytes_per_s, ops_per_s: rates of the necessary work only (live positions, each text's pages read once); None where
        ms is.
    """

    case: str
    dtype: str
    backend: str
    tolerance: float
    max_error: float
    failure: str = ""
    ms: float | None = None
    bytes_per_s: float | None = None
    ops_per_s: float | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the backend ran and is within the tolerance."""
        return not self.failure and not self.max_error > self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelResult:
    """All cases through all backends."""

    rows: tuple[KernelRow, ...]

    @property
    def is_ok(self) -> bool:
        """Whether all cases ran and are within their tolerances."""
        return all(row.is_ok for row in self.rows)


def small_cases() -> list[KernelCase]:
    """The grid of decode and prefill, head sizes, group sizes and features; each occurs in at least one dtype."""
    kinds: dict[str, dict[str, Any]] = {
        "decode": {"num_rows": 7, "num_queries": 1},
        "prefill": {"num_rows": 7, "num_queries": 16},
    }
    everything = {"window": 70, "sink_tokens": 20, "softcap": 3.0, "sinks": True}
    features = {name: {name: value} for name, value in everything.items()}
    features["sink_tokens"]["window"] = everything["window"]
    varied: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        *((f"head {size}", ("float32", "bfloat16"), {"head_dim": size}) for size in (64, 80, 128)),
        *(
            (f"group {n // k}", ("bfloat16",), {"num_heads": n, "num_kv_heads": k})
            for n, k in ((2, 2), (9, 3), (16, 1))
        ),
        *((name, ("float32",), {"features": values}) for name, values in features.items()),
        ("all features", ("float32", "bfloat16"), {"features": everything}),
        ("one text", ("bfloat16",), {"same_text": True}),
    ]
    return [
        KernelCase(name=f"{kind} {name}", dtype=dtype, **shape | change)
        for kind, shape in kinds.items()
        for name, dtypes, change in varied
        for dtype in dtypes
    ]


def large_cases(*, num_rows: int, context: int, prompt_len: int, block: int = 16) -> list[KernelCase]:
    """The attention of one layer of an 8B model in bfloat16: a decode step, and a whole prompt in blocks.

    Args:
      num_rows: rows of the decode step.
      context: KV positions of each of these rows.
      prompt_len: tokens of the prompt.
      block: queries of each row of the prompt.
    """
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "full": True}
    return [
        KernelCase(name=f"decode {num_rows} x {context}", num_rows=num_rows, num_queries=1, max_len=context, **shape),
        KernelCase(
            name=f"prefill {prompt_len}",
            num_rows=prompt_len // block,
            num_queries=block,
            max_len=prompt_len,
            same_text=True,
            **shape,
        ),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """A case's arrays: the arguments of paged_attention in order, and its keywords that are arrays."""

    arguments: tuple[jax.Array, ...]
    sinks: jax.Array | None
    kv_len: np.ndarray
    q_len: np.ndarray


def make_inputs(case: KernelCase, seed: int = 0) -> _Inputs:
    """A case's random queries and pages, with each text's pages scattered over the pool.

    Args:
      case: the case.
      seed: of all random numbers.
    """
    rng = np.random.default_rng(seed)
    kv_len, q_len = _lengths(case, rng)
    width = -(-case.max_len // _PAGE_SIZE)
    num_texts = 1 if case.same_text else case.num_rows
    table = rng.permutation(num_texts * width).reshape(num_texts, width) + 1
    table = np.broadcast_to(table, (case.num_rows, width))
    pool = (num_texts * width + 1, case.num_kv_heads, _PAGE_SIZE, case.head_dim)
    queries = (case.num_rows, case.num_queries, case.num_heads, case.head_dim)
    floats = [_normal(shape, case, rng) for shape in (queries, pool, pool)]
    ints = [jnp.asarray(array, jnp.int32) for array in (table, kv_len, q_len)]
    sinks = jnp.asarray(rng.standard_normal(case.num_heads, np.float32)) if "sinks" in case.features else None
    return _Inputs(arguments=(*floats, *ints), sinks=sinks, kv_len=kv_len, q_len=q_len)


def _lengths(case: KernelCase, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """kv_len and q_len of every row."""
    rows = np.arange(case.num_rows)
    if case.same_text:  # row i holds block i of the text
        return (rows + 1) * case.num_queries, np.full_like(rows, case.num_queries)
    if case.full:
        return np.full_like(rows, case.max_len), np.full_like(rows, case.num_queries)
    kv_len = np.linspace(0, case.max_len, case.num_rows).astype(int)  # an empty row among them
    return kv_len, np.minimum(kv_len, rng.integers(1, case.num_queries + 1, case.num_rows))


def _normal(shape: tuple[int, ...], case: KernelCase, rng: np.random.Generator) -> jax.Array:
    if case.full:  # large: drawn on the device
        return jax.random.normal(jax.random.key(int(rng.integers(2**31))), shape, case.dtype)
    return jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)


def attention_of(case: KernelCase, backend: str) -> Any:
    """A jitted call of one backend: a function of the sinks (or None), then paged_attention's arrays in order."""
    features = {name: value for name, value in case.features.items() if name != "sinks"}
    sequence_id = jnp.zeros(case.num_rows, jnp.int32) if case.same_text else None
    call = functools.partial(
        paged_attention, scale=case.head_dim**-0.5, backend=backend, sequence_id=sequence_id, **features
    )
    return jax.jit(lambda sinks, *arguments: call(*arguments, sinks=sinks))


def cost(case: KernelCase, inputs: _Inputs) -> tuple[int, int]:
    """The bytes (queries, results, each text's keys and values once) and the operations (of visible scores) needed."""
    texts = inputs.kv_len.max() if case.same_text else inputs.kv_len.sum()
    itemsize = jnp.dtype(case.dtype).itemsize
    num_bytes = 2 * int(texts) * case.num_kv_heads * case.head_dim * itemsize
    num_bytes += 2 * int(inputs.q_len.sum()) * case.num_heads * case.head_dim * itemsize
    kv_len, q_len = inputs.kv_len.astype(np.int64), inputs.q_len.astype(np.int64)
    visible = int((q_len * kv_len - q_len * (q_len - 1) // 2).sum())  # query j of a row sees one position more than j-1
    return num_bytes, 4 * visible * case.num_heads * case.head_dim


def measure(
    cases: Sequence[KernelCase],
    timed: Sequence[KernelCase],
    *,
    others: Sequence[Comparison] = (),
    backends: Sequence[str] = (),
    seed: int = 0,
) -> KernelResult:
    """Compares every backend with the oracle, then times them.

    Args:
      cases: small cases, compared with the oracle.
      others: comparisons of kernels other than attention; they are part of the backend "pallas".
      timed: large cases, which are timed. Backends are compared with the first one that ran, since the oracle's memory
        grows with rows times positions.
      backends: names in BACKENDS; empty for all but the oracle.
      seed: of the arrays.
    """
    names = list(backends) or [name for name in BACKENDS if name != ORACLE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiling takes far longer than running
        small = pool.map(lambda case: _compiled(case, [ORACLE, *names], seed), cases)
        rows = [row for compiled in tqdm(small, **_bar(cases)) for row in _compared(compiled)]
        if "pallas" in names:
            rows += pool.map(_other, others)
    large = [_timed(_compiled(case, names, seed)) for case in timed]
    return KernelResult(rows=tuple(rows + [row for each in large for row in each]))


def _other(comparison: Comparison) -> KernelRow:
    """The result of a comparison."""
    about: dict[str, Any] = {"case": comparison.case, "dtype": comparison.dtype, "tolerance": comparison.tolerance}
    try:
        return KernelRow(backend="pallas", max_error=comparison.error(), **about)
    except Exception as error:  # whatever a kernel raises fails this case only
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return KernelRow(backend="pallas", max_error=float("nan"), failure=failure, **about)


def _bar(cases: Sequence[KernelCase]) -> dict[str, Any]:
    return {"total": len(cases), "desc": "kernels", "unit": "case", "disable": None, "leave": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Compiled:
    """A case, its arrays, and for each backend the compiled call or the compiler's error."""

    case: KernelCase
    inputs: _Inputs
    calls: dict[str, Callable[[], jax.Array] | Exception]


def _compiled(case: KernelCase, backends: Sequence[str], seed: int) -> _Compiled:
    inputs = make_inputs(case, seed)
    arrays = (inputs.sinks, *inputs.arguments)
    calls: dict[str, Callable[[], jax.Array] | Exception] = {}
    for backend in backends:
        try:
            calls[backend] = functools.partial(attention_of(case, backend).lower(*arrays).compile(), *arrays)
        except Exception as error:  # a backend may lack a case, and its compiler may raise anything
            calls[backend] = error
    return _Compiled(case=case, inputs=inputs, calls=calls)


def _compared(compiled: _Compiled) -> list[KernelRow]:
    """Every backend's result against the oracle's."""
    oracle = compiled.calls[ORACLE]
    if isinstance(oracle, Exception):
        raise oracle
    expected = oracle()
    return [_row(compiled, name, expected)[0] for name in compiled.calls if name != ORACLE]


def _timed(compiled: _Compiled) -> list[KernelRow]:
    """Every backend's times, and its result against the first one's that ran."""
    rows, expected = [], None
    for name in compiled.calls:
        row, found = _row(compiled, name, expected, is_timed=True)
        rows.append(row)
        expected = found if expected is None else expected
    return rows


def _row(
    compiled: _Compiled, backend: str, expected: jax.Array | None, *, is_timed: bool = False
) -> tuple[KernelRow, jax.Array | None]:
    """Runs a case on a backend; returns the row and the backend's result."""
    case, call = compiled.case, compiled.calls[backend]
    about: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype,
        "backend": backend,
        "tolerance": TOLERANCES[case.dtype],
    }
    try:
        if isinstance(call, Exception):
            raise call
        found = jax.block_until_ready(call())
        ms = 1e3 * _seconds(call) if is_timed else None
    except Exception as error:  # whatever a kernel raises fails this case only
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return KernelRow(max_error=float("nan"), failure=failure, **about), None
    max_error = float("nan") if expected is None else _max_error(found, expected)
    num_bytes, num_ops = cost(case, compiled.inputs)
    rates: dict[str, Any] = {} if ms is None else {"bytes_per_s": 1e3 * num_bytes / ms, "ops_per_s": 1e3 * num_ops / ms}
    return KernelRow(max_error=max_error, ms=ms, **rates, **about), found


def _max_error(found: jax.Array, expected: jax.Array) -> float:
    """The largest absolute difference; infinite if a result is not finite, so that such a result cannot pass."""
    difference = jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32))
    return float(jnp.where(jnp.isfinite(difference), difference, jnp.inf).max())


def _seconds(call: Callable[[], jax.Array]) -> float:
    """Seconds of one call: the better of two series of calls; a slow call is timed once."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - started
    if once > 0.5:
        return once
    trials = []
    for _ in range(2):
        started = time.perf_counter()
        jax.block_until_ready([call() for _ in range(_CALLS)][-1])
        trials.append((time.perf_counter() - started) / _CALLS)
    return min(trials)


def render(result: KernelResult) -> str:
    """The worst case of each backend and dtype, every case that failed, then the timed cases."""
    lines = []
    compared = [row for row in result.rows if row.ms is None]
    groups = sorted({(row.backend, row.dtype) for row in compared})
    table = []
    for backend, dtype in groups:
        rows = [row for row in compared if (row.backend, row.dtype) == (backend, dtype)]
        ran = [row for row in rows if not row.failure]
        worst = max(ran, key=lambda row: row.max_error, default=None)
        table.append(
            [backend, dtype, f"{sum(row.is_ok for row in rows)}/{len(rows)}"]
            + ([f"{worst.max_error:.1e}", worst.case] if worst else ["-", "-"])
        )
    lines.append(format_table(["backend", "dtype", "right", "largest error", "in"], table))
    lines += [
        f"WRONG: {row.backend} {row.dtype} {row.case}: {row.failure or f'off by {row.max_error:.1e}'}"
        for row in result.rows
        if not row.is_ok
    ]
    timed = [
        [row.case, row.backend, row.ms, row.bytes_per_s / 1e9, row.ops_per_s / 1e12, f"{row.max_error:.1e}"]
        for row in result.rows
        if row.ms is not None and row.bytes_per_s is not None and row.ops_per_s is not None
    ]
    if timed:
        header = ["one layer of 8B, bfloat16", "backend", "ms", "GB/s", "TFLOP/s", "off the first"]
        lines += ["", format_table(header, timed)]
    return "\n".join(lines)
