"""`bench compare --apart`: another engine (a peer) in a process of its own, then jaxinfer, both with random weights.

Each side draws its own weights from the same distribution, so that no checkpoint has to be written. The tokens
therefore differ and are not compared.

Owns: the peer's process, which ends before jaxinfer takes the device's memory, and the ratio of the times.
Does not know: any single peer.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.bench import peers
from jaxinfer.bench.report import format_table
from jaxinfer.bench.session import Session
from jaxinfer.bench.workload import random_prompts

_LINE_START = "{"
_PROGRAM = "from jaxinfer.bench.compare_apart import run_peer; run_peer()"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Something to time: requests of one length that all arrive at the start.

    Args:
      num_requests: how many.
      is_trace: whether they are served by continuous batching; else they are one batch for `generate`.
      prompt_len, output_len: tokens of each request.
    """

    num_requests: int
    is_trace: bool
    prompt_len: int
    output_len: int

    @property
    def title(self) -> str:
        """A short description, for tables."""
        return f"trace of {self.num_requests}" if self.is_trace else f"batch of {self.num_requests}"

    def prompts(self, vocab_size: int, seed: int, number: int) -> list[tuple[int, ...]]:
        """The random prompts of turn `number`; every turn has others."""
        return random_prompts([self.prompt_len] * self.num_requests, vocab_size=vocab_size, seed=(seed, number))


