"""What a decode step costs the host beside the device: choosing rows, making arrays, reading tokens, making text.

Times are CPU times of the thread, since the host waits for nothing here: what else the machine runs is not in them.

Owns: a wrapper that answers with the tokens of a text, an engine that times the parts of its steps, and the table.
Does not know: models; nothing is computed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.bench.report import format_table
from jaxinfer.bench.workload import random_prompts
from jaxinfer.bench.zero_wrapper import ZeroWrapper
from jaxinfer.checkpoint.directory import DEMO, resolve
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.engine.schedule import Schedule
from jaxinfer.engine.step_log import StepRecord
from jaxinfer.request import TokenEvent
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text.answer import GrowingAnswer
from jaxinfer.text.controller import TextGenerationController
from jaxinfer.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import StepResult
from jaxinfer.wrappers.step_shapes import StepShapes

PARTS = ("schedule", "batch", "read", "answers", "outputs")
_TEXT = """Once upon a time there was a small café by the sea. Every morning the cook opened the door, looked at the
sky and said: "It will be a good day." Then the first guests came in, and they told him where they had been.
"""
_STOP_STRINGS = ("\n\nHuman:", "<|end|>")  # not in the text
_SHIFT = 7
"""How many tokens of the text a row is ahead of the one before, so that rows do not all say the same."""
_UNTIMED_STEPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """The host's time for a decode step in microseconds of CPU time, medians over the steps.

    Args:
      rows: requests that decode.
      waiting: requests that wait for a slot.
      stop_strings: whether texts are searched for stop strings.
      schedule_us: the scheduler chooses the rows and gives them pages.
      batch_us: the arrays of the step are made.
      read_us: the tokens are added to their sequences, and events are made of them.
      answers_us: the events are added to their answers; with stop strings, the tokens are turned into text here.
      outputs_us: an output of every answer is taken, as a stream takes it; without stop strings, the tokens are turned
        into text here.
      total_us: of all these together.
    """

    rows: int
    waiting: int
    stop_strings: bool
    schedule_us: float
    batch_us: float
    read_us: float
    answers_us: float
    outputs_us: float
    total_us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HostResult:
    """The host's times.

    Args:
      num_steps: timed steps of each line.
      lines: one for each number of rows, of waiting requests, without and with stop strings.
    """

    num_steps: int
    lines: tuple[HostTime, ...]


class Laps:
    """A stopwatch: the CPU time between two marks belongs to the part that the second mark names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.thread_time()

    def begin(self) -> None:
        """Begins a step."""
        self.seconds = {}
        self._last = time.thread_time()

    def mark(self, part: str) -> None:
        """Ends a lap."""
        now = time.thread_time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


class TextWrapper(ZeroWrapper):
    """A wrapper whose rows say one text over and over, each from another place on.

    Args:
      shapes: the shapes of steps.
      num_pages: KV pages.
      token_ids: the text.
      laps: gets the time in here as the part "wrapper", and what the engine does in between as "read".
    """

    def __init__(self, shapes: StepShapes, num_pages: int, token_ids: Sequence[int], laps: Laps):
        super().__init__(shapes, num_pages)
        self._text = np.array(token_ids, np.int32)
        self._laps = laps
        self._num_read = 0

    def launch(self, batch: StepBatch) -> Any:
        """Returns the batch, which serves as the handle."""
        self._laps.mark("read")
        handle = super().launch(batch)
        self._laps.mark("wrapper")
        return handle

    def collect(self, handle: Any) -> StepResult:
        """The next token of the text for every row."""
        self._laps.mark("read")
        places = _SHIFT * np.arange(handle.shape.num_logits) + self._num_read
        self._num_read += 1
        result = StepResult(token_ids=np.take(self._text, places, mode="wrap"))
        self._laps.mark("wrapper")
        return result


class TimedSteps(DynamicEngine):
    """An engine that marks when a step has been scheduled, when its arrays are made and when its tokens are read.

    Args:
      laps: the stopwatch.
      wrapper, config, max_model_len: as DynamicEngine.
    """

    def __init__(self, laps: Laps, wrapper: TextWrapper, config: EngineConfig, *, max_model_len: int):
        super().__init__(wrapper, config, max_model_len=max_model_len)
        self._laps = laps

    def step(self) -> list[TokenEvent]:
        """As DynamicEngine.step."""
        self._laps.begin()
        events = super().step()
        self._laps.mark("read")
        return events

    def _plan(self, schedule: Schedule, masks: dict[int, np.ndarray] | None, record: StepRecord | None) -> Any:
        self._laps.mark("schedule")
        planned = super()._plan(schedule, masks, record)
        self._laps.mark("batch")
        return planned


