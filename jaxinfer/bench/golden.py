"""`bench golden`: this device against what transformers computed in float32, through LLM, in float32 or bfloat16.

Owns: the comparison with the files that tests/golden/make.py describes.
Does not know: how they were made.
"""

from __future__ import annotations

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
from jaxinfer.config import require_choice
from jaxinfer.outputs import RequestOutput
from jaxinfer.request import MAX_LOGPROBS
from jaxinfer.sampling_params import SamplingParams

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
"""Of a log-probability. In float32 another order of sums costs about 1e-5 in these models. In bfloat16 weights and
activations round to 8 bits, and the random models' logits are a few units wide (measured on CPU: up to 0.1)."""
NUM_CASES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenCase:
    """One checkpoint.

    Args:
      name: its folder.
      dtype: ours; the other side's is float32.
      num_tokens: greedy tokens compared: of each text up to the first that differs, that one included.
      num_diverged: texts with a token that differs.
      num_texts: of the case.
      max_margin: how much less likely we find transformers' token than ours, in nats, where they first differ; the
        largest. A small one is a near-tie that rounding decides.
      max_logprob_error: largest difference in nats over the tokens compared and the most likely first ones.
      mean_logprob_error: over the same.
      seconds: loading and compiling included.
    """

    name: str
    dtype: str
    num_tokens: int
    num_diverged: int
    num_texts: int
    max_margin: float
    max_logprob_error: float
    mean_logprob_error: float
    seconds: float

    is_right: bool = field(init=False)
    """In float32 all tokens are equal; in bfloat16 they may differ where two are nearly as likely. Log-probabilities
    are within the dtype's tolerance."""

    def __post_init__(self) -> None:
        may_differ = self.dtype != "float32" and self.max_margin <= TOLERANCES[self.dtype]
        is_near = self.max_logprob_error <= TOLERANCES[self.dtype]
        object.__setattr__(self, "is_right", (may_differ or not self.num_diverged) and is_near)


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenResult:
    """The cases that ran, and the names of those for which no time was left."""

    cases: tuple[GoldenCase, ...]
    skipped: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        """No case failed."""
        return all(case.is_right for case in self.cases)


def measure(
    directory: Path, budget_seconds: float, *, dtypes: Sequence[str] = ("float32",), names: Sequence[str] = ()
) -> GoldenResult:
    """Runs cases of a directory while time is left, several at once: most of a case's time is compilation.

    Args:
      directory: a folder of checkpoints, each with an expected.npz.
      budget_seconds: no further case is begun after that.
      dtypes: of TOLERANCES; every case in the first, then in the next.
      names: the cases to run; none for all.

    Raises:
      FileNotFoundError: no case there, or not all that were named.
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

    # A CPU has no cores to spare beside those that compile.
    num_threads = 1 if jax.default_backend() == "cpu" else NUM_CASES_AT_ONCE
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(tqdm(pool.map(run, chosen), total=len(chosen), desc="golden", disable=None, leave=False))
    return GoldenResult(
        cases=tuple(case for case in found if isinstance(case, GoldenCase)),
        skipped=tuple(case for case in found if isinstance(case, str)),
    )


def check(path: Path, dtype: str = "float32") -> GoldenCase:
    """One checkpoint: greedy tokens, their log-probabilities, and those of the most likely first tokens."""
    started = time.perf_counter()
    with np.load(path / "expected.npz") as file:
        expected = dict(file)
    numbers = range(sum(name.startswith("prompt_") for name in expected))
    params = SamplingParams(temperature=0, max_tokens=len(expected["greedy_0"]), ignore_eos=True, logprobs=MAX_LOGPROBS)
    # So few pages: several cases share a device, whose free memory each would take otherwise.
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
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """One text beside transformers': tokens compared, the margin where they part (None if they do not), errors."""

    num_tokens: int
    margin: float | None
    errors: np.ndarray


def _compare(output: RequestOutput, greedy: Sequence[int], chosen: np.ndarray, last_logits: np.ndarray) -> _Text:
    """Compares up to the first token that differs; behind it the texts are about different things.

    Args:
      output: ours.
      greedy, chosen: transformers' tokens and their log-probabilities.
      last_logits: behind the prompt's last token, float32[V].
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
        if step == apart:  # their token is not even among our most likely ones: no tie at all
            margin = float("inf") if theirs is None else positions[step][ours[step]].logprob - theirs.logprob
    first = last_logits - np.logaddexp.reduce(last_logits.astype(np.float64))
    errors += [abs(entry.logprob - float(first[id])) for id, entry in positions[0].items()]
    return _Text(num_tokens=count, margin=margin, errors=np.array(errors))


def render(result: GoldenResult) -> str:
    """One line a case."""
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
