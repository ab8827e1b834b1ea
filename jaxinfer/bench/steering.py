"""`bench steering`: what interventions cost, as the throughput of requests of which some are steered.

Plain runs and runs with steered requests take turns, so that what else the machine does slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.bench.report import format_table
from jaxinfer.bench.session import Session
from jaxinfer.bench.workload import random_prompts
from jaxinfer.interventions import Hook, bound_hooks
from jaxinfer.request import Request
from jaxinfer.research.interventions import add


@dataclass(frozen=True, kw_only=True, slots=True)
class SteeringResult:
    """The throughput with and without steered requests.

    Args:
      num_requests, num_steered: of a run; every steered one has a vector of its own, added to the residual stream
        behind one layer for all tokens.
      plain_tokens_per_s, steered_tokens_per_s: output tokens per second of each timed run.
      num_differing: plain requests whose output beside steered ones was another than among plain ones.
    """

    num_requests: int
    num_steered: int
    plain_tokens_per_s: tuple[float, ...]
    steered_tokens_per_s: tuple[float, ...]
    num_differing: int

    @property
    def ratio(self) -> float:
        """Median throughput with steered requests over the median without."""
        return statistics.median(self.steered_tokens_per_s) / statistics.median(self.plain_tokens_per_s)


def measure(
    session: Session, *, num_requests: int, num_steered: int, prompt_len: int, output_len: int, repeats: int, seed: int
) -> SteeringResult:
    """Times runs of equal prompts, after one untimed run of each kind.

    Args:
      session: the engine.
      num_requests, num_steered: requests of a run, and those of them that are steered.
      prompt_len, output_len: tokens of each request.
      repeats: timed runs of each kind.
      seed: of prompts and vectors.
    """
    prompts = random_prompts([prompt_len] * num_requests, vocab_size=session.model_config.vocab_size, seed=(seed,))
    hooks = _hooks(session, num_steered, prompt_len, seed)
    runs: dict[bool, list[float]] = {False: [], True: []}
    outputs: dict[bool, dict[str, list[int]]] = {}
    for repeat in range(repeats + 1):
        for is_steered in (False, True):
            started = time.perf_counter()
            outputs[is_steered] = _run(session, prompts, hooks if is_steered else (), output_len, repeat)
            if repeat:
                runs[is_steered].append(num_requests * output_len / (time.perf_counter() - started))
        session.wait_for_programs()
    plain_ids = [str(number) for number in range(num_steered, num_requests)]
    return SteeringResult(
        num_requests=num_requests,
        num_steered=num_steered,
        plain_tokens_per_s=tuple(runs[False]),
        steered_tokens_per_s=tuple(runs[True]),
        num_differing=sum(outputs[False][name] != outputs[True][name] for name in plain_ids),
    )


def _hooks(session: Session, count: int, prompt_len: int, seed: int) -> list[Hook]:
    rng = np.random.default_rng((seed, 3))
    site = f"layers.{session.model_config.num_layers // 2}.residual"
    size = session.model_config.hidden_size
    bound = [add.at(site, vector=rng.standard_normal(size), scale=rng.uniform(0.1, 1)) for _ in range(count)]
    return [bound_hooks([entry], session.engine.sites, prompt_len=prompt_len)[0] for entry in bound]


def _run(
    session: Session, prompts: Sequence[tuple[int, ...]], hooks: Sequence[Hook], output_len: int, repeat: int
) -> dict[str, list[int]]:
    """The output tokens of all requests, by id; the first requests get the hooks."""
    for number, prompt in enumerate(prompts):
        # Another first token in each repetition keeps the prefix cache out of it.
        request = Request(
            request_id=str(number),
            prompt_token_ids=(repeat, *prompt[1:]),
            max_tokens=output_len,
            hooks=(hooks[number],) if number < len(hooks) else (),
        )
        session.engine.add_request(request)
    outputs: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while session.engine.has_unfinished():
        for event in session.engine.step():
            outputs[event.request_id].append(event.token_id)
    return outputs


def render(result: SteeringResult) -> str:
    """Text with the median rates, their ratio and the count of plain requests whose output differs."""
    kinds = {
        "plain": (0, result.plain_tokens_per_s),
        "some steered": (result.num_steered, result.steered_tokens_per_s),
    }
    rows = [[name, count, statistics.median(rates), min(rates), max(rates)] for name, (count, rates) in kinds.items()]
    table = format_table(["requests", "steered", "tokens/s", "least", "most"], rows)
    return (
        f"{table}\n\n{result.ratio:.3f} of the throughput without; {result.num_differing} of "
        f"{result.num_requests - result.num_steered} plain requests have another output beside steered ones"
    )
