"""The leader's wrapper in a run with several processes: every step also goes to the other processes.

Owns: sending what changes the devices (steps, warm-up, close) in the order in which it is done here, and comparing the
tokens that other processes have sampled with its own.
Does not know: how steps are computed, what sockets are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxinfer.communication.connection import Message
from jaxinfer.communication.leader import Leader
from jaxinfer.communication.model_key import ModelKey
from jaxinfer.communication.process_group import Kind
from jaxinfer.communication.progress import Awaited, ModelProgress, Progress, stuck
from jaxinfer.config.attention_span import AttentionSpan
from jaxinfer.errors import EngineClosedError, ProcessLostError
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.remote_model import RemoteModel
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_frame import pack_step
from jaxinfer.wrappers.step_result import RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import StepShapes

DIGEST_BYTES = 8


def digest(token_ids: Int32[np.ndarray, " M"]) -> bytes:
    """A digest of sampled tokens, DIGEST_BYTES long."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids, "<i4").tobytes(), digest_size=DIGEST_BYTES).digest()


class _Launched(NamedTuple):
    number: int
    handle: Any


class LeadingWrapper(AbstractModelInferenceWrapper):
    """Runs steps on all processes that hold a model: sends each to the followers, then launches it here.

    If another process fails or is lost, or has sampled other tokens, launch and collect raise ProcessLostError.

    Args:
      wrapper: runs the steps on this process's devices; a RemoteModel if it has none of the model.
      key: the model.
      group: all processes of the run.
      process_ids: those that hold the model.
    """

    def __init__(
        self,
        wrapper: AbstractModelInferenceWrapper,
        key: ModelKey,
        group: Leader,
        process_ids: Sequence[int],
    ):
        self.wrapper = wrapper
        self.process_ids = process_ids
        self._num_digests = len(process_ids) - 1  # all but the one whose tokens the engine gets
        self._key = key
        self._group = group
        self._num_sent = self._num_launched = 0
        self._waiting_since: float | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._own: dict[int, bytes] = {}  # digests by step, until all followers have sent theirs
        self._theirs: dict[int, dict[int, bytes]] = {}  # by step and process
        self._last_collected = -1

    @property
    def shapes(self) -> StepShapes:
        """See AbstractModelInferenceWrapper."""
        return self.wrapper.shapes

    @property
    def num_pages(self) -> int:
        """See AbstractModelInferenceWrapper."""
        return self.wrapper.num_pages

    @property
    def span(self) -> AttentionSpan:
        """See AbstractModelInferenceWrapper."""
        return self.wrapper.span

    @property
    def row_usage(self) -> RowUsage:
        """See AbstractModelInferenceWrapper."""
        return self.wrapper.row_usage

    @property
    def num_compilations(self) -> int:
        """See AbstractModelInferenceWrapper."""
        return self.wrapper.num_compilations

    @property
    def is_compiling(self) -> bool:
        """See AbstractModelInferenceWrapper."""
        return self.wrapper.is_compiling

    @property
    def progress(self) -> ModelProgress:
        """How far this process is with the model's steps."""
        since = self._waiting_since
        waiting_seconds = 0.0 if since is None else time.monotonic() - since
        return ModelProgress(num_launched=self._num_launched, waiting_seconds=waiting_seconds)

    @property
    def awaited(self) -> Awaited:
        """How far the processes that hold the model should be."""
        return Awaited(holders=self.process_ids, num_sent=self._num_sent, waiting_seconds=self.progress.waiting_seconds)

    def launch(self, batch: StepBatch) -> Any:
        """Sends a step to the followers and starts it here; see AbstractModelInferenceWrapper."""
        with self._failing_together(), self._group.launching(self.process_ids):
            number = self._num_sent
            self._send(Kind.STEP, pack_step(batch), number)
            self._num_sent += 1
            with self._waiting():
                handle = self.wrapper.launch(batch)
            self._num_launched += 1
            return _Launched(number, handle)

    def collect(self, handle: Any) -> StepResult:
        """Waits for a step, and keeps a digest of its tokens; see AbstractModelInferenceWrapper."""
        with self._failing_together(), self._waiting():
            result = self.wrapper.collect(handle.handle)
        if len(result.token_ids) and self._num_digests:
            with self._lock:
                self._own[handle.number] = digest(result.token_ids)
                self._last_collected = handle.number
            self._compare()
        return result

    def hear_digest(self, process_id: int, number: int, found: bytes) -> None:
        """Takes note of a digest that another process has sent."""
        with self._lock:
            self._theirs.setdefault(number, {})[process_id] = found
        self._compare()

    def _compare(self) -> None:
        differing = None
        with self._lock:
            for number in [number for number in self._theirs if number <= self._last_collected]:
                own, theirs = self._own.get(number), self._theirs[number]  # own is None if the engine skipped the step
                differing = next(((other, number) for other in theirs if own not in (None, theirs[other])), differing)
                if len(theirs) == self._num_digests:
                    del self._theirs[number]
                    self._own.pop(number, None)
        if differing is not None:
            raise self._group.diverge(
                f"process {differing[0]} has sampled other tokens than process {self.process_ids[0]} in step "
                f"{differing[1]}: their weights or devices differ"
            )

    def warmup(self, *, background: bool = False) -> None:
        """Compiles the programs on all processes; with several of them nothing is left to the background, where their
        order would differ."""
        if self._is_closed:
            raise EngineClosedError("the LLM was closed")
        background = background and len(self.process_ids) == 1
        with self._failing_together():
            self._send(Kind.WARM_UP, bytes([background]))
            self.wrapper.warmup(background=background)

    def close(self) -> None:
        """Frees device memory on all processes; see AbstractModelInferenceWrapper."""
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(ProcessLostError):
                self._send(Kind.CLOSE)
        self.wrapper.close()

    def abandon(self) -> None:
        """Frees device memory of this process only; the others do so by themselves."""
        self._is_closed = True
        self.wrapper.close()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waiting_since = time.monotonic()
        yield
        self._waiting_since = None

    def _send(self, kind: Kind, payload: bytes = b"", number: int = 0) -> None:
        self._group.send_to(self.process_ids, Message(kind, number, self._key.pack() + payload))

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Lets the run fail with this process: the devices of all processes have to run the same steps."""
        try:
            yield
        except ProcessLostError:
            raise
        except Exception as error:
            raise self._group.fail(error) from error


class LeadingSteps:
    """The steps of all models that this process leads.

    Args:
      group: the processes.
    """

    def __init__(self, group: Leader):
        self._group = group
        self._wrappers: weakref.WeakValueDictionary[ModelKey, LeadingWrapper] = weakref.WeakValueDictionary()
        self._compiled_at: dict[int, float] = {}  # when each process was last seen to compile
        group.handle(Kind.DIGEST, self._hear_digest)
        group.handle(Kind.TOKENS, self._hear_tokens)
        group.handle(Kind.WARM, self._hear_warm)
        group.report_progress(self._progress)
        group.watch(self._find_stuck)

    def join(self, wrapper: AbstractModelInferenceWrapper, key: ModelKey, process_ids: Sequence[int]) -> LeadingWrapper:
        """The wrapper that runs a model's steps on all processes that hold it; arguments as LeadingWrapper's."""
        self._wrappers[key] = leading = LeadingWrapper(wrapper, key, self._group, process_ids)
        return leading

    def drop(self, engine: int) -> None:
        """Frees what was loaded of an engine that some process could not load."""
        for key in [key for key in self._wrappers if key.engine == engine]:
            self._wrappers.pop(key).abandon()

    def _hear_digest(self, process_id: int, message: Message) -> None:
        key, found = ModelKey.unpack(message.payload)
        wrapper = self._wrappers.get(key)
        if wrapper is not None:
            wrapper.hear_digest(process_id, message.number, found)

    def _hear_tokens(self, process_id: int, message: Message) -> None:
        key, frame = ModelKey.unpack(message.payload)
        model = self._remote(key)
        if model is not None:
            model.hear(message.number, frame)

    def _hear_warm(self, process_id: int, message: Message) -> None:
        key, _ = ModelKey.unpack(message.payload)
        model = self._remote(key)
        if model is not None:
            model.hear_warm(num_compilations=message.number)

    def _remote(self, key: ModelKey) -> RemoteModel | None:
        leading = self._wrappers.get(key)
        return leading.wrapper if leading is not None and isinstance(leading.wrapper, RemoteModel) else None

    def _progress(self) -> Progress:
        wrappers = list(self._wrappers.items())
        return Progress(
            is_compiling=any(wrapper.is_compiling for _, wrapper in wrappers),
            models={key: wrapper.progress for key, wrapper in wrappers},
        )

    def _find_stuck(self) -> list[int]:
        group, limit, now = self._group, self._group.patience.step, time.monotonic()
        others = {number: group.progress_of(number) for number in group.everyone.ids if number != group.process_id}
        progress = {group.process_id: self._progress()} | others
        self._compiled_at |= {number: now for number, entry in progress.items() if entry.is_compiling}
        # A step may wait for several programs, which are compiled one after the other.
        for number, compiled_at in self._compiled_at.items():
            is_compiling = now - compiled_at < limit
            progress[number] = dataclasses.replace(progress[number], is_compiling=is_compiling)
        models = {key: wrapper.awaited for key, wrapper in list(self._wrappers.items())}
        return stuck(progress, models, limit=limit)
