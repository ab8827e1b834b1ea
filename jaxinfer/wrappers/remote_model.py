"""RemoteModel: stands for a model none of whose devices belong to this process.

Owns: waiting for the results that another process has computed.
Does not know: how steps get there, what sockets are.
"""

from __future__ import annotations

import struct

from jaxinfer.communication.process_group import ProcessGroup
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.in_flight import InFlight, StepHandle
from jaxinfer.wrappers.result_frame import pack_result, unpack_result
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import StepShapes

_COMPILATIONS = struct.Struct("<i")


class RemoteModel(AbstractModelInferenceWrapper):
    """Launches nothing; collect waits until the results of a step have come.

    Args:
      group: the processes of the run.
      shapes, num_pages: as the model's wrappers on the other processes have them.
      vocab_size: of the model.
    """

    def __init__(self, group: ProcessGroup, shapes: StepShapes, *, num_pages: int, vocab_size: int):
        self._group = group
        self._shapes = shapes
        self._num_pages = num_pages
        self._vocab_size = vocab_size
        self._in_flight = InFlight(shapes)
        self._num_launched = self._num_warm = self._num_asked = self._num_compilations = 0
        self._results: dict[int, StepResult] = {}

    @property
    def shapes(self) -> StepShapes:
        """See AbstractModelInferenceWrapper."""
        return self._shapes

    @property
    def num_pages(self) -> int:
        """See AbstractModelInferenceWrapper."""
        return self._num_pages

    @property
    def row_usage(self) -> RowUsage:
        """See AbstractModelInferenceWrapper."""
        return self._in_flight.usage

    @property
    def num_compilations(self) -> int:
        """Programs that the process which sends results has compiled until it sent the last ones."""
        return self._num_compilations

    def launch(self, batch: StepBatch) -> int:
        """Counts a step, which the other processes launch."""
        self._in_flight.count_rows(self._in_flight.enter(StepHandle(batch)))
        self._num_launched += 1
        return self._num_launched - 1

    def collect(self, handle: int) -> StepResult:
        """Waits for the results of a step; see AbstractModelInferenceWrapper.

        Raises:
          ProcessLostError: the run has failed.
        """
        self._group.wait_for(lambda: handle in self._results)
        with self._group.change():
            result = self._results.pop(handle)
            for number in [number for number in self._results if number < handle]:  # those that nobody has read
                del self._results[number]
        return result

    def hear(self, number: int, frame: bytes) -> None:
        """Takes note of the results of a step, as pack_remote has packed them.

        Raises:
          FrameError: they are no results of this model.
        """
        (num_compilations,) = _COMPILATIONS.unpack_from(frame)
        result = unpack_result(frame[_COMPILATIONS.size :], vocab_size=self._vocab_size)
        with self._group.change():
            self._results[number] = result
            self._num_compilations = num_compilations

    def warmup(self, *, background: bool = False) -> None:
        """Waits until the other processes have compiled their programs.

        Raises:
          ProcessLostError: the run has failed.
        """
        self._num_asked += 1
        asked = self._num_asked
        self._group.wait_for(lambda: self._num_warm >= asked)

    def hear_warm(self) -> None:
        """Takes note that the other processes have compiled their programs."""
        with self._group.change():
            self._num_warm += 1

    def close(self) -> None:
        """Does nothing: this process holds no memory."""


def pack_remote(result: StepResult, *, num_compilations: int) -> bytes:
    """What RemoteModel.hear takes: the results of a step, and how many programs this process has compiled so far."""
    return _COMPILATIONS.pack(num_compilations) + pack_result(result)
