"""The steps of a process that follows: what the leader sends is launched here, in the order in which it comes.

Owns: the thread that launches steps, the thread that reads their tokens, and the digests sent back to the leader.
Does not know: requests, why the leader sends a step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.communication.connection import Message
from jaxinfer.communication.process_group import Follower, Kind
from jaxinfer.communication.progress import Progress
from jaxinfer.errors import ProcessLostError
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.leading import ModelKey, digest
from jaxinfer.wrappers.step_frame import unpack_step

MAX_UNREAD = 8
"""Steps that may wait to be read, at most: with too many, processes that share a mesh would deadlock."""


@dataclass(frozen=True, eq=False, slots=True)
class _Model:
    """A model whose steps come from the leader.

    Args:
      wrapper: runs them.
      vocab_size: of the model.
      inside: launched steps that have not left the pipeline yet.
    """

    wrapper: AbstractModelInferenceWrapper
    vocab_size: int
    inside: deque[tuple[int, Any]] = field(default_factory=deque)


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
        self._unread: queue.Queue[tuple[ModelKey, _Model, int, Any]] = queue.Queue(MAX_UNREAD)
        self._num_launched = 0
        self._waiting_since: float | None = None
        for kind in (Kind.OPEN, Kind.STEP, Kind.WARM_UP, Kind.CLOSE):
            group.handle(kind, lambda _, message: self._received.put(message))
        group.report_progress(self._progress)
        for work in (self._launch_all, self._read_all):
            name = f"jaxinfer-follow-{work.__name__.strip('_')}"
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True).start()

    def join(
        self, wrapper: AbstractModelInferenceWrapper, key: ModelKey, *, vocab_size: int
    ) -> AbstractModelInferenceWrapper:
        """Lets the leader run steps of a model; returns its wrapper, which nobody else may use from now on."""
        self._models[key] = _Model(wrapper, vocab_size)
        return wrapper

    def drop(self, engine: int) -> None:
        """Frees what was loaded of an engine that some process could not load."""
        for key in [key for key in self._models if key.engine == engine]:
            self._models.pop(key).wrapper.close()

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
            model = self._models[key]
            if message.kind == Kind.STEP:
                self._launch(key, model, message.number, payload)
            elif message.kind == Kind.WARM_UP:
                model.wrapper.warmup()
            else:
                self._unread.join()
                model.wrapper.close()
                del self._models[key]
                if not any(other.engine == key.engine for other in self._models):
                    self._on_closed(key.engine)

    def _launch(self, key: ModelKey, model: _Model, number: int, payload: bytes) -> None:
        wrapper = model.wrapper
        batch = unpack_step(payload, wrapper.shapes, num_pages=wrapper.num_pages, vocab_size=model.vocab_size)
        model.inside.append((number, wrapper.launch(batch)))
        self._num_launched += 1
        if len(model.inside) == wrapper.shapes.num_stages:
            self._unread.put((key, model, *model.inside.popleft()))

    def _read_all(self) -> None:
        while True:
            key, model, number, handle = self._unread.get()
            self._waiting_since = time.monotonic()
            result = model.wrapper.collect(handle)
            self._waiting_since = None
            if len(result.token_ids):
                self._group.send(Message(Kind.DIGEST, number, key.pack() + digest(result.token_ids)))
            self._unread.task_done()

    def _progress(self) -> Progress:
        since = self._waiting_since
        return Progress(
            num_launched=self._num_launched,
            waiting_seconds=0.0 if since is None else time.monotonic() - since,
            is_compiling=any(model.wrapper.is_compiling for model in list(self._models.values())),
        )
