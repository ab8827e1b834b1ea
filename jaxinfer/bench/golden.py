"""`bench golden`: checks LLM on this device, in float32 or bfloat16, against what transformers computed in float32.

Owns: the comparison with the golden files, whose format tests/golden/make.py describes.
Does not know: how those files were made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxinfer.api.llm import LLM
from jaxinfer.bench.report import format_table
from jaxinfer.config.validation import require_choice
from jaxinfer.outputs import RequestOutput
from jaxinfer.request import MAX_LOGPROBS
from jaxinfer.sampling_params import SamplingParams

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest allowed error of a log-probability, in nats. In float32, another order of sums changes it by about 1e-5 in
these models. In bfloat16, weights and activations are rounded to 8 bits, and the logits of these random models spread
over a few units. A checkpoint for which transformers in bfloat16 is further off than this (_PEER_ERRORS) is allowed as
much as that."""
_PEER_ERRORS = "bfloat16.json"
"""A file beside the checkpoints: the largest error of transformers in bfloat16, in nats, by checkpoint."""
NUM_CASES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenCase:
    """The result for one checkpoint, which has several texts.

    Args:
      name: the checkpoint's folder.
      dtype: jaxinfer's; transformers' is float32.
      num_tokens: greedy tokens compared. Each text is compared up to its first token that differs, that one included.
      num_diverged: texts in which a token differs.
      num_texts: texts in all.
      max_margin: where a text first differs, the log-probability of our token less that of transformers' token, both as
        jaxinfer computes them, in nats; the largest over the texts. A small margin is a near-tie, decided by rounding.
      max_logprob_error: largest difference of log-probabilities in nats, over the tokens compared and the most likely
        first tokens.
      mean_logprob_error: mean over the same tokens.
      tolerance: largest max_logprob_error that passes.
      seconds: time of the case, loading and compiling included.
    """

    name: str
    dtype: str
    num_tokens: int
    num_diverged: int
    num_texts: int
    max_margin: float
    max_logprob_error: float
    mean_logprob_error: float
    tolerance: float
    seconds: float

    is_right: bool = field(init=False)
    """Whether the case passes: log-probabilities are within the tolerance, and all tokens are equal. In bfloat16,
    tokens may differ where two are nearly as likely."""

    def __post_init__(self) -> None:
        may_differ = self.dtype != "float32" and self.max_margin <= TOLERANCES[self.dtype]
        is_near = self.max_logprob_error <= self.tolerance
        object.__setattr__(self, "is_right", (may_differ or not self.num_diverged) and is_near)


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenResult:
    """The cases that ran, and the names of the cases for which no time was left."""

    cases: tuple[GoldenCase, ...]
    skipped: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        """Whether no case failed."""
        return all(case.is_right for case in self.cases)


def measure(
    directory: Path, budget_seconds: float, *, dtypes: Sequence[str] = ("float32",), names: Sequence[str] = ()
) -> GoldenResult:
    """Runs the cases of a directory while time is left; on GPUs several at once, as most of the time is compilation.

    Args:
      directory: a folder of checkpoints, each with an expected.npz.
      budget_seconds: seconds after which no further case is begun.
      dtypes: keys of TOLERANCES. All cases run in the first dtype, then in the next.
      names: the cases to run; empty for all.

    Raises:
      FileNotFoundError: the directory has no cases, or lacks one that is named.
      ValueError: a dtype is not in TOLERANCES.
    """
    paths = sorted(path.parent for path in directory.glob("*/expected.npz"))
    if not paths:
        raise FileNotFoundError(f"{directory} has no */expected.npz; golden must name a folder of golden checkpoints")
    if missing := set(names) - {path.name for path in paths}:
        raise FileNotFoundError(f"{directory} has no case {min(missing)}; cases must name its folders")
    for dtype in dtypes:
        require_choice("dtype", dtype, tuple(TOLERANCES))
    chosen = [(path, dtype) for dtype in dtypes for path in paths if path.name in (names or [path.name])]
    started = time.perf_counter()

    def run(entry: tuple[Path, str]) -> GoldenCase | str:
        path, dtype = entry
        return f"{path.name} {dtype}" if time.perf_counter() - started > budget_seconds else check(path, dtype)

    # On a CPU, one compilation at a time keeps all cores busy.
    num_threads = 1 if jax.default_backend() == "cpu" else NUM_CASES_AT_ONCE
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(tqdm(pool.map(run, chosen), total=len(chosen), desc="golden", disable=None, leave=False))
    return GoldenResult(
        cases=tuple(case for case in found if isinstance(case, GoldenCase)),
        skipped=tuple(case for case in found if isinstance(case, str)),
    )


