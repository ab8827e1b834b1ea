"""`bench golden`: this device against what transformers computed, in float32, through LLM.

Owns: the comparison with the files that tests/golden/make.py describes.
Does not know: how they were made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from jaxinfer.bench.report import format_table
from jaxinfer.llm import LLM
from jaxinfer.outputs import RequestOutput
from jaxinfer.request import MAX_LOGPROBS
from jaxinfer.sampling_params import SamplingParams

TOLERANCE = 1e-3
"""Of a log-probability in float32; another order of sums costs about 1e-5 in these models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenCase:
    """One checkpoint.

    Args:
      name: its folder.
      tokens_equal: every greedy token is transformers'.
      max_logprob_error: largest difference in nats, over the chosen tokens and the most likely first ones.
      seconds: loading and compiling included.
    """

    name: str
    tokens_equal: bool
    max_logprob_error: float
    seconds: float

    @property
    def is_ok(self) -> bool:
        """Tokens equal and log-probabilities within TOLERANCE."""
        return self.tokens_equal and self.max_logprob_error <= TOLERANCE


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenResult:
    """The cases that ran, and the names of those for which no time was left."""

    cases: tuple[GoldenCase, ...]
    skipped: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        """No case failed."""
        return all(case.is_ok for case in self.cases)


def measure(directory: Path, budget_seconds: float) -> GoldenResult:
    """Runs every case of a directory while time is left.

    Args:
      directory: a folder of checkpoints, each with an expected.npz.
      budget_seconds: no further case is begun after that.

    Raises:
      FileNotFoundError: no case there.
    """
    paths = sorted(path.parent for path in directory.glob("*/expected.npz"))
    if not paths:
        raise FileNotFoundError(f"{directory} has no */expected.npz; golden must name a folder of golden checkpoints")
    started = time.perf_counter()
    cases, skipped = [], []
    for path in tqdm(paths, desc="golden", unit="case", disable=None, leave=False):
        if time.perf_counter() - started > budget_seconds:
            skipped.append(path.name)
        else:
            cases.append(check(path))
    return GoldenResult(cases=tuple(cases), skipped=tuple(skipped))


def check(path: Path) -> GoldenCase:
    """One checkpoint: greedy tokens, their log-probabilities, and those of the most likely first tokens."""
    started = time.perf_counter()
    with np.load(path / "expected.npz") as file:
        expected = dict(file)
    numbers = range(sum(name.startswith("prompt_") for name in expected))
    params = SamplingParams(temperature=0, max_tokens=len(expected["greedy_0"]), ignore_eos=True, logprobs=MAX_LOGPROBS)
    with LLM(path, dtype="float32", max_num_seqs=4, max_num_batched_tokens=256) as llm:
        outputs = llm.generate([expected[f"prompt_{i}"].tolist() for i in numbers], params, use_tqdm=False)
    errors = [_logprob_error(outputs[i], expected[f"logits_{i}"][-1], expected[f"logprobs_{i}"]) for i in numbers]
    return GoldenCase(
        name=path.name,
        tokens_equal=all(outputs[i].token_ids == tuple(expected[f"greedy_{i}"].tolist()) for i in numbers),
        max_logprob_error=max(errors),
        seconds=time.perf_counter() - started,
    )


def _logprob_error(output: RequestOutput, last_logits: np.ndarray, chosen: np.ndarray) -> float:
    """Largest difference in nats; last_logits are those behind the prompt's last token, float32[V]."""
    positions = list(output.logprobs or ())
    ours = [entry[token].logprob for entry, token in zip(positions, output.token_ids, strict=True)]
    theirs = last_logits - np.logaddexp.reduce(last_logits.astype(np.float64))
    differences = [*np.subtract(ours, chosen), *(entry.logprob - theirs[id] for id, entry in positions[0].items())]
    return float(np.max(np.abs(differences)))


def render(result: GoldenResult) -> str:
    """One line a case."""
    rows = [
        (
            case.name,
            "OK" if case.is_ok else "FAIL",
            "yes" if case.tokens_equal else "no",
            f"{case.max_logprob_error:.1e}",
            f"{case.seconds:.1f}",
        )
        for case in result.cases
    ]
    rows += [(name, "skipped, no time left", "", "", "") for name in result.skipped]
    return format_table(["case", "float32", "greedy tokens equal", "max log-prob error", "s"], rows)
