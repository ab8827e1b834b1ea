"""Several replicas of a model behind one LLM, each an engine on its own devices with a thread of its own.

Owns: ReplicatedRunner, which shares requests out among replicas.
Does not know: prompts, how a replica computes.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxinfer.api.driver import Ticket
from jaxinfer.api.output_stream import wait_for
from jaxinfer.api.routing import Router
from jaxinfer.api.runner import LocalRunner, Runner, Work
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.page_allocator import page_hashes
from jaxinfer.engine.stats import EngineStats
from jaxinfer.errors import EngineClosedError
from jaxinfer.outputs import RequestOutput
from jaxinfer.text.preparation import Submission

logger = logging.getLogger("jaxinfer")


class ReplicatedRunner(Runner):
    """Runs each request on one of several replicas; a replica whose engine stops fails its own requests only.

    Args:
      replicas: the replicas, of which each has its own driver.
      config: the settings of each.
    """

    def __init__(self, replicas: Sequence[LocalRunner], config: EngineConfig):
        self._replicas = list(replicas)
        self._page_size = config.page_size
        self._caching = config.enable_prefix_caching
        self._router = Router(len(replicas), num_remembered=config.max_num_seqs, seed=config.seed)
        self._routing = threading.Lock()
        self._owners: weakref.WeakKeyDictionary[Ticket, LocalRunner] = weakref.WeakKeyDictionary()

    @property
    def is_running(self) -> bool:
        """Whether any replica accepts requests."""
        return any(replica.is_running for replica in self._replicas)

    def run(self, submissions: Sequence[Submission], *, show_bar: bool) -> list[RequestOutput]:
        """See Runner."""
        tickets: list[Ticket] = []
        try:
            for submission in submissions:
                tickets.append(self._submit(submission, stream=False))
            return wait_for(tickets, show_bar=show_bar)
        except BaseException:
            for ticket in tickets:
                self.cancel(ticket)
            raise

    def start(
        self, submission: Submission, *, stream: bool = True, on_update: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        """See Runner."""
        return self._submit(submission, stream=stream, on_update=on_update)

    def cancel(self, ticket: Ticket) -> None:
        """See Runner."""
        self._owners[ticket].cancel(ticket)

    def _submit(
        self, submission: Submission, *, stream: bool, on_update: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        while True:
            replica = self._choose(submission)
            try:
                (ticket,) = replica.driver.submit([submission], stream=stream, on_update=on_update)
            except EngineClosedError:
                if replica.is_running or not self.is_running:
                    raise  # all of them sleep, are drained or have stopped
                continue  # it has stopped since it was chosen
            self._owners[ticket] = replica
            return ticket

    def _choose(self, submission: Submission) -> LocalRunner:
        replicas = self._replicas
        hashes = page_hashes(submission.requests[0].known_token_ids, self._page_size) if self._caching else []
        with self._routing:
            loads = [replica.driver.num_open if replica.is_running else None for replica in replicas]
            if not any(load is not None for load in loads):
                return replicas[0]  # which raises the reason
            cached = [replica.num_cached_pages(hashes) for replica in replicas]
            return replicas[self._router.choose(hashes, loads=loads, cached=cached)]

    def warmup(self, *, background: bool = False) -> None:
        """Compiles the programs of all replicas at the same time."""
        with ThreadPoolExecutor(len(self._replicas)) as pool:
            list(pool.map(lambda replica: replica.warmup(background=background), self._replicas))

    def stats(self) -> EngineStats:
        """The sums over all replicas."""
        found = [replica.stats() for replica in self._replicas]
        names = [entry.name for entry in dataclasses.fields(EngineStats)]
        return EngineStats(**{name: sum(getattr(stats, name) for stats in found) for name in names})

    def between_requests(self, work: Work, *, abort: bool = False, refuse: EngineClosedError | None = None) -> None:
        """See Runner; all replicas that run wait at the same time. One that stops meanwhile harms no other."""
        running = [replica for replica in self._replicas if replica.is_running] or self._replicas
        with ThreadPoolExecutor(len(running)) as pool:
            done = [pool.submit(replica.between_requests, work, abort=abort, refuse=refuse) for replica in running]
        failed = {replica: error for replica, each in zip(running, done, strict=True) if (error := each.exception())}
        for replica, error in failed.items():
            if replica.is_running or len(failed) == len(running):
                raise error

    def follow(self) -> None:
        """Refuses: there is no process to follow."""
        self._replicas[0].follow()

    def drain(self, seconds: float) -> None:
        """See Runner."""
        deadline = time.monotonic() + seconds
        for replica in self._replicas:
            replica.drain(0.0)  # none takes new requests, before the first is waited for
        for replica in self._replicas:
            replica.drain(max(deadline - time.monotonic(), 0.0))

    def fail(self, error: EngineClosedError) -> None:
        """See Runner."""
        for replica in self._replicas:
            replica.fail(error)

    def close(self) -> None:
        """See Runner."""
        for replica in self._replicas:
            replica.close()
