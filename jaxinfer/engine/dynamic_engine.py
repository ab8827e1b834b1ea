"""The engine, with in-flight batching: requests may come and go at every step.

Owns: the loop schedule -> drafts -> batch -> launch -> collect -> events, and the queue of launched steps.
Does not know: text, models, devices. Counterpart of Megatron's DynamicInferenceEngine.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.config.attention_span import widest
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.sizes import size_text
from jaxinfer.engine.batch import make_batch
from jaxinfer.engine.beams import BeamSearch
from jaxinfer.engine.drafting import Drafter
from jaxinfer.engine.ending import start_constraint
from jaxinfer.engine.outcomes import FailedRequest, FinishedSearch
from jaxinfer.engine.reading import keep_scores, token_logprobs
from jaxinfer.engine.schedule import SamplingRows, Schedule
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.engine.stats import EngineStats
from jaxinfer.engine.step_log import StepLog, StepRecord
from jaxinfer.engine.step_taps import TapPlanner, failed_hooks, keep_captures
from jaxinfer.errors import INTERRUPTS
from jaxinfer.request import Request, TokenEvent
from jaxinfer.sampling_params import BeamSearchParams
from jaxinfer.sites import Sites
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_result import LogprobArrays, StepResult
from jaxinfer.wrappers.step_taps import StepTaps


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A launched step."""

    handle: Any
    schedule: Schedule
    taps: StepTaps | None
    record: StepRecord | None


@dataclass(frozen=True, slots=True)
class _Planned:
    """A step to be launched."""

    schedule: Schedule
    batch: StepBatch
    record: StepRecord | None


