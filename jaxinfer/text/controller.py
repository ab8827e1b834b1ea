"""Text in, text out, around an engine that only knows ids.

Owns: which answer each of the engine's events belongs to, and what ends an answer before the engine would.
Does not know: devices, threads, schedules. Counterpart of Megatron's TextGenerationController.
"""

from __future__ import annotations

from jaxinfer.config import GenerationDefaults
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.errors import INTERRUPTS
from jaxinfer.records.record import Provenance
from jaxinfer.request import TokenEvent
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.text.answer import GrowingAnswer
from jaxinfer.text.preparation import Preparation, Prompt, Submission
from jaxinfer.tokenizer.tokenizer import Tokenizer


class TextGenerationController:
    """Turns prompts into engine requests and engine tokens into text.

    Not thread-safe, save for prepare and prepare_beam_search: one thread submits and steps. Answers may be read by
    another one.

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
        # The engine's request id -> the answer, and which of its texts.
        self._places: dict[str, tuple[GrowingAnswer, int]] = {}

    @property
    def default_params(self) -> SamplingParams:
        """The checkpoint's own way of sampling, for calls that bring no SamplingParams."""
        return SamplingParams(
            temperature=self._defaults.temperature, top_k=self._defaults.top_k, top_p=self._defaults.top_p
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt as generation would see it; errors as prepare's."""
        return self._preparation.encode(prompt)

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True, ends_at: int | None = None
    ) -> Submission:
        """Tokenises and validates a prompt, changing nothing.

        Args:
          prompt: text, or token ids.
          params: how to sample.
          add_special_tokens: put around a text what the tokenizer puts around prompts (BOS and such); a chat template
            has written that itself.
          ends_at: tokens of prompt and output together at which a request without max_tokens ends; None is
            max_model_len.

        Raises:
          TypeError: the prompt is neither text nor ids.
          ValueError: it is empty, too long, has ids outside the vocabulary, or could never fit the KV pages; or the
            parameters contradict each other, need a tokenizer that is not there, or bring a bad grammar.
          ImportError: structured output without llguidance.
        """
        submission = self._preparation.samples(prompt, params, add_special_tokens=add_special_tokens, ends_at=ends_at)
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

    def submit(self, submission: Submission) -> GrowingAnswer:
        """Starts a prepared submission.

        Returns:
          Its answer, which grows with every step until it is finished.

        Raises:
          Whatever the submission's constraint raises when it starts; then nothing was queued.
        """
        answer = GrowingAnswer(
            submission,
            tokenizer=self._tokenizer,
            eos_token_ids=self._preparation.eos_token_ids,
            provenance=self._provenance,
        )
        requests, params = submission.requests, submission.params
        if params.max_tokens == 0 and params.prompt_logprobs is None:
            answer.finish("length")
            return answer
        try:
            for index, request in enumerate(requests):
                self._places[request.request_id] = (answer, index)
                if submission.beam_search is not None:
                    self._engine.add_beam_search(request, submission.beam_search)
                else:
                    self._engine.add_request(request, leader=answer.request_id if index else None)
        except BaseException:
            self.forget(answer)
            raise
        return answer

    def has_unfinished(self) -> bool:
        """Whether the engine still has work."""
        return self._engine.has_unfinished()

    def step(self) -> list[GrowingAnswer]:
        """Advances the engine by one step.

        Returns:
          The answers that changed: with new tokens, as the result of a beam search, or because they failed.
        """
        changed: dict[GrowingAnswer, None] = {}  # in the order of their first change
        for event in self._engine.step():
            answer, index = self._places[event.request_id]
            self._consume(answer, index, event)
            changed[answer] = None
        for search in self._engine.finished_searches():
            answer, _ = self._places[search.request_id]
            answer.end_search(search.hypotheses, num_cached_tokens=search.num_cached_tokens)
            changed[answer] = None
        for failure in self._engine.failed_requests():
            answer, _ = self._places[failure.request_id]
            self._fail(answer, failure.error)
            changed[answer] = None
        return list(changed)

    def abort(self, answer: GrowingAnswer) -> None:
        """Ends an answer with what it has so far."""
        self._end_requests(answer)
        answer.finish("abort")

    def forget(self, answer: GrowingAnswer) -> None:
        """Ends an answer, if it still grows, and drops what is kept for it here and in the engine."""
        self.abort(answer)
        for request in answer.submission.requests:
            self._places.pop(request.request_id, None)

    def _consume(self, answer: GrowingAnswer, index: int, event: TokenEvent) -> None:
        """Takes a token to its text."""
        if answer.error is not None or answer.completions[index].finish_reason is not None:
            return  # a stop string ended the text with an earlier token of this very step
        try:
            answer.push(index, event)
        except INTERRUPTS:
            raise
        except BaseException as error:  # of a tokenizer: a panic of one written in Rust is no Exception
            self._fail(answer, error)
        else:
            if event.finish_reason is None and answer.completions[index].finish_reason is not None:
                self._engine.abort(event.request_id)

    def _fail(self, answer: GrowingAnswer, error: BaseException) -> None:
        answer.error = answer.error or error
        self._end_requests(answer)

    def _end_requests(self, answer: GrowingAnswer) -> None:
        for request in answer.submission.requests:
            self._engine.abort(request.request_id)