@dataclass(frozen=True, kw_only=True, slots=True)
class SideTimes:
    """How long one side took for one work.

    Args:
      first_s: seconds of the first turn, with all compilation, also what jaxinfer compiles before that turn. The first
        turn of a trace has a sixteenth of the requests.
      seconds: median of the later turns.
      is_whole: False for a side that was stopped in its second turn; `seconds` is then the time until it was stopped.
    """

    first_s: float
    seconds: float
    is_whole: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ApartRow:
    """One work's times on both sides.

    Args:
      work: what was timed.
      peer: the peer's times; None if it failed.
      ours: jaxinfer's times.
      failure: the peer's error; empty if it did not fail.
    """

    work: Work
    peer: SideTimes | None
    ours: SideTimes
    failure: str = ""

    @property
    def ratio(self) -> float | None:
        """The peer's seconds divided by jaxinfer's, above 1 where jaxinfer is faster; None if the peer failed.

        If the peer was stopped, this is a lower bound.
        """
        return None if self.peer is None else self.peer.seconds / self.ours.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class ApartResult:
    """The comparison with `peer` in `dtype`: one row per work, medians of `repeats` turns after one for warm-up."""

    peer: str
    dtype: str
    repeats: int
    peer_load_s: float
    rows: tuple[ApartRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerOrder:
    """The instructions for the peer's process.

    Args:
      peer: a name in peers.PEERS.
      fields: of config.json.
      dtype: of the model.
      platform: JAX's name of the device's kind, such as "gpu".
      works: what to time, in this order.
      max_num_seqs: requests of a trace that run at once.
      repeats: turns that are counted.
      seed: of the prompts.
      limit_s: seconds after which the peer is stopped.
    """

    peer: str
    fields: dict[str, Any]
    dtype: str
    platform: str
    works: tuple[Work, ...]
    max_num_seqs: int
    repeats: int
    seed: int
    limit_s: float


def measure(order: PeerOrder, open_session: Callable[[], Any]) -> ApartResult:
    """Times the peer in its own process, then jaxinfer in this one.

    Args:
      order: what both sides are to do.
      open_session: makes a context manager that yields a Session; called after the peer's process has ended.

    Raises:
      ValueError: the peer's process failed before its first work.
    """
    found = _peer_times(order)
    with open_session() as session:
        ours = [_our_times(session, order, work) for work in order.works]
    rows = [
        ApartRow(work=work, peer=None, ours=mine, failure=theirs)
        if isinstance(theirs, str)
        else ApartRow(work=work, peer=SideTimes(**theirs), ours=mine)
        for work, theirs, mine in zip(order.works, found["works"], ours, strict=True)
    ]
    return ApartResult(
        peer=found["name"], dtype=order.dtype, repeats=order.repeats, peer_load_s=found["load_s"], rows=tuple(rows)
    )


def _peer_times(order: PeerOrder) -> dict[str, Any]:
    """Runs the peer's process and reads the lines it writes, also those of a process that had to be stopped."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stopped_at = None
    try:
        out, err = process.communicate(json.dumps(dataclasses.asdict(order)), timeout=order.limit_s)
    except subprocess.TimeoutExpired:
        stopped_at = time.time()
        process.kill()
        out, err = process.communicate()
    if stopped_at is None and process.returncode:
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the peer's process ended with {process.returncode}: {last}")
    lines = [json.loads(line) for line in out.splitlines() if line.startswith(_LINE_START)]
    return _read_lines(lines, len(order.works), order.peer, stopped_at, order.limit_s)


def _read_lines(
    lines: Sequence[dict[str, Any]], num_works: int, peer: str, stopped_at: float | None, limit_s: float
) -> dict[str, Any]:
    """Parses a peer process's lines: its name, the seconds it took to load, and each work's times or failure."""
    found: dict[str, Any] = {"name": peer, "load_s": float("nan")}
    works: list[dict[str, Any] | str] = [f"stopped after {limit_s:.0f} s; raise peer_limit"] * num_works
    for line in lines:
        if "number" not in line:
            found |= line
        elif "result" in line:
            works[line["number"]] = line["result"]
        elif stopped_at is not None:
            seconds = stopped_at - line["began_at"]
            works[line["number"]] = {"first_s": line["first_s"], "seconds": seconds, "is_whole": False}
    return found | {"works": works}


def run_peer() -> None:
    """The peer's process: reads a PeerOrder from standard input and prints a line of JSON after each part of it."""
    spec = json.load(sys.stdin)
    order = PeerOrder(**spec | {"works": tuple(Work(**work) for work in spec["works"])})
    started = time.perf_counter()
    peer = peers.load_peer(order.peer, order.fields, dtype=order.dtype, platform=order.platform)
    _print_line({"name": peer.name, "load_s": time.perf_counter() - started})
    for number, work in enumerate(order.works):

        def begin(first_s: float, number: int = number) -> None:
            _print_line({"number": number, "began_at": time.time(), "first_s": first_s})

        result: dict[str, Any] | str
        try:
            result = dataclasses.asdict(_times(_runner(peer, order, work), order, work, begin))
        except Exception as error:  # the peer's failure is a result; the other works go on
            result = f"{type(error).__name__}: {error}".splitlines()[0]
        _print_line({"number": number, "result": result})


def _print_line(entry: dict[str, Any]) -> None:
    print(json.dumps(entry), flush=True)


def _runner(peer: peers.Peer, order: PeerOrder, work: Work) -> Callable[[Sequence[tuple[int, ...]]], object]:
    if work.is_trace:
        return lambda prompts: peer.serve(prompts, work.output_len, max_num_seqs=order.max_num_seqs)
    peer.tune(work.prompts(order.fields["vocab_size"], order.seed, order.repeats + 1))
    return lambda prompts: peer.generate(prompts, work.output_len)


def _our_times(session: Session, order: PeerOrder, work: Work) -> SideTimes:
    def run(prompts: Sequence[tuple[int, ...]], session: Session = session) -> object:
        return session.generate(prompts, work.output_len)

    started = time.perf_counter()
    session.compile_for(lambda dry: run(work.prompts(order.fields["vocab_size"], order.seed, 0), dry))
    compile_s = time.perf_counter() - started
    times = _times(run, order, work, lambda _: session.wait_for_programs())
    return dataclasses.replace(times, first_s=times.first_s + compile_s)


def _times(
    run: Callable[[Sequence[tuple[int, ...]]], object],
    order: PeerOrder,
    work: Work,
    begin: Callable[[float], None] = lambda _: None,
) -> SideTimes:
    """Times a first turn, then `repeats` more, with new prompts each time.

    The first turn of a trace has only a sixteenth of its requests, since a peer may take a minute for all of them.
    `begin` is called before the second turn with the seconds of the first.
    """
    seconds: list[float] = []
    for number in range(order.repeats + 1):
        prompts = work.prompts(order.fields["vocab_size"], order.seed, number)
        if work.is_trace and number == 0:
            prompts = prompts[: -(-len(prompts) // 16)]
        if number == 1:
            begin(seconds[0])
        started = time.perf_counter()
        run(prompts)
        seconds.append(time.perf_counter() - started)
    return SideTimes(first_s=seconds[0], seconds=statistics.median(seconds[1:]))


def render(result: ApartResult) -> str:
    """A table with one row per work."""
    header = [
        "",
        "prompt",
        "output",
        "peer s",
        "ours s",
        "peer tok/s",
        "ours tok/s",
        "ratio",
        "peer first",
        "ours first",
    ]
    rows, failures = [], []
    for row in result.rows:
        num_tokens = row.work.num_requests * row.work.output_len
        peer: list[Any] = [row.peer.seconds, num_tokens / row.peer.seconds, row.peer.first_s] if row.peer else ["-"] * 3
        more = "> " if row.peer and not row.peer.is_whole else ""
        ratio = "-" if row.ratio is None else f"{more}{row.ratio:.2f}"
        ours = [row.ours.seconds, num_tokens / row.ours.seconds, row.ours.first_s]
        between = [value for pair in zip(peer[:2], ours[:2], strict=True) for value in pair]
        rows.append([row.work.title, row.work.prompt_len, row.work.output_len, *between, ratio, peer[2], ours[2]])
        failures += [f"the peer failed in the {row.work.title}: {row.failure}"] if row.failure else []
    return "\n".join(
        [
            f"peer: {result.peer}, {result.dtype}, in a process of its own; greedy, end token ignored, with prefill",
            format_table(header, rows),
            *failures,
            f"medians of {result.repeats} turns each; ratio above 1: jaxinfer is faster (> where the peer was "
            f"stopped); first: seconds of the first turn, compilation included",
        ]
    )
