"""The steps of a process that follows: what the leader sends is launched here, in the order in which it comes.

Owns: the thread that launches steps, the threads that read their tokens, and what is sent back to the leader: digests,
or the tokens themselves where it computes none.
Does not know: requests, why the leader sends a step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.communication.connection import Message
from jaxinfer.communication.follower import Follower
from jaxinfer.communication.model_key import ModelKey
from jaxinfer.communication.process_group import Kind
from jaxinfer.communication.progress import ModelProgress, Progress
from jaxinfer.errors import ProcessLostError
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.leading import digest
from jaxinfer.wrappers.remote_model import pack_remote
from jaxinfer.wrappers.step_frame import unpack_step

MAX_UNREAD = 8
"""Steps that may wait to be read, at most: with too many, processes that share a mesh would deadlock."""


@dataclass(eq=False, slots=True)
class _Model:
    """A model whose steps come from the leader.

    Args:
      key: which.
      wrapper: runs them.
      vocab_size: of the model.
      is_reporter: whether the leader gets the results of its steps from this process.
      unread: steps that have left the pipeline.
      inside: launched steps that have not.
      num_launched: steps launched so far.
      launching_since: when the thread that launches came to a step that it has not done with; None if there is none.
      waiting_since: when the thread that reads began to wait for a step; None if it does not.
    """

    key: ModelKey
    wrapper: AbstractModelInferenceWrapper
    vocab_size: int
    is_reporter: bool
    unread: queue.Queue[_Step]
    inside: deque[tuple[int, Any]] = field(default_factory=deque)
    num_launched: int = 0
    launching_since: float | None = None
    waiting_since: float | None = None

    @property
    def progress(self) -> ModelProgress:
        """How far this process is with the model's steps."""
        found = [since for since in (self.launching_since, self.waiting_since) if since is not None]
        waiting_seconds = time.monotonic() - min(found) if found else 0.0
        return ModelProgress(num_launched=self.num_launched, waiting_seconds=waiting_seconds)


_Step = tuple[_Model, int, Any] | None
"""A model, the number of its step and the step's handle; None ends the thread that reads."""


class FollowingSteps:
    """The steps of all models of which this process holds a part.

    Args:
      group: the processes.
      on_opened: called with the message when the leader opens an engine, after all that it has sent before is done:
        the memory of engines that it has closed is free then.
      on_closed: called with an engine's number when the leader has closed all its models.
    """

    def __init__(self, group: Follower, *, on_opened: Callable[[Message], None], on_closed: Callable[[int], None]):
        self._group = group
        self._on_opened = on_opened
        self._on_closed = on_closed
        self._models: dict[ModelKey, _Model] = {}
        self._received: queue.SimpleQueue[Message] = queue.SimpleQueue()
        for kind in (Kind.OPEN, Kind.STEP, Kind.WARM_UP, Kind.CLOSE):
            group.handle(kind, lambda _, message: self._received.put(message))
        group.report_progress(self._progress)
        self._start_thread("launch", self._launch_all)

    def join(
        self, wrapper: AbstractModelInferenceWrapper, key: ModelKey, process_ids: Sequence[int], *, vocab_size: int
    ) -> AbstractModelInferenceWrapper:
        """Lets the leader run steps of a model; returns its wrapper, which nobody else may use from now on.

        Args:
          wrapper: runs the steps here.
          key: the model.
          process_ids: the processes that hold it.
          vocab_size: of the model.
        """
        unread = next((model.unread for other, model in list(self._models.items()) if other[:2] == key[:2]), None)
        if unread is None:
            unread = queue.Queue(MAX_UNREAD)  # one for each replica, so that none waits for the steps of another
            self._start_thread("read", lambda: self._read_all(unread))
        is_reporter = 0 not in process_ids and self._group.process_id == min(process_ids)
        self._models[key] = _Model(key, wrapper, vocab_size, is_reporter, unread)
        return wrapper

    def drop(self, engine: int) -> None:
        """Frees what was loaded of an engine that some process could not load."""
        for key in [key for key in list(self._models) if key.engine == engine]:
            self._close(self._models[key])

    def _start_thread(self, name: str, work: Callable[[], None]) -> None:
        threading.Thread(target=self._guarded, args=(work,), name=f"jaxinfer-follow-{name}", daemon=True).start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ProcessLostError:
            pass  # everybody knows
        except BaseException as error:  # whatever it is, the others must not wait for this process
            self._group.fail(error)

    def _launch_all(self) -> None:
        while True:
            message = self._received.get()
            if message.kind == Kind.OPEN:
                self._on_opened(message)
                continue
            key, payload = ModelKey.unpack(message.payload)
            if message.kind == Kind.WARM_UP and key not in self._models:
                continue  # one thread of the leader closed the engine, while another one asked for this
            model = self._models[key]
            if message.kind == Kind.STEP:
                model.launching_since = time.monotonic()
                self._launch(model, message.number, payload)
                model.launching_since = None
            elif message.kind == Kind.WARM_UP:
                model.wrapper.warmup(background=payload == b"\1")
                if model.is_reporter:
                    self._group.send(Message(Kind.WARM, model.wrapper.num_compilations, key.pack()))
            else:
                self._close(model)
                if not any(other.engine == key.engine for other in list(self._models)):
                    self._on_closed(key.engine)

    def _close(self, model: _Model) -> None:
        model.unread.join()
        model.wrapper.close()
        del self._models[model.key]
        if not any(other.unread is model.unread for other in list(self._models.values())):
            model.unread.put(None)

    def _launch(self, model: _Model, number: int, payload: bytes) -> None:
        wrapper = model.wrapper
        batch = unpack_step(payload, wrapper.shapes, num_pages=wrapper.num_pages, vocab_size=model.vocab_size)
        model.inside.append((number, wrapper.launch(batch)))
        model.num_launched += 1
        if len(model.inside) == wrapper.shapes.num_stages:
            model.unread.put((model, *model.inside.popleft()))

    def _read_all(self, unread: queue.Queue[_Step]) -> None:
        while (step := unread.get()) is not None:
            model, number, handle = step
            model.waiting_since = time.monotonic()
            result = model.wrapper.collect(handle)
            model.waiting_since = None
            key = model.key.pack()
            if model.is_reporter:
                frame = pack_remote(result, num_compilations=model.wrapper.num_compilations)
                self._group.send(Message(Kind.TOKENS, number, key + frame))
            elif len(result.token_ids):
                self._group.send(Message(Kind.DIGEST, number, key + digest(result.token_ids)))
            unread.task_done()

    def _progress(self) -> Progress:
        models = list(self._models.values())
        return Progress(
            is_compiling=any(model.wrapper.is_compiling for model in models),
            models={model.key: model.progress for model in models},
        )
