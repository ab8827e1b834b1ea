"""RemoteModel: stands for a model none of whose devices belong to this process.

Owns: waiting for the results that another process has computed.
Does not know: how steps get there, what sockets are.
"""

from __future__ import annotations

import struct
import weakref
from dataclasses import dataclass

from jaxinfer.communication.process_group import ProcessGroup
from jaxinfer.config.attention_span import AttentionSpan
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.in_flight import InFlight, StepHandle
from jaxinfer.wrappers.result_frame import pack_result, unpack_result
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import StepShapes

_COMPILATIONS = struct.Struct("<i")


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Step:
    """A launched step; result is None until it has come."""

    result: StepResult | None


class RemoteModel(AbstractModelInferenceWrapper):
    """Launches nothing; collect waits until the results of a step have come.

    Args:
      group: the processes of the run.
      shapes, num_pages, span: as the model's wrappers on the other processes have them.
      vocab_size: of the model.
    """

    def __init__(
        self, group: ProcessGroup, shapes: StepShapes, *, num_pages: int, span: AttentionSpan, vocab_size: int
    ):
        self._group = group
        self._shapes = shapes
        self._num_pages = num_pages
        self._span = span
        self._vocab_size = vocab_size
        self._in_flight = InFlight(shapes)
        self._num_launched = self._num_warm = self._num_asked = self._num_compilations = 0
        self._steps: weakref.WeakValueDictionary[int, _Step] = weakref.WeakValueDictionary()
        self._early: dict[int, StepResult] = {}  # results that came before launch had returned

    @property
    def shapes(self) -> StepShapes:
        """See AbstractModelInferenceWrapper."""
        return self._shapes

    @property
    def num_pages(self) -> int:
        """See AbstractModelInferenceWrapper."""
        return self._num_pages

    @property
    def span(self) -> AttentionSpan:
        """See AbstractModelInferenceWrapper."""
        return self._span

    @property
    def row_usage(self) -> RowUsage:
        """See AbstractModelInferenceWrapper."""
        return self._in_flight.usage

    @property
    def num_compilations(self) -> int:
        """Programs that the process which sends results has compiled until it sent the last ones."""
        return self._num_compilations

    def launch(self, batch: StepBatch) -> _Step:
        """Counts a step, which the other processes launch; if its handle is dropped, so are its results."""
        self._in_flight.count_rows(self._in_flight.enter(StepHandle(batch)))
        with self._group.change():
            number = self._num_launched
            self._num_launched += 1
            self._steps[number] = step = _Step(self._early.pop(number, None))
        return step

    def collect(self, handle: _Step) -> StepResult:
        """Waits for the results of a step; see AbstractModelInferenceWrapper.

        Raises:
          ProcessLostError: the run has failed.
        """
        self._group.wait_for(lambda: handle.result is not None)
        return handle.result  # pyrefly: ignore[bad-return]

    def hear(self, number: int, frame: bytes) -> None:
        """Takes note of the results of a step, as pack_remote has packed them.

        Raises:
          FrameError: they are no results of this model.
        """
        (num_compilations,) = _COMPILATIONS.unpack_from(frame)
        result = unpack_result(frame[_COMPILATIONS.size :], vocab_size=self._vocab_size)
        with self._group.change():
            self._num_compilations = num_compilations
            step = self._steps.get(number)
            if step is not None:
                step.result = result
            elif number >= self._num_launched:
                self._early[number] = result

    def warmup(self, *, background: bool = False) -> None:
        """Waits until the process that sends results has compiled its programs.

        Raises:
          ProcessLostError: the run has failed.
        """
        self._num_asked += 1
        asked = self._num_asked
        self._group.wait_for(lambda: self._num_warm >= asked)

    def hear_warm(self, *, num_compilations: int) -> None:
        """Takes note that the process that sends results has compiled its programs, so many in all."""
        with self._group.change():
            self._num_warm += 1
            self._num_compilations = num_compilations

    def close(self) -> None:
        """Does nothing: this process holds no memory."""


def pack_remote(result: StepResult, *, num_compilations: int) -> bytes:
    """What RemoteModel.hear takes: the results of a step, and how many programs this process has compiled so far."""
    return _COMPILATIONS.pack(num_compilations) + pack_result(result)