class DynamicEngine:
    """Generates tokens for many requests at a time: add requests, then call step until nothing is unfinished.

    Args:
      wrapper: computes the steps.
      config: the engine's settings.
      max_model_len: limit on the tokens of prompt and output together.
      drafter: proposes drafts for speculative decoding; None decodes one token at a time.

    Raises:
      ValueError: chunked prefill is off and a prompt might not fit into one step.

    Example (ids in, ids out):
      engine.add_request(Request(request_id="a", prompt_token_ids=(1, 2, 3), max_tokens=4))
      while engine.has_unfinished():
          for event in engine.step():
              print(event.request_id, event.token_id, event.finish_reason)
    """

    def __init__(
        self,
        wrapper: AbstractModelInferenceWrapper,
        config: EngineConfig,
        *,
        max_model_len: int,
        drafter: Drafter | None = None,
    ):
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"without chunked prefill, max_num_batched_tokens must be >= max_model_len, got "
                f"{config.max_num_batched_tokens} < {max_model_len}; raise it or set enable_chunked_prefill"
            )
        self._wrapper = wrapper
        self._drafter = drafter
        self._scheduler = Scheduler(
            config,
            shapes=wrapper.shapes,
            num_pages=wrapper.num_pages,
            max_model_len=max_model_len,
            span=wrapper.span if drafter is None else widest([wrapper.span, drafter.span]),
            plan_drafts=None if drafter is None else self._plan_drafts,
        )
        wrapper.foresee(self._scheduler.coming_shapes)
        self.log: StepLog | None = None
        """Where steps are logged while it is set."""
        self._taps = TapPlanner(wrapper.shapes)
        self._max_research_bytes = config.max_research_bytes
        self._num_stages = wrapper.shapes.num_stages
        self._max_num_seqs = config.max_num_seqs
        # A sequence with drafts is not scheduled again before its tokens are read. Running ahead would therefore only
        # split such sequences into groups that take turns in half-empty steps.
        self._max_in_flight = self._num_stages + (config.run_ahead and drafter is None)
        self._in_flight: deque[list[_InFlight]] = deque()  # the steps of each launch
        self._sequences: dict[str, SequenceState] = {}
        self._searches: dict[str, BeamSearch] = {}
        self._finished_searches: list[FinishedSearch] = []
        self._failed_requests: list[FailedRequest] = []
        self._num_finished = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._num_steps = 0
        self._draft_tokens = 0
        self._accepted_draft_tokens = 0

    def lower_page_limit(self, num_pages: int) -> None:
        """Refuses requests that need more than so many KV pages, for another replica may have no more."""
        self._scheduler.limits.lower_pages(num_pages)

    @property
    def longest_request(self) -> int:
        """Tokens of prompt and output that one request can have."""
        return self._scheduler.limits.longest

    def check_request(self, request: Request, *, beam_width: int = 1) -> None:
        """Refuses what add_request or add_beam_search would refuse, without queueing anything.

        Args:
          request: the request.
          beam_width: of the beam search; 1 for a request that is sampled.

        Raises:
          ValueError: as add_request and add_beam_search.
        """
        self._check_room(request, beam_width=beam_width)
        self._check_taps(request)
        start_constraint(request)

    @property
    def sites(self) -> Sites:
        """The sites of the model, at which requests can capture and change values.

        Raises:
          ValueError: the model has none, as in a run of several processes.
        """
        return self._wrapper.sites

    def check_capture_bytes(self, requests: Iterable[Request]) -> None:
        """Refuses requests whose captures may together take more memory on the host than max_research_bytes.

        Raises:
          ValueError: they exceed it if every request becomes as long as it may.
        """
        requests = [request for request in requests if request.capture is not None]
        sites = {site.name: site for request in requests if request.capture for site in request.capture.sites}
        if sites:
            self._wrapper.check_captures(list(sites.values()))
        num_bytes = sum(map(self._capture_bytes, requests))
        if num_bytes > self._max_research_bytes:
            raise ValueError(
                f"the captures could take {size_text(num_bytes)}, the limit of a call is "
                f"{size_text(self._max_research_bytes)}; name fewer sites or tokens, pass fewer prompts a call or "
                f"raise max_research_bytes"
            )

    def _capture_bytes(self, request: Request) -> int:
        if request.capture is None:
            return 0
        num_tokens = len(request.capture.span.within(0, self._scheduler.limits.max_total_len(request) - 1))
        num_tokens += request.capture.num_shared
        return num_tokens * sum(math.prod(site.dims) for site in request.capture.sites) * np.dtype(np.float32).itemsize

    def add_request(self, request: Request, *, prefix_source: str | None = None) -> None:
        """Queues a request.

        Args:
          request: the request.
          prefix_source: id of an earlier request with the same prompt, whose pages the new one shares.

        Raises:
          ValueError: its id is in use, it could never run (prompt too long, more pages than the pool has), its
            constraint allows no first token, or a number is no token id.
        """
        ids = request.known_token_ids if prefix_source is None else ()  # what it shares was checked
        if ids and not 0 <= min(ids) <= max(ids) < 2**31:
            raise ValueError(f"token ids must be in 0..2**31 - 1, got {min(ids)}..{max(ids)}")
        self._check_room(request)
        self._check_taps(request)
        self._sequences[request.request_id] = self._scheduler.add(
            request,
            prefix_source=None if prefix_source is None else self._sequences.get(prefix_source),
            is_host_fed=self._drafter is not None and not request.is_edited,
        )
        self._prompt_tokens += 0 if prefix_source else len(request.known_token_ids)

    def add_beam_search(self, request: Request, params: BeamSearchParams) -> None:
        """Queues a beam search; finished_searches returns its result.

        Args:
          request: gives prompt, length, end tokens and priority; its sampling settings have no effect.
          params: the search's other settings.

        Raises:
          ValueError: its id is in use, or it could never run.
        """
        self._check_room(request, beam_width=params.beam_width)
        self._searches[request.request_id] = BeamSearch(request, params, self._scheduler)
        self._prompt_tokens += len(request.prompt_token_ids)

    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._sequences or self._searches)

    def finished_searches(self) -> list[FinishedSearch]:
        """The beam searches that ended since the last call."""
        finished, self._finished_searches = self._finished_searches, []
        return finished

    def failed_requests(self) -> list[FailedRequest]:
        """The requests that failed since the last call; no further event names them."""
        failed, self._failed_requests = self._failed_requests, []
        return failed

    def step(self) -> list[TokenEvent]:
        """Launches the next step and reads the oldest one that is due.

        Returns:
          The tokens read, in the order of their rows; empty while the pipeline fills. A request's last token carries
          its finish_reason. Failed requests and finished beam searches have no such event: failed_requests and
          finished_searches return them.
        """
        record = self._begin_record()
        schedule = self._scheduler.schedule()
        launching = bool(schedule) or self._awaits_the_pipeline()
        if launching:
            if self._drafter is not None:
                schedule = self._drafter.complete(schedule)
            constrained = self._constrained_with(schedule)
            masks = self._masks(constrained)
            first = self._plan(schedule, masks, record)
            self._launch([first, *self._rest_of_chain(first)])
            self._end_failed(constrained)
        if len(self._in_flight) >= (self._max_in_flight if launching else self._num_stages):
            return [event for step in self._in_flight.popleft() for event in self._collect(step)]
        return []

    def _begin_record(self) -> StepRecord | None:
        return None if self.log is None else self.log.begin()

    def _plan(self, schedule: Schedule, masks: dict[int, np.ndarray] | None, record: StepRecord | None) -> _Planned:
        batch = make_batch(schedule, self._wrapper.shapes, masks, self._taps)
        if record is not None:
            record.scheduled(schedule, batch, self._scheduler)
        return _Planned(schedule, batch, record)

    def _rest_of_chain(self, first: _Planned) -> list[_Planned]:
        """The steps that are launched with a step; none where they could have to do anything but decode."""
        num_more = self._wrapper.chain_len(first.batch) - 1
        if not num_more or not self._scheduler.only_decodes(num_more):
            return []
        planned = []
        for _ in range(num_more):
            record = self._begin_record()
            planned.append(self._plan(self._scheduler.schedule(), None, record))
        return planned

    def _launch(self, planned: Sequence[_Planned]) -> None:
        """Launches a step, or the steps of a chain."""
        batches = [step.batch for step in planned]
        handles = self._wrapper.launch_chain(batches) if len(batches) > 1 else [self._wrapper.launch(batches[0])]
        self._in_flight.append(
            [
                _InFlight(handle, step.schedule, step.batch.taps, step.record)
                for handle, step in zip(handles, planned, strict=True)
            ]
        )
        for step in planned:
            if step.record is not None and self.log is not None:
                self.log.launched(step.record)
            self._num_steps += bool(step.schedule)

    def _masks(self, constrained: Sequence[SamplingRows]) -> dict[int, np.ndarray]:
        """The masks of constrained sequences, by slot, for their rows that are sampled with a launch.

        If a constraint raises, its sequence gets no mask; the exception becomes its error, and _end_failed ends it.
        """
        masks = {}
        for rows in constrained:
            if rows.sequence.constraint is not None:
                try:
                    masks[rows.slot] = rows.sequence.constraint.allowed()
                except INTERRUPTS:
                    raise
                except BaseException as error:  # a panic of a grammar written in Rust is no Exception
                    rows.sequence.error = error
        return masks

    def _constrained_with(self, schedule: Schedule) -> list[SamplingRows]:
        """The rows of unfinished constrained sequences that are sampled when a schedule is launched.

        With one stage they are the schedule's own. In a pipeline of S stages they belong to the step launched S - 1
        launches earlier, which now leaves the last stage.
        """
        recent = [step.schedule for launch in self._in_flight for step in launch] + [schedule]
        leaving = recent[-self._num_stages].sampled if len(recent) >= self._num_stages else ()
        constrained = [rows for rows in leaving if rows.sequence.constraint is not None]
        return [rows for rows in constrained if rows.sequence.finish_reason is None]

    def _end_failed(self, constrained: Sequence[SamplingRows]) -> None:
        """Ends the sequences whose constraint raised; the tokens of their rows, already launched, will be dropped."""
        for rows in constrained:
            sequence = rows.sequence
            if sequence.error is not None and sequence.finish_reason is None:
                self._scheduler.finish(sequence, "abort")
                self._fail(sequence, sequence.error)

    def _fail(self, sequence: SequenceState, error: BaseException) -> None:
        """Reports an ended sequence as failed."""
        request_id = sequence.request.request_id
        del self._sequences[request_id]
        self._num_finished += 1
        self._failed_requests.append(FailedRequest(request_id=request_id, error=error))

    def _awaits_the_pipeline(self) -> bool:
        """Whether a step that is still in the pipeline samples a token for an unfinished sequence."""
        inside = itertools.islice(reversed(self._in_flight), self._num_stages - 1)  # pipelines have no chains
        return any(rows.sequence.finish_reason is None for step, *_ in inside for rows in step.schedule.sampled)

    def abort(self, request_id: str) -> bool:
        """Ends a request at once; no further event names it.

        Returns:
          Whether there was an unfinished request with this id.
        """
        search, sequence = self._searches.pop(request_id, None), self._sequences.pop(request_id, None)
        if search is not None:
            search.abort()
        elif sequence is not None:
            self._scheduler.finish(sequence, "abort")
        else:
            return False
        self._num_finished += 1
        return True

    def _check_room(self, request: Request, *, beam_width: int = 1) -> None:
        if request.request_id in self._sequences or request.request_id in self._searches:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        if beam_width > self._max_num_seqs:
            raise ValueError(
                f"beam_width must be <= max_num_seqs, so that all beams can run side by side, got {beam_width} > "
                f"{self._max_num_seqs}; lower it or raise max_num_seqs"
            )
        self._scheduler.limits.check(request, num_sequences=beam_width)

    def _check_taps(self, request: Request) -> None:
        self.check_capture_bytes([request])
        kinds = [hook.kind for hook in (*request.hooks, *request.logits_hooks)]
        if kinds:
            self._wrapper.check_hooks(kinds)

    def _plan_drafts(self, sequence: SequenceState, most: int) -> Sequence[int]:
        if self._drafter is None or sequence.request.request_id in self._searches:
            return ()
        return self._drafter.plan(sequence, most)

    def forget_steps(self) -> None:
        """Forgets the steps in flight, whose results nobody waits for any more.

        Raises:
          ValueError: a request is unfinished.
        """
        if self.has_unfinished():
            raise ValueError("steps can be forgotten when no request is unfinished; abort them or step on")
        self._in_flight.clear()
        self._taps.give_back()

    def flush_prefix_cache(self) -> None:
        """Forgets what the prefix cache can find, as its keys and values are those of weights that are replaced.

        Raises:
          ValueError: a request is unfinished.
        """
        self._scheduler.pages.flush()

    def num_cached_pages(self, page_hashes: Sequence[bytes]) -> int:
        """How many pages of a text's beginning the prefix cache has at present; any thread may ask.

        Args:
          page_hashes: of the text's full pages (page_allocator.page_hashes).
        """
        return self._scheduler.num_cached_pages(page_hashes)

    def stats(self) -> EngineStats:
        """The present load, and counts since the engine began."""
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
            draft_tokens=self._draft_tokens,
            accepted_draft_tokens=self._accepted_draft_tokens,
            num_compilations=self._wrapper.num_compilations,
        )

    def _collect(self, step: _InFlight) -> list[TokenEvent]:
        if step.record is not None:
            step.record.awaited()
        result = self._wrapper.collect(step.handle)
        if step.record is not None:
            step.record.collected()
        if result.scores is not None:
            keep_scores(step.schedule, result.scores)
        token_ids = result.token_ids.tolist()
        self._taps.give_back()
        if result.captures is not None and step.taps is not None:
            keep_captures(step.schedule, token_ids, result.captures, self._wrapper)
            for sequence, error in failed_hooks(step.schedule, token_ids, result.captures, step.taps):
                self._scheduler.finish(sequence, "abort")
                self._fail(sequence, error)
        events, row = [], 0
        for rows in step.schedule.sampled:
            sequence, end = rows.sequence, row + rows.num_sampled
            # A sequence may have finished after this step was launched; its token is dropped.
            if sequence.finish_reason is None:
                if sequence.request.request_id in self._searches:
                    self._read_beam(sequence, row, result)
                else:
                    events += self._read(rows, token_ids[row:end], row, result.logprobs)
            row = end
        return events

    def _read_beam(self, sequence: SequenceState, place: int, result: StepResult) -> None:
        """Gives a beam search the logit row of one of its beams, and records its result once it has ended."""
        request_id, num_top = sequence.request.request_id, sequence.num_top
        search = self._searches[request_id]
        self._generation_tokens += 1
        if result.logprobs is None or num_top is None:
            raise ValueError(f"beam search {request_id!r} got no log-probabilities")
        if search.read(sequence, token_logprobs(result.logprobs, place, num_top)):
            del self._searches[request_id]
            self._num_finished += 1
            self._finished_searches.append(
                FinishedSearch(
                    request_id=request_id, hypotheses=search.hypotheses, num_cached_tokens=search.num_cached_tokens
                )
            )

    def _read(
        self, rows: SamplingRows, sampled: list[int], first: int, found: LogprobArrays | None
    ) -> list[TokenEvent]:
        """The events of one sequence, whose logit rows begin with row `first` of the step."""
        sequence, request = rows.sequence, rows.sequence.request
        scores = None
        if request.prompt_logprobs is not None and len(sequence.token_ids) == len(request.known_token_ids):
            scores = tuple(sequence.prompt_logprobs)
        num_new = self._scheduler.append(sequence, sampled, rows.drafts)
        self._generation_tokens += num_new
        if rows.drafts:
            self._draft_tokens += len(rows.drafts)
            self._accepted_draft_tokens += num_new - 1
        if sequence.error is not None:
            self._fail(sequence, sequence.error)
            return []
        if sequence.finish_reason is not None:
            del self._sequences[request.request_id]
            self._num_finished += 1
        num_top, events = sequence.num_top, []
        for i in range(num_new):
            event = TokenEvent(
                request_id=request.request_id,
                token_id=sampled[i],
                logprobs=None if found is None or num_top is None else token_logprobs(found, first + i, num_top),
                prompt_logprobs=scores if i == 0 else None,
                finish_reason=sequence.finish_reason if i == num_new - 1 else None,
                num_cached_tokens=sequence.num_cached_tokens or 0,
                captured=sequence.captured,
            )
            events.append(event)
        return events
