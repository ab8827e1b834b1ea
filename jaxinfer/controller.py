"""Text in, text out, around an engine that only knows ids.

Owns: which prompt each of the engine's events belongs to, and the answers while they grow.
Does not know: devices, threads, schedules. Counterpart of Megatron's TextGenerationController.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from jaxinfer.completion import GrowingCompletion, as_logprobs
from jaxinfer.config import GenerationDefaults
from jaxinfer.engine.dynamic_engine import DynamicEngine, FinishedSearch
from jaxinfer.outputs import Logprob, RequestMetrics, RequestOutput
from jaxinfer.preparation import Preparation, Prompt, Submission
from jaxinfer.record import Provenance
from jaxinfer.request import TokenEvent, TokenLogprobs
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.tokenizer import Tokenizer

PromptLogprobs = tuple[dict[int, Logprob] | None, ...]


@dataclass(slots=True)
class _Answer:
    """The growing answer to one submission."""

    submission: Submission
    arrival_time: float
    completions: list[GrowingCompletion]
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all its texts have ended."""
        return all(completion.finish_reason is not None for completion in self.completions)


class TextGenerationController:
    """Turns prompts into engine requests and engine tokens into text.

    Not thread-safe, save for prepare and prepare_beam_search: one thread submits, steps and reads.

    Args:
      engine: runs the requests.
      tokenizer: None works on ids alone.
      defaults: of the checkpoint.
      vocab_size: of the model; prompt ids lie below it.
      max_model_len: tokens of prompt and output together.
      seed: from which the seeds of requests without one are derived.
      provenance: for the records of outputs; None makes outputs without a record.
    """

    def __init__(
        self,
        engine: DynamicEngine,
        tokenizer: Tokenizer | None,
        *,
        defaults: GenerationDefaults,
        vocab_size: int,
        max_model_len: int,
        seed: int = 0,
        provenance: Provenance | None = None,
    ):
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._provenance = provenance
        self._preparation = Preparation(
            tokenizer, defaults=defaults, vocab_size=vocab_size, max_model_len=max_model_len, seed=seed
        )
        self._answers: dict[str, _Answer] = {}
        self._places: dict[str, tuple[_Answer, int]] = {}  # engine's request id -> the answer and which of its texts

    @property
    def default_params(self) -> SamplingParams:
        """The checkpoint's own way of sampling, for calls that bring no SamplingParams."""
        return SamplingParams(
            temperature=self._defaults.temperature, top_k=self._defaults.top_k, top_p=self._defaults.top_p
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt as generation would see it; errors as prepare's."""
        return self._preparation.encode(prompt)

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Submission:
        """Tokenises and validates a prompt, changing nothing.

        Args:
          prompt: text, or token ids.
          params: how to sample.
          add_special_tokens: put around a text what the tokenizer puts around prompts (BOS and such); a chat template
            has written that itself.

        Raises:
          TypeError: the prompt is neither text nor ids.
          ValueError: it is empty, too long, has ids outside the vocabulary, or could never fit the KV pages; or the
            parameters contradict each other, need a tokenizer that is not there, or bring a bad grammar.
          ImportError: structured output without llguidance.
        """
        submission = self._preparation.samples(prompt, params, add_special_tokens=add_special_tokens)
        self._engine.check_request(submission.requests[0])
        return submission

    def prepare_beam_search(self, prompt: Prompt, params: BeamSearchParams) -> Submission:
        """As prepare, for a beam search.

        Raises:
          TypeError, ValueError: as prepare; or more beams than can run side by side.
        """
        submission = self._preparation.beam_search(prompt, params)
        self._engine.check_request(submission.requests[0], beam_width=params.beam_width)
        return submission

    def submit(self, submission: Submission) -> str:
        """Starts a prepared submission.

        Returns:
          Its request id, for output, abort and forget.
        """
        requests, params = submission.requests, submission.params
        count = len(requests) if submission.beam_search is None else submission.beam_search.num_return_sequences
        completions = [
            GrowingCompletion(
                index,
                requests[min(index, len(requests) - 1)],
                params,
                tokenizer=self._tokenizer,
                eos_token_ids=self._preparation.eos_token_ids,
            )
            for index in range(count)
        ]
        answer = _Answer(submission, time.monotonic(), completions)
        request_id = requests[0].request_id
        self._answers[request_id] = answer
        if submission.beam_search is not None:
            self._engine.add_beam_search(requests[0], submission.beam_search)
        elif params.max_tokens == 0 and params.prompt_logprobs is None:
            self._finish_all(answer)
        elif params.max_tokens == 0:  # the first token comes with the prompt's log-probabilities and is dropped
            self._engine.add_request(requests[0])
            self._places[request_id] = (answer, 0)
        else:
            for index, request in enumerate(requests):
                self._engine.add_request(request, leader=request_id if index else None)
                self._places[request.request_id] = (answer, index)
        return request_id

    def has_unfinished(self) -> bool:
        """Whether the engine still has work."""
        return self._engine.has_unfinished()

    def step(self) -> list[str]:
        """Advances the engine by one step.

        Returns:
          The request of every token that came, and of every beam search that ended.
        """
        events = self._engine.step()
        changed = [self._consume(event) for event in events]
        return changed + [self._end_search(search) for search in self._engine.finished_searches()]

    def output(self, request_id: str) -> RequestOutput:
        """A snapshot of a request; its deltas are the text since the previous snapshot.

        Raises:
          KeyError: no such request, or it was forgotten.
        """
        answer = self._answers[request_id]
        submission = answer.submission
        return RequestOutput(
            request_id=request_id,
            prompt=submission.prompt,
            prompt_token_ids=submission.requests[0].prompt_token_ids,
            prompt_logprobs=answer.prompt_logprobs,
            outputs=tuple(completion.output() for completion in answer.completions),
            finished=answer.is_finished,
            num_cached_tokens=answer.num_cached_tokens,
            metrics=RequestMetrics(
                arrival_time=answer.arrival_time,
                first_token_time=answer.first_token_time,
                finished_time=answer.finished_time,
            ),
            sampling_params=submission.params if submission.beam_search is None else None,
            beam_search_params=submission.beam_search,
            provenance=self._provenance,
        )

    def is_finished(self, request_id: str) -> bool:
        """Whether a request has ended."""
        return self._answers[request_id].is_finished

    def abort(self, request_id: str) -> None:
        """Ends a request; its output stays until it is forgotten."""
        answer = self._answers[request_id]
        for completion in answer.completions:
            if completion.finish_reason is None:
                self._engine.abort(completion.request.request_id)
                completion.finish("abort")
        answer.finished_time = answer.finished_time or time.monotonic()

    def forget(self, request_id: str) -> None:
        """Drops a request's state, aborting it first if it still runs."""
        self.abort(request_id)
        for request in self._answers.pop(request_id).submission.requests:
            self._places.pop(request.request_id, None)

    def _consume(self, event: TokenEvent) -> str:
        """Takes a token to its text; returns the id of the answer."""
        answer, index = self._places[event.request_id]
        completion = answer.completions[index]
        answer.first_token_time = answer.first_token_time or time.monotonic()
        if index == 0:
            answer.num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            answer.prompt_logprobs = self._prompt_logprobs(completion, event.prompt_logprobs)
        if answer.submission.params.max_tokens == 0:
            self._finish_all(answer)
        else:
            completion.push(event)
        if completion.finish_reason is not None and event.finish_reason is None:
            self._engine.abort(event.request_id)
        if answer.is_finished:
            answer.finished_time = time.monotonic()
        return answer.submission.requests[0].request_id

    def _finish_all(self, answer: _Answer) -> None:
        """Ends texts of no tokens."""
        for completion in answer.completions:
            completion.finish("length")
        answer.finished_time = time.monotonic()

    def _end_search(self, search: FinishedSearch) -> str:
        """Gives a beam search's texts their tokens; fewer were found only if the vocabulary has no more, and none only
        if the model's numbers are not finite."""
        answer = self._answers[search.request_id]
        answer.num_cached_tokens = search.num_cached_tokens
        answer.finished_time = answer.first_token_time = time.monotonic()
        if not search.hypotheses:
            self.abort(search.request_id)
            return search.request_id
        del answer.completions[len(search.hypotheses) :]
        for completion, found in zip(answer.completions, search.hypotheses, strict=True):
            completion.complete(found.token_ids, found.finish_reason, found.score)
        return search.request_id

    def _prompt_logprobs(self, completion: GrowingCompletion, found: tuple[TokenLogprobs, ...]) -> PromptLogprobs:
        token_ids = completion.request.prompt_token_ids[1:]
        pairs = zip(token_ids, found, strict=True)
        return (None, *(as_logprobs(token_id, entry, self._tokenizer) for token_id, entry in pairs))
