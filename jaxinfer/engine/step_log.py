"""A log of the engine's steps: what each held, and when it was scheduled, launched and read.

Owns: the records; they are written by the engine's thread while a log is set.
Does not know: how they are shown. Never imports jax.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from jaxinfer.engine.schedule import Schedule
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.wrappers.step_batch import StepBatch


@dataclass(eq=False, kw_only=True, slots=True)
class StepRecord:
    """One step. Times are seconds after the log began; NaN for what has not happened.

    Args:
      began: when scheduling began.
      launching, launched: when the wrapper was called, and when it returned.
      waiting, read: when the engine began to wait for the step's results, and when it had them.
      decodes: ids of the requests that decode a token each.
      prefills: (id of the request, position of the first token, number of tokens) of each chunk.
      num_live_rows, num_rows: rows with work, and all rows of the step's shape.
      num_running, num_waiting: sequences by state, after scheduling.
      pages_used, pages_cached: KV pages that sequences hold, and those that only the prefix cache knows.
    """

    origin: float
    began: float
    launching: float = float("nan")
    launched: float = float("nan")
    waiting: float = float("nan")
    read: float = float("nan")
    decodes: tuple[str, ...] = ()
    prefills: tuple[tuple[str, int, int], ...] = ()
    num_live_rows: int = 0
    num_rows: int = 0
    num_running: int = 0
    num_waiting: int = 0
    pages_used: int = 0
    pages_cached: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decodes) + sum(count for _, _, count in self.prefills)

    def scheduled(self, schedule: Schedule, batch: StepBatch, scheduler: Scheduler) -> None:
        """Records what the step holds."""
        self.decodes = tuple(row.sequence.request.request_id for row in schedule.decodes)
        self.prefills = tuple(
            (chunk.sequence.request.request_id, chunk.start, len(chunk.token_ids)) for chunk in schedule.prefills
        )
        self.num_live_rows = batch.num_live_rows
        self.num_rows = batch.shape.num_decode + batch.shape.num_prefill
        self.num_running, self.num_waiting = scheduler.num_running, scheduler.num_waiting
        self.pages_used, self.pages_cached = scheduler.pages.num_used, scheduler.pages.num_cached
        self.launching = self._now()

    def awaited(self) -> None:
        """Records that the engine begins to wait for the results."""
        self.waiting = self._now()

    def collected(self) -> None:
        """Records that the results are there."""
        self.read = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self.origin


@dataclass(eq=False, slots=True)
class StepLog:
    """The launched steps of one engine, in the order of their launches.

    Args:
      origin: time.perf_counter() at the beginning.
    """

    origin: float = field(default_factory=time.perf_counter)
    records: list[StepRecord] = field(default_factory=list)

    def begin(self) -> StepRecord:
        """A record for the step that is scheduled now; it counts once it is launched."""
        return StepRecord(origin=self.origin, began=time.perf_counter() - self.origin)

    def launched(self, record: StepRecord) -> None:
        """Adds a step that was launched."""
        record.launched = time.perf_counter() - self.origin
        self.records.append(record)
