"""What runs the requests of an LLM that several processes hold together.

Owns: LeadingRunner, for process 0, and FollowingRunner, for the others, which get its outputs; the form in which
outputs and errors travel.
Does not know: how steps and messages are sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jaxinfer.api.driver import Ticket
from jaxinfer.api.runner import Runner, Work
from jaxinfer.communication.process_group import GatherError
from jaxinfer.distributed import FollowerRun, LeaderRun
from jaxinfer.engine.stats import EngineStats
from jaxinfer.errors import EngineClosedError, ProcessLostError, RequestFailedError
from jaxinfer.outputs import RequestOutput
from jaxinfer.records.codec import from_fields
from jaxinfer.records.provenance import Provenance
from jaxinfer.text.preparation import Submission

_WARM_UP = "warmup"
_NOT_SHARED = "the weights can be replaced, and put to sleep, where one process holds the whole model"
_ERRORS = (
    ValueError,
    TypeError,
    ImportError,
    KeyboardInterrupt,
    EngineClosedError,
    GatherError,
    RequestFailedError,
)
"""Errors that the leader's call raises on the other processes, too; any other becomes a RuntimeError there."""


class LeadingRunner(Runner):
    """Runs requests for all processes of a run: those that make the same calls get the outputs sent.

    Args:
      runner: runs the requests, on engines whose steps go to the other processes.
      run: the run.
      engine: number of the engine in it.
    """

    def __init__(self, runner: Runner, run: LeaderRun, engine: int):
        self._runner = runner
        self._run = run
        self._engine = engine
        self._numbers = itertools.count()
        run.group.when_lost(self)
        run.group.attach(self)

    @property
    def is_running(self) -> bool:
        """See Runner."""
        return self._runner.is_running

    def run(self, submissions: Sequence[Submission], *, show_bar: bool) -> list[RequestOutput]:
        """Waits until all processes have made this call (those that follow make none), then runs it for all."""
        with self._shared_call(_described(submissions)) as result:
            outputs = self._runner.run(submissions, show_bar=show_bar)
            result["outputs"] = outputs
        return outputs

    def start(
        self, submission: Submission, *, stream: bool = True, on_update: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        """See Runner; the other processes learn nothing of it."""
        return self._runner.start(submission, stream=stream, on_update=on_update)

    def cancel(self, ticket: Ticket) -> None:
        """See Runner."""
        self._runner.cancel(ticket)

    def warmup(self, *, background: bool = False) -> None:
        """Compiles programs on all processes; see LLM.warmup for what is left to the background."""
        with self._shared_call(_WARM_UP):
            self._runner.warmup(background=background)

    def stats(self) -> EngineStats:
        """See Runner."""
        return self._runner.stats()

    def between_requests(self, work: Work, *, abort: bool = False, refuse: EngineClosedError | None = None) -> None:
        """Refuses: the other processes would not do it."""
        raise ValueError(_NOT_SHARED)

    def follow(self) -> None:
        """Refuses: this process leads."""
        raise ValueError("process 0 leads the run; follow() is for the other processes")

    def drain(self, seconds: float) -> None:
        """See Runner."""
        self._runner.drain(seconds)

    def fail(self, error: EngineClosedError) -> None:
        """See Runner."""
        self._runner.fail(error)

    def lose(self, error: ProcessLostError) -> None:
        """Ends all requests because the run has failed."""
        self.fail(error)

    def close(self) -> None:
        """See Runner."""
        self._runner.close()

    @contextmanager
    def _shared_call(self, description: str) -> Iterator[dict[str, Any]]:
        """A call that all processes make; what the block puts into the dict goes to the others."""
        calls, number = self._run.calls, next(self._numbers)
        with _held_at_the_end(self._run):
            is_shared = calls.begin(self._engine, number, description)
            result: dict[str, Any] = {}
            try:
                yield result
                if is_shared:
                    outputs = [output.as_dict() for output in result.get("outputs", ())]
                    calls.end(self._engine, number, {"outputs": outputs, "stats": dataclasses.asdict(self.stats())})
            except ProcessLostError:
                raise
            except BaseException as error:
                if is_shared:
                    calls.end(self._engine, number, {"error": type(error).__name__, "message": str(error)})
                raise


class FollowingRunner(Runner):
    """Makes the calls that the leader makes, too, and gets their outputs from it.

    Args:
      stats: to return until the first call has brought the leader's.
      run: the run.
      engine: number of the engine in it.
      provenance: of the outputs.
    """

    def __init__(self, stats: EngineStats, run: FollowerRun, engine: int, provenance: Provenance):
        self._run = run
        self._engine = engine
        self._provenance = provenance
        self._stats = stats
        self._is_closed = False
        run.group.attach(self)

    @property
    def is_running(self) -> bool:
        """See Runner."""
        has_ended = self._is_closed or self._run.calls.is_closed(self._engine)
        return self._run.group.error is None and not has_ended

    def run(self, submissions: Sequence[Submission], *, show_bar: bool) -> list[RequestOutput]:
        """Gets the outputs of the leader's call with the same arguments."""
        found = self._call(_described(submissions))["outputs"]
        return [
            dataclasses.replace(
                from_fields(RequestOutput, fields),
                sampling_params=submission.params if submission.beam_search is None else None,
                beam_search_params=submission.beam_search,
                provenance=self._provenance,
            )
            for submission, fields in zip(submissions, found, strict=True)
        ]

    def warmup(self, *, background: bool = False) -> None:
        """Waits until the leader's call has compiled its programs; this process's may still be at it."""
        self._call(_WARM_UP)

    def stats(self) -> EngineStats:
        """The leader's statistics as they were at the end of the last call; before it, those of the engine here."""
        return self._stats

    def start(
        self, submission: Submission, *, stream: bool = True, on_update: Callable[[Ticket], None] | None = None
    ) -> NoReturn:
        """Refuses: only the leader streams."""
        raise ValueError(
            f"streams run on process 0 only, this is process {self._run.group.process_id}; call llm.follow() here"
        )

    def cancel(self, ticket: Ticket) -> None:
        """Does nothing: there is no ticket."""

    def between_requests(self, work: Work, *, abort: bool = False, refuse: EngineClosedError | None = None) -> None:
        """Refuses: the other processes would not do it."""
        raise ValueError(_NOT_SHARED)

    def follow(self) -> None:
        """Takes part in what the leader computes until it closes the engine."""
        with _held_at_the_end(self._run):
            self._run.calls.follow(self._engine)
            self._run.calls.await_close(self._engine)

    def drain(self, seconds: float) -> None:
        """Does nothing: the leader drains the engine."""

    def fail(self, error: EngineClosedError) -> None:
        """Does nothing: the calls of this process wait for the run, which has failed."""

    def close(self) -> None:
        """Makes no more calls. The leader may go on; this process's part of the engine is closed when it closes it."""
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(ProcessLostError):
                self._run.calls.follow(self._engine)

    def _call(self, description: str) -> dict[str, Any]:
        if self._is_closed:
            raise EngineClosedError("the LLM was closed")
        with _held_at_the_end(self._run):
            result = self._run.calls.make(self._engine, description)
        if "error" in result:
            kind = next((kind for kind in _ERRORS if kind.__name__ == result["error"]), None)
            if kind is not None:
                raise kind(result["message"])
            raise RuntimeError(f"process 0 failed: {result['error']}: {result['message']}")
        self._stats = EngineStats(**result["stats"])
        return result


@contextmanager
def _held_at_the_end(run: LeaderRun | FollowerRun) -> Iterator[None]:
    """When the run was asked to end, the main thread is about to end; it must not see closed engines before that."""
    run.end.hold()
    try:
        yield
    except EngineClosedError:
        run.end.hold()
        raise


def _described(submissions: Sequence[Submission]) -> str:
    """What all processes compare: how many prompts, and a digest of prompts and parameters."""
    digest = hashlib.sha256()
    for entry in submissions:
        first = entry.requests[0]
        shown = (entry.prompt, first.prompt_token_ids, first.output_token_ids, entry.params, entry.beam_search)
        digest.update(repr(shown).encode(errors="surrogatepass"))
    return f"{len(submissions)} prompts with digest {digest.hexdigest()[:16]}"