def check(path: Path, dtype: str = "float32") -> GoldenCase:
    """Compares one checkpoint's greedy tokens, their log-probabilities and those of the most likely first tokens."""
    started = time.perf_counter()
    with np.load(path / "expected.npz") as file:
        expected = dict(file)
    numbers = range(sum(name.startswith("prompt_") for name in expected))
    params = SamplingParams(temperature=0, max_tokens=len(expected["greedy_0"]), ignore_eos=True, logprobs=MAX_LOGPROBS)
    # Several cases share a device, so each gets few pages; by default, the first would take all free memory.
    with LLM(path, dtype=dtype, max_num_seqs=4, max_num_batched_tokens=256, num_kv_pages=64) as llm:
        outputs = llm.generate([expected[f"prompt_{i}"].tolist() for i in numbers], params, use_tqdm=False)
    texts = [
        _compare(outputs[i], expected[f"greedy_{i}"].tolist(), expected[f"logprobs_{i}"], expected[f"logits_{i}"][-1])
        for i in numbers
    ]
    errors = np.concatenate([text.errors for text in texts])
    return GoldenCase(
        name=path.name,
        dtype=dtype,
        num_tokens=sum(text.num_tokens for text in texts),
        num_diverged=sum(text.margin is not None for text in texts),
        num_texts=len(texts),
        max_margin=max(text.margin or 0.0 for text in texts),
        max_logprob_error=float(errors.max()),
        mean_logprob_error=float(errors.mean()),
        tolerance=largest_allowed_error(path, dtype),
        seconds=time.perf_counter() - started,
    )


def largest_allowed_error(path: Path, dtype: str) -> float:
    """The largest error of a log-probability that a checkpoint is allowed, in nats."""
    peer_errors = path.parent / _PEER_ERRORS
    if dtype != "bfloat16" or not peer_errors.exists():
        return TOLERANCES[dtype]
    return max(TOLERANCES[dtype], json.loads(peer_errors.read_text()).get(path.name, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """The comparison of one text: tokens compared, the margin at the first difference (None if equal), the errors."""

    num_tokens: int
    margin: float | None
    errors: np.ndarray


def _compare(output: RequestOutput, greedy: Sequence[int], chosen: np.ndarray, last_logits: np.ndarray) -> _Text:
    """Compares a text up to the first token that differs; after that the contexts differ.

    Args:
      output: jaxinfer's.
      greedy, chosen: transformers' tokens and their log-probabilities.
      last_logits: float32[V], transformers' logits after the prompt's last token.
    """
    positions, ours = list(output.logprobs or ()), list(output.token_ids)
    apart = next((step for step, pair in enumerate(zip(ours, greedy, strict=True)) if pair[0] != pair[1]), None)
    count = len(ours) if apart is None else apart + 1
    margin = None
    errors = []
    for step in range(count):
        theirs = positions[step].get(greedy[step])
        if theirs is not None:
            errors.append(abs(theirs.logprob - float(chosen[step])))
        if step == apart:  # a token of theirs that is not among our most likely ones is no near-tie
            margin = float("inf") if theirs is None else positions[step][ours[step]].logprob - theirs.logprob
    first = last_logits - np.logaddexp.reduce(last_logits.astype(np.float64))
    errors += [abs(entry.logprob - float(first[id])) for id, entry in positions[0].items()]
    return _Text(num_tokens=count, margin=margin, errors=np.array(errors))


def render(result: GoldenResult) -> str:
    """One line per case."""
    rows = [
        (
            case.name,
            case.dtype,
            "OK" if case.is_right else "FAIL",
            case.num_tokens,
            f"{case.num_diverged}/{case.num_texts}",
            f"{case.max_margin:.1e}" if case.num_diverged else "-",
            f"{case.max_logprob_error:.1e}",
            f"{case.mean_logprob_error:.1e}",
            f"{case.seconds:.1f}",
        )
        for case in result.cases
    ]
    rows += [(name, "skipped, no time left", *[""] * 7) for name in result.skipped]
    header = ["case", "dtype", "", "tokens", "texts that part", "margin there", "max log-prob error", "mean", "s"]
    return format_table(header, rows)
