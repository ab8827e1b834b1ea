"""`bench compare --mixed`: requests of different lengths that all arrive at once, by a peer and by jaxinfer in turns.

Jaxinfer serves them by continuous batching: as soon as a request ends, the next one takes its slot. A peer serves them
in the way that its `mixed_batching` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.bench.compare import take_turns
from jaxinfer.bench.peers import Peer
from jaxinfer.bench.report import format_table
from jaxinfer.bench.session import Session
from jaxinfer.bench.workload import TraceEntry, random_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedResult:
    """The comparison for one trace; times are medians over the repeats.

    Args:
      peer: its name and version.
      peer_batching: how it serves the requests.
      peer_threads: CPU threads at which it was fastest.
      dtype: of both models.
      num_requests: requests of the trace.
      max_num_seqs: requests at once, on both sides.
      prompt_tokens, output_tokens: of the whole trace; only tokens that a request asked for count.
      shortest, longest: prompt and output tokens of the shortest and of the longest, each counted by itself.
      peer_s, ours_s: seconds from prompts to all tokens.
      ours_first_s: seconds of jaxinfer's first turn, with compilation.
      ratio: peer_s / ours_s, above 1 where jaxinfer is faster.
      equal_rows: share of requests for which both gave exactly the same greedy tokens, over all turns.
      repeats: turns of each side, after one for warm-up.
    """

    peer: str
    peer_batching: str
    peer_threads: int
    dtype: str
    num_requests: int
    max_num_seqs: int
    prompt_tokens: int
    output_tokens: int
    shortest: tuple[int, int]
    longest: tuple[int, int]
    peer_s: float
    ours_s: float
    ours_first_s: float
    ratio: float
    equal_rows: float
    repeats: int


def measure(
    session: Session, peer: Peer, trace: Sequence[TraceEntry], *, dtype: str, repeats: int, seed: int = 0
) -> MixedResult:
    """Times the trace, by the peer and jaxinfer in turns, ignoring the end token.

    Args:
      session: jaxinfer, with context for the longest request; its max_num_seqs is the number of requests at once.
      peer: the other engine, with the same weights.
      trace: the requests in the order of arrival; all arrive at the start.
      dtype: of both models, for the record.
      repeats: timed turns of each engine, after one turn for warm-up.
      seed: of the prompts, which are new at every turn, with the same lengths.
    """
    prompt_lens, output_lens = [entry.prompt_len for entry in trace], [entry.output_len for entry in trace]
    max_num_seqs = session.config.max_num_seqs

    def prompts(number: int) -> list[tuple[int, ...]]:
        return random_prompts(prompt_lens, vocab_size=session.model_config.vocab_size, seed=(seed, number))

    peer_threads = peer.tune(prompts(repeats + 1)[:max_num_seqs])
    turns = take_turns(
        lambda batch: peer.serve_mixed(batch, output_lens, max_num_seqs=max_num_seqs),
        lambda batch: session.serve(batch, output_lens),
        [prompts(number) for number in range(repeats + 1)],
        after_warmup=session.wait_for_programs,
    )
    return MixedResult(
        peer=peer.name,
        peer_batching=peer.mixed_batching,
        peer_threads=peer_threads,
        dtype=dtype,
        num_requests=len(trace),
        max_num_seqs=max_num_seqs,
        prompt_tokens=sum(prompt_lens),
        output_tokens=sum(output_lens),
        shortest=(min(prompt_lens), min(output_lens)),
        longest=(max(prompt_lens), max(output_lens)),
        peer_s=turns.peer_s,
        ours_s=turns.ours_s,
        ours_first_s=turns.ours_first_s,
        ratio=turns.ratio,
        equal_rows=turns.equal_rows,
        repeats=repeats,
    )


def _tokens_per_s(result: MixedResult) -> dict[str, float]:
    return {result.peer: result.output_tokens / result.peer_s, "jaxinfer": result.output_tokens / result.ours_s}


def render(result: MixedResult) -> str:
    """A table of one row, with what was served above it and how it was timed below."""
    header = ["peer s", "ours s", "peer tok/s", "ours tok/s", "ratio", "ours first s", "peer threads", "rows equal"]
    row = [result.peer_s, result.ours_s, *_tokens_per_s(result).values(), f"{result.ratio:.2f}", result.ours_first_s]
    row += [result.peer_threads, f"{100 * result.equal_rows:.0f}%"]
    (prompt_min, output_min), (prompt_max, output_max) = result.shortest, result.longest
    return "\n".join(
        [
            f"{result.num_requests} requests at once with prompts of {prompt_min}..{prompt_max} and outputs of "
            f"{output_min}..{output_max} tokens ({result.output_tokens} in all), {result.dtype}, greedy",
            f"peer: {result.peer}, {result.peer_batching} of {result.max_num_seqs}; "
            f"ours: continuous batching of {result.max_num_seqs}",
            format_table(header, [row]),
            f"medians of {result.repeats} turns each after a warm-up; ratio above 1: jaxinfer is faster",
            "tok/s: output tokens that were asked for; first: the warm-up, with compilation or with reading programs "
            "from the compilation cache",
        ]
    )


def draw(result: MixedResult, axes: Any) -> None:
    """Plots both engines' tokens per second as bars."""
    rates = _tokens_per_s(result)
    axes.bar(list(rates), list(rates.values()))
    title = f"{result.num_requests} requests of mixed lengths, {result.max_num_seqs} at once, {result.dtype}"
    axes.set(ylabel="output tokens per second", title=title)
