"""In-flight batching: requests come and go while steps run.

Owns: the loop schedule -> batch -> launch -> collect -> events, and the queue of launched steps.
Does not know: text, models, devices. Counterpart of Megatron's DynamicInferenceEngine.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.engine.batch import make_batch
from jaxinfer.engine.scheduler import Scheduler, SequenceState
from jaxinfer.request import Request, TokenEvent, TokenLogprobs
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.step_batch import LogprobArrays, StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counts since the engine began; pages exclude the dump page.

    Args:
      num_requests_running, num_requests_waiting, num_requests_finished: requests by state; aborted ones are finished.
      kv_pages_total, kv_pages_used, kv_pages_cached: pages of the pool, with an owner, and findable without one.
      prefix_cache_queries, prefix_cache_hits: prompt tokens looked up and found.
      num_preemptions: sequences sent back to the queue.
      prompt_tokens, generation_tokens: tokens of accepted prompts and tokens read.
      num_steps: steps launched with work; a pipeline needs some without to move on.
      num_rows_live, num_rows_launched: rows with work and rows of the programs run, summed over stages and steps; a row
        is a decoding sequence or a block of a prompt.
      num_compilations: programs compiled.
    """

    num_requests_running: int
    num_requests_waiting: int
    num_requests_finished: int
    kv_pages_total: int
    kv_pages_used: int
    kv_pages_cached: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_rows_live: int
    num_rows_launched: int
    num_compilations: int


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A launched step and the sequences that its leading logit rows belong to."""

    handle: Any
    sequences: tuple[SequenceState, ...]


class DynamicEngine:
    """Drives a wrapper by hand: add requests, call step until nothing is unfinished.

    Args:
      wrapper: computes the steps.
      config: the engine's settings.
      max_model_len: tokens of prompt and output together.

    Raises:
      ValueError: without chunked prefill, a prompt might not fit into one step.

    Example (ids in, ids out):
      engine.add_request(Request(request_id="a", prompt_token_ids=(1, 2, 3), max_tokens=4))
      while engine.has_unfinished():
          for event in engine.step():
              print(event.request_id, event.token_id, event.finish_reason)
    """

    def __init__(self, wrapper: AbstractModelInferenceWrapper, config: EngineConfig, *, max_model_len: int):
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"without chunked prefill, max_num_batched_tokens must be >= max_model_len, got "
                f"{config.max_num_batched_tokens} < {max_model_len}; raise it or set enable_chunked_prefill"
            )
        self._wrapper = wrapper
        self._scheduler = Scheduler(
            config, shapes=wrapper.shapes, num_pages=wrapper.num_pages, max_model_len=max_model_len
        )
        self._num_stages = wrapper.shapes.num_stages
        self._max_in_flight = self._num_stages + config.run_ahead
        self._in_flight: deque[_InFlight] = deque()
        self._sequences: dict[str, SequenceState] = {}
        self._num_finished = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._num_steps = 0

    def check_request(self, request: Request) -> None:
        """Refuses a request that add_request would refuse, without queueing it.

        Raises:
          ValueError: as add_request.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        self._scheduler.check_fits(request)

    def add_request(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ValueError: its id is in use, or it could never run (prompt too long, more pages than the pool has).
        """
        self.check_request(request)
        self._sequences[request.request_id] = self._scheduler.add(request)
        self._prompt_tokens += len(request.prompt_token_ids)

    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._sequences)

    def step(self) -> list[TokenEvent]:
        """Launches the next step and reads the oldest one that is due.

        Returns:
          The tokens read, in the order of their rows; empty while the pipeline fills. A request's last token carries
          its finish_reason.
        """
        schedule = self._scheduler.schedule()
        launching = bool(schedule) or self._awaits_the_pipeline()
        if launching:
            handle = self._wrapper.launch(make_batch(schedule, self._wrapper.shapes))
            self._in_flight.append(_InFlight(handle, tuple(schedule.sampling_rows())))
            self._num_steps += bool(schedule)
        if len(self._in_flight) >= (self._max_in_flight if launching else self._num_stages):
            return self._collect(self._in_flight.popleft())
        return []

    def _awaits_the_pipeline(self) -> bool:
        """Whether a token that somebody waits for is in a step that is not through yet."""
        inside = itertools.islice(reversed(self._in_flight), self._num_stages - 1)
        return any(sequence.finish_reason is None for step in inside for sequence in step.sequences)

    def abort(self, request_id: str) -> bool:
        """Ends a request at once; no further event names it.

        Returns:
          Whether it was unfinished.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._scheduler.finish(sequence, "abort")
        self._num_finished += 1
        return True

    def stats(self) -> EngineStats:
        """Counts since the engine began."""
        scheduler, pages, usage = self._scheduler, self._scheduler.pages, self._wrapper.row_usage
        return EngineStats(
            num_requests_running=scheduler.num_running,
            num_requests_waiting=scheduler.num_waiting,
            num_requests_finished=self._num_finished,
            kv_pages_total=pages.num_pages,
            kv_pages_used=pages.num_used,
            kv_pages_cached=pages.num_cached,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            num_steps=self._num_steps,
            num_rows_live=usage.live,
            num_rows_launched=usage.launched,
            num_compilations=self._wrapper.num_compilations,
        )

    def _collect(self, step: _InFlight) -> list[TokenEvent]:
        result = self._wrapper.collect(step.handle)
        events = []
        for row, sequence in enumerate(step.sequences):
            # A finished sequence was launched once more before the host knew; that token is dropped.
            if sequence.finish_reason is None:
                events.append(self._read(row, sequence, result))
        return events

    def _read(self, row: int, sequence: SequenceState, result: StepResult) -> TokenEvent:
        request, token_id = sequence.request, int(result.token_ids[row])
        self._scheduler.append(sequence, token_id)
        self._generation_tokens += 1
        if sequence.finish_reason is not None:
            del self._sequences[request.request_id]
            self._num_finished += 1
        logprobs = None
        if request.logprobs is not None and result.logprobs is not None:
            logprobs = _token_logprobs(result.logprobs, row, request.logprobs)
        return TokenEvent(
            request_id=request.request_id,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            num_cached_tokens=sequence.num_cached_tokens or 0,
        )


def _token_logprobs(arrays: LogprobArrays, row: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=float(arrays.logprob[row]),
        rank=int(arrays.rank[row]),
        top_ids=tuple(arrays.top_ids[row, :num_top].tolist()),
        top_logprobs=tuple(arrays.top_logprobs[row, :num_top].tolist()),
    )
