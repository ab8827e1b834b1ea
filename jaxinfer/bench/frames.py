"""What it costs to send every step to another process, and whether that is hidden behind the device's work.

Owns: a device that only takes its time, a second process that follows, and the times of steps with and without it.
Does not know: models; no JAX runs in either process.
"""

from __future__ import annotations

import multiprocessing
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxinfer.bench.report import format_table
from jaxinfer.bench.timed_engine import TimedEngine
from jaxinfer.bench.workload import random_prompts
from jaxinfer.bench.zero_wrapper import ZeroWrapper
from jaxinfer.communication.follower import Follower
from jaxinfer.communication.leader import Leader
from jaxinfer.communication.membership import Membership
from jaxinfer.communication.model_key import ModelKey
from jaxinfer.communication.progress import Patience
from jaxinfer.communication.rendezvous import await_followers, find_leader
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.following import FollowingSteps
from jaxinfer.wrappers.leading import LeadingSteps
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_frame import pack_step, unpack_step
from jaxinfer.wrappers.step_result import StepResult
from jaxinfer.wrappers.step_shapes import StepShapes

_VOCAB_SIZE = 128_256
_MODEL = ModelKey(0, 0, 0)
_BOTH = (0, 1)
_PROMPT_LEN = 16
_NUM_LOOPS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The time of a decode step.

    Args:
      run_ahead: whether a step is launched before the tokens of the one before are read.
      alone_ms: in one process.
      followed_ms: in a process that sends every step to another one.
    """

    run_ahead: bool
    alone_ms: float
    followed_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FramesResult:
    """What a frame costs.

    Args:
      rows: that decode in a step.
      frame_bytes: of a step.
      pack_us, unpack_us: microseconds to make a frame, and to read it with all checks.
      device_ms: of a step, by definition.
      steps: times of steps with and without run-ahead.
    """

    rows: int
    frame_bytes: int
    pack_us: float
    unpack_us: float
    device_ms: float
    steps: tuple[StepTime, ...]


class SteadyDevice(ZeroWrapper):
    """Stands for a device all of whose steps take the same time, one after the other; every token is 0.

    Args:
      config: the engine's settings.
      max_model_len: tokens of the longest request.
      step_ms: the time of a step.
    """

    def __init__(self, config: EngineConfig, *, max_model_len: int, step_ms: float):
        shapes = StepShapes(config, max_model_len=max_model_len, coarse=True)
        super().__init__(shapes, config.max_num_seqs * shapes.table_width)
        self._step_s = step_ms / 1000
        self._free_at = 0.0
        self.last = StepBatch.idle(shapes)

    def launch(self, batch: StepBatch) -> Any:
        """Lets the step begin when the one before has ended; the handle has the time of its end."""
        self.last = batch
        self._free_at = max(time.perf_counter(), self._free_at) + self._step_s
        return super().launch(batch), self._free_at

    def collect(self, handle: Any) -> StepResult:
        """Waits until the step has ended."""
        batch, end = handle
        time.sleep(max(end - time.perf_counter(), 0.0))
        return super().collect(batch)


def measure(*, rows: int, step_ms: float, num_steps: int) -> FramesResult:
    """Times decode steps of a device that takes a given time, alone and followed by a second process.

    Args:
      rows: requests that decode.
      step_ms: milliseconds of the device's step.
      num_steps: decode steps to time.
    """
    max_model_len = _PROMPT_LEN + num_steps + 64

    def device(run_ahead: bool) -> tuple[SteadyDevice, EngineConfig]:
        config = EngineConfig(max_num_seqs=rows, max_num_batched_tokens=max(2048, rows), run_ahead=run_ahead)
        return SteadyDevice(config, max_model_len=max_model_len, step_ms=step_ms), config

    def step_time(wrapper: AbstractModelInferenceWrapper, config: EngineConfig) -> float:
        engine = DynamicEngine(wrapper, config, max_model_len=max_model_len)
        timed = TimedEngine(engine, config, max_model_len=max_model_len)
        with timed.decoding(random_prompts([_PROMPT_LEN] * rows, vocab_size=_VOCAB_SIZE, seed=(0,))) as decoding:
            return 1000 * decoding.run(num_steps)

    steps = []
    for run_ahead in (True, False):
        alone, config = device(run_ahead)
        alone_ms = step_time(alone, config)
        own, _ = device(run_ahead)
        with _followed(own, config, max_model_len=max_model_len, step_ms=step_ms) as leading:
            followed_ms = step_time(leading, config)
        steps.append(StepTime(run_ahead=run_ahead, alone_ms=alone_ms, followed_ms=followed_ms))
    batch = alone.last
    frame = pack_step(batch)
    return FramesResult(
        rows=rows,
        frame_bytes=len(frame),
        pack_us=_microseconds(lambda: pack_step(batch)),
        unpack_us=_microseconds(
            lambda: unpack_step(frame, alone.shapes, num_pages=alone.num_pages, vocab_size=_VOCAB_SIZE)
        ),
        device_ms=step_ms,
        steps=tuple(steps),
    )


@contextmanager
def _followed(
    device: SteadyDevice, config: EngineConfig, *, max_model_len: int, step_ms: float
) -> Iterator[AbstractModelInferenceWrapper]:
    """A wrapper that runs the steps of a device here and in a process that it starts."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    secret = secrets.token_hex(16)
    arguments = address, secret, config, max_model_len, step_ms
    process = multiprocessing.get_context("spawn").Process(target=_follow, args=arguments, daemon=True)
    process.start()
    try:
        leader = Membership(address=address, num_processes=2, process_id=0, secret=secret)
        connections, _ = await_followers(leader, versions={}, seconds=60.0)
        group = Leader(connections, patience=Patience(), on_lost=lambda error: None)
        steps = LeadingSteps(group)
        group.start()
        group.settle()
        wrapper = steps.join(device, _MODEL, _BOTH)
        yield wrapper
        wrapper.close()
        group.leave()
        process.join()
    finally:
        process.kill()


def _follow(address: str, secret: str, config: EngineConfig, max_model_len: int, step_ms: float) -> None:
    """What the second process does."""
    membership = Membership(address=address, num_processes=2, process_id=1, secret=secret)
    connection, _ = find_leader(membership, versions={}, seconds=60.0)
    group = Follower(1, 2, connection, patience=Patience(), on_lost=lambda error: None)
    closed = threading.Event()
    steps = FollowingSteps(group, on_opened=lambda message: None, on_closed=lambda engine: closed.set())
    device = SteadyDevice(config, max_model_len=max_model_len, step_ms=step_ms)
    steps.join(device, _MODEL, _BOTH, vocab_size=_VOCAB_SIZE)
    group.start()
    group.settle()
    closed.wait()
    group.leave()


def _microseconds(call: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(_NUM_LOOPS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def render(result: FramesResult) -> str:
    """What a frame costs, and a table of the times of steps."""
    header = ["run-ahead", "device ms/step", "alone ms/step", "followed ms/step", "followed / alone"]
    rows = []
    for row in result.steps:
        name, ratio = "on" if row.run_ahead else "off", row.followed_ms / row.alone_ms
        rows.append([name, result.device_ms, row.alone_ms, row.followed_ms, ratio])
    return (
        f"a step of {result.rows} decode rows: {result.frame_bytes:,} bytes, {result.pack_us:.0f} us to pack, "
        f"{result.unpack_us:.0f} us to read and check\n" + format_table(header, rows)
    )
