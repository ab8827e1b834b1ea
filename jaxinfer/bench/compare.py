"""`bench compare`: times the same prompts through another engine (a peer) and through jaxinfer, taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.bench.peers import Peer
from jaxinfer.bench.report import draw_by_batch, format_table
from jaxinfer.bench.session import Session

Prompts = Sequence[tuple[int, ...]]
Generate = Callable[[Prompts], list[list[int]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """How long both sides took for the same work, in turns.

    Args:
      peer_s, ours_s: medians of the seconds of all turns but the first.
      ours_first_s: seconds of jaxinfer's first turn, with compilation.
      equal_rows: share of requests for which both gave exactly the same greedy tokens, over all turns.
    """

    peer_s: float
    ours_s: float
    ours_first_s: float
    equal_rows: float

    @property
    def ratio(self) -> float:
        """peer_s / ours_s, above 1 where jaxinfer is faster."""
        return self.peer_s / self.ours_s


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareRow:
    """The comparison at one batch size; times are medians over the repeats.

    Args:
      batch_size: requests at once.
      prompt_len, output_len: tokens of each request.
      peer_s, ours_s: seconds from prompts to all tokens.
      ratio: peer_s / ours_s, above 1 where jaxinfer is faster.
      peer_threads: CPU threads at which the peer was fastest.
      equal_rows: share of requests for which both gave exactly the same greedy tokens, over all repeats.
    """

    batch_size: int
    prompt_len: int
    output_len: int
    peer_s: float
    ours_s: float
    ratio: float
    peer_threads: int
    equal_rows: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareResult:
    """The comparison with `peer` in `dtype`: one row per batch size, with medians of `repeats` turns of each engine."""

    peer: str
    dtype: str
    rows: tuple[CompareRow, ...]
    repeats: int


def measure(
    session: Session,
    peer: Peer,
    batch_sizes: Sequence[int],
    *,
    dtype: str,
    prompt_len: int,
    output_len: int,
    repeats: int,
    seed: int = 0,
) -> CompareResult:
    """Times greedy generation from random prompts, by the peer and jaxinfer in turns, ignoring the end token.

    Args:
      session: jaxinfer, with slots and context for the largest batch.
      peer: the other engine, with the same weights.
      batch_sizes: numbers of requests at once.
      dtype: of both models, for the record.
      prompt_len, output_len: tokens of each request.
      repeats: timed turns of each engine, after one turn for warm-up.
      seed: of the prompts, which are new at every turn.
    """
    shape = {"prompt_len": prompt_len, "output_len": output_len, "repeats": repeats, "seed": seed}
    bar = tqdm(batch_sizes, desc="compare", unit="batch", disable=None, leave=False)
    rows = tuple(_measure_batch(session, peer, batch_size, **shape) for batch_size in bar)
    return CompareResult(peer=peer.name, dtype=dtype, rows=rows, repeats=repeats)


def _measure_batch(
    session: Session, peer: Peer, batch_size: int, *, prompt_len: int, output_len: int, repeats: int, seed: int
) -> CompareRow:
    peer_threads = peer.tune(session.prompts(batch_size, prompt_len, seed, batch_size))
    turns = take_turns(
        lambda prompts: peer.generate(prompts, output_len),
        lambda prompts: session.generate(prompts, output_len),
        [session.prompts(batch_size, prompt_len, seed, batch_size, number) for number in range(repeats + 1)],
        after_warmup=session.wait_for_programs,
    )
    return CompareRow(
        batch_size=batch_size,
        prompt_len=prompt_len,
        output_len=output_len,
        peer_s=turns.peer_s,
        ours_s=turns.ours_s,
        ratio=turns.ratio,
        peer_threads=peer_threads,
        equal_rows=turns.equal_rows,
    )


def take_turns(
    peer: Generate, ours: Generate, prompts: Sequence[Prompts], *, after_warmup: Callable[[], None]
) -> Turns:
    """Times the peer and jaxinfer in turns.

    Args:
      peer, ours: the work of each side; called with prompts, returns the tokens of each.
      prompts: those of each turn. The first turn is the warm-up of both sides.
      after_warmup: called once, between the first turn and the second.
    """
    peer_times, our_times, equal = [], [], []
    for number, batch in enumerate(prompts):
        peer_s, peer_tokens = _timed(peer, batch)
        ours_s, our_tokens = _timed(ours, batch)
        equal += [theirs == mine for theirs, mine in zip(peer_tokens, our_tokens, strict=True)]
        peer_times.append(peer_s)
        our_times.append(ours_s)
        if not number:
            after_warmup()
    return Turns(
        peer_s=statistics.median(peer_times[1:]),
        ours_s=statistics.median(our_times[1:]),
        ours_first_s=our_times[0],
        equal_rows=sum(equal) / len(equal),
    )


def _timed(generate: Generate, prompts: Prompts) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    tokens = generate(prompts)
    return time.perf_counter() - started, tokens


def render(result: CompareResult) -> str:
    """A table with one row per batch size, and the share of requests for which both gave the same tokens."""
    header = [
        "batch",
        "prompt",
        "output",
        "peer s",
        "ours s",
        "peer tok/s",
        "ours tok/s",
        "ratio",
        "peer threads",
        "rows equal",
    ]
    rows = [
        [row.batch_size, row.prompt_len, row.output_len, row.peer_s, row.ours_s]
        + [row.batch_size * row.output_len / seconds for seconds in (row.peer_s, row.ours_s)]
        + [f"{row.ratio:.2f}", row.peer_threads, f"{100 * row.equal_rows:.0f}%"]
        for row in result.rows
    ]
    return (
        f"peer: {result.peer}, {result.dtype}; greedy, end token ignored, prefill included\n"
        + format_table(header, rows)
        + f"\nmedians of {result.repeats} turns each after a warm-up; ratio above 1: jaxinfer is faster\n"
        + "threads: of the peer, at its fastest"
    )


def draw(result: CompareResult, axes: Any) -> None:
    """Plots both engines' tokens per second against the batch size."""
    series = {
        name: [row.batch_size * row.output_len / getattr(row, seconds) for row in result.rows]
        for name, seconds in (("jaxinfer", "ours_s"), (result.peer, "peer_s"))
    }
    sizes = [row.batch_size for row in result.rows]
    draw_by_batch(axes, sizes, series, value="output tokens per second", title=f"Greedy, {result.dtype}")