def measure(*, rows: Sequence[int], waiting: Sequence[int], num_steps: int) -> HostResult:
    """Times decode steps of requests that sample with top-p, with the tokenizer of the bundled model.

    Args:
      rows: numbers of requests that decode.
      waiting: numbers of requests that wait.
      num_steps: steps to time for each line.
    """
    tokenizer = SentencePieceTokenizer(resolve(DEMO))
    lines = [
        _time(tokenizer, num_rows, num_waiting, stop_strings=stop_strings, num_steps=num_steps)
        for stop_strings in (False, True)
        for num_rows in rows
        for num_waiting in waiting
    ]
    return HostResult(num_steps=num_steps, lines=tuple(lines))


def _time(tokenizer: Tokenizer, rows: int, waiting: int, *, stop_strings: bool, num_steps: int) -> HostTime:
    laps = Laps()
    controller = _controller(tokenizer, laps, rows, num_steps)
    params = SamplingParams(
        max_tokens=None,
        temperature=0.7,
        top_p=0.9,
        ignore_eos=True,
        stop=list(_STOP_STRINGS) if stop_strings else None,
    )
    page_size = EngineConfig().page_size
    lengths = [1 + number % page_size for number in range(rows + waiting)]  # so that some rows begin a page in a step
    prompts = random_prompts(lengths, vocab_size=tokenizer.vocab_size, seed=(0,))
    answers = [controller.submit(controller.prepare(prompt, params)) for prompt in prompts]
    while not all(answer.num_tokens for answer in answers[:rows]):
        controller.step()
    for _ in range(_UNTIMED_STEPS):
        _step(controller, laps)
    times = []
    for _ in range(num_steps):
        _step(controller, laps)
        times.append([1e6 * laps.seconds[part] for part in PARTS])
    _check(answers, rows, num_steps)
    medians = map(statistics.median, zip(*times, strict=True))
    return HostTime(
        rows=rows,
        waiting=waiting,
        stop_strings=stop_strings,
        total_us=statistics.median(map(sum, times)),
        **{f"{part}_us": median for part, median in zip(PARTS, medians, strict=True)},
    )


def _controller(tokenizer: Tokenizer, laps: Laps, rows: int, num_steps: int) -> TextGenerationController:
    """The text side over an engine with so many slots, and pages for as many tokens as its rows will have."""
    config = EngineConfig(max_num_seqs=rows)
    num_prefills = rows  # steps in which rows decode already while others are prefilled, at most
    max_model_len = config.page_size + num_prefills + _UNTIMED_STEPS + num_steps + 8
    shapes = StepShapes(config, max_model_len=max_model_len)
    wrapper = TextWrapper(shapes, rows * shapes.table_width, tokenizer.encode_plain(_TEXT), laps)
    return TextGenerationController(
        TimedSteps(laps, wrapper, config, max_model_len=max_model_len),
        tokenizer,
        defaults=GenerationDefaults(),
        vocab_size=tokenizer.vocab_size,
        max_model_len=max_model_len,
    )


def _step(controller: TextGenerationController, laps: Laps) -> None:
    """One step, after which an output is taken of every answer that has changed."""
    changed = controller.step()
    laps.mark("answers")
    for answer in changed:
        answer.output()
    laps.mark("outputs")


def _check(answers: Sequence[GrowingAnswer], rows: int, num_steps: int) -> None:
    """Refuses to report steps in which others took part than it says."""
    running, waiting = answers[:rows], answers[rows:]
    if min(answer.num_tokens for answer in running) < num_steps or any(answer.num_tokens for answer in waiting):
        raise RuntimeError("not exactly the first rows have decoded in every timed step")


def render(result: HostResult) -> str:
    """A table of the parts of a step."""
    header = ["rows", "waiting", "stop strings", *(f"{part} us" for part in PARTS), "total us"]
    lines = [
        [
            line.rows,
            line.waiting,
            "yes" if line.stop_strings else "no",
            *(getattr(line, f"{part}_us") for part in PARTS),
            line.total_us,
        ]
        for line in result.lines
    ]
    return format_table(header, lines)
