"""Batches over Ray Data: the lines of serve/batch.py, answered by several LLMs, each of which is an actor.

Owns: the dataset of answers, and how its answers get into the file.
Does not know: how lines are answered (serve/answering.py), files of requests and answers (serve/batch.py).

An answer depends on its line and the model alone, so it does not matter which actor gives it, nor how often one of them
has to be started again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError

from jaxinfer.api.llm import LLM
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.drafting import PROMPT_LOOKUP
from jaxinfer.errors import EngineClosedError
from jaxinfer.serve import answering
from jaxinfer.serve.answering import RequestLine
from jaxinfer.serve.batch import BatchPlan, line_at, places_left, write_answers

_BLOCKS_AT_A_TIME = 4
"""Blocks, of a line for every decode slot, that an actor answers at the same time: while the last lines of one are
answered, those of the others keep the engine busy."""
_LINES_TO_READ = 1024
"""Lines that one task reads from the file of requests."""
_NO_FOLDERS = (DEMO, "byte", PROMPT_LOOKUP)
"""Names that never mean a folder."""
_PLACE, _TEXT = "data", "text"
"""Columns: where a line begins in the file of requests (from_numpy names it so), and a line, as bytes or text (as
read_text names it)."""


def answer_lines(
    lines: ray.data.Dataset,
    model: str | Path = DEMO,
    *,
    tokenizer: str | Path | None = None,
    num_llms: int = 1,
    num_gpus: float | None = None,
    created: int | None = None,
    **engine: Any,
) -> ray.data.Dataset:
    """The answers to a dataset of requests, computed when the dataset is consumed.

    Args:
      lines: has a column "text", as ray.data.read_text makes it, whose rows are lines of OpenAI's batch API.
      model, tokenizer, **engine: as LLM's; every actor makes such an LLM, and must find the checkpoint by this name.
      num_llms: actors.
      num_gpus: GPUs of each; None is the number of devices that the engine's parallel sizes name, or 0 where the
        cluster has no GPU.
      created: what the answers say when they were made, in seconds since 1970; None is now.

    Returns:
      A dataset with a column "text": a line of JSON for each request, in any order. A request that is wrong is answered
      with its error; a line that is no request at all makes the dataset fail.

    Raises:
      TypeError, ValueError: a setting is unknown or outside its range.

    Example:
      lines = ray.data.read_text("s3://bucket/requests/")
      jaxinfer.ray.answer_lines(lines, "path/to/checkpoint", num_llms=8).write_parquet("s3://bucket/answers/")
    """
    config = EngineConfig(**engine)
    if num_llms < 1:
        raise ValueError(f"num_llms must be >= 1, got {num_llms}")
    slots = config.max_num_seqs * config.data_parallel_size
    return lines.repartition(target_num_rows_per_block=slots).map_batches(
        _Answerer,
        batch_size=slots,
        compute=ray.data.ActorPoolStrategy(
            size=num_llms,
            max_concurrent_calls_per_actor=_BLOCKS_AT_A_TIME,
            max_tasks_in_flight_per_actor=2 * _BLOCKS_AT_A_TIME,
            enable_true_multi_threading=True,
        ),
        fn_constructor_kwargs={
            "model": _findable(model),
            "tokenizer": None if tokenizer is None else _findable(tokenizer),
            "created": int(time.time()) if created is None else created,
            "engine": engine | {"draft_model": config.draft_model and _findable(config.draft_model)},
        },
        num_gpus=_num_gpus(config) if num_gpus is None else num_gpus,
    )


def run_batch(
    plan: BatchPlan,
    model: str | Path = DEMO,
    *,
    on_answer: Callable[[], object] = lambda: None,
    **others: Any,
) -> int:
    """Answers all requests of a batch that have no answer yet, as serve.batch.run_batch, but on a Ray cluster.

    Ray is started if it does not run: it joins the cluster that RAY_ADDRESS names, or uses this machine.

    Args:
      plan: the batch; all nodes of the cluster must find the file of requests by its name.
      model: as LLM's.
      on_answer: called after every answer.
      **others: further arguments of answer_lines.

    Returns:
      How many requests got an error as their answer.

    Raises:
      TypeError, ValueError: as answer_lines.
      EngineClosedError: an LLM could not be made, or the cluster failed. The answers so far are in the target.
    """
    source = plan.source.resolve()
    places = np.fromiter(places_left(plan), np.int64)
    if not len(places):
        return 0
    blocks = np.array_split(places, -(-len(places) // _LINES_TO_READ))

    def read(batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        return {_TEXT: [line_at(source, place) for place in batch[_PLACE].tolist()]}

    dataset = answer_lines(ray.data.from_numpy(blocks).map_batches(read), model, created=plan.created, **others)
    dataset.context.enable_progress_bars = False
    try:
        return write_answers(plan, (json.loads(row[_TEXT]) for row in dataset.iter_rows()), on_answer)
    except RayError as error:
        reason = next(line for line in reversed(str(error).splitlines()) if line.strip())
        raise EngineClosedError(f"the LLMs of the Ray cluster have stopped: {reason.strip()}") from error


def _num_gpus(config: EngineConfig) -> int:
    if not ray.is_initialized():
        ray.init()
    size = config.data_parallel_size * config.pipeline_parallel_size * config.tensor_parallel_size
    return size if ray.cluster_resources().get("GPU") else 0


def _findable(name: str | Path) -> str:
    """A directory by its whole path, since actors may run in other directories; any other name as it is."""
    return str(Path(name).resolve()) if name not in _NO_FOLDERS and Path(name).is_dir() else str(name)


class _Answerer:
    """An actor with an LLM of its own; several threads call it at the same time."""

    def __init__(self, *, model: str, tokenizer: str | None, created: int, engine: Mapping[str, Any]):
        self._llm = LLM(model, tokenizer=tokenizer, **engine)
        self._created = created

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[str]]]:
        lines = (RequestLine.read(line, f"line {line!r:.80}") for line in batch[_TEXT])
        for answer in answering.answer_lines(self._llm, lines, created=self._created):
            yield {_TEXT: [json.dumps(answer)]}
