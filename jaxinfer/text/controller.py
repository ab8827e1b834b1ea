"""TextGenerationController: the engine's front end, with prompts as text or ids going in and answers coming out.

Owns: the answer that each engine event belongs to; ending an answer early because of a stop string, an error or an
abort.
Does not know: devices, threads, scheduling.

It is the counterpart of Megatron's TextGenerationController.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.errors import INTERRUPTS
from jaxinfer.outputs import RequestOutput
from jaxinfer.records.provenance import Provenance
from jaxinfer.request import TokenEvent
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.text.answer import GrowingAnswer
from jaxinfer.text.preparation import Preparation, Prompt, Submission
from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer


class TextGenerationController:
    """Turns prompts into engine requests and engine tokens into text.

    Any thread may call encode, prepare and prepare_beam_search. All other methods belong to one thread, which submits
    and steps; another thread may read the answers.

    Args:
      engine: runs the requests.
      tokenizer: None takes and returns token ids only.
      defaults: the checkpoint's sampling settings and end tokens.
      vocab_size: the model's; prompt ids must be below it.
      max_model_len: tokens of prompt and output together that a request may have.
      seed: for a request without a seed of its own, one is derived from this and the request's number.
      provenance: put into every output, for its record; None makes outputs without a record.
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
        self.weights_version = 0
        """How often the model's weights were replaced before the requests that are submitted now."""
        self._preparation = Preparation(
            tokenizer,
            defaults=defaults,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            seed=seed,
            find_sites=lambda: engine.sites,
        )
        # The engine's request id -> the answer it belongs to, and the index of its text in that answer.
        self._places: dict[str, tuple[GrowingAnswer, int]] = {}

    @property
    def default_params(self) -> SamplingParams:
        """The checkpoint's own sampling settings, for calls that give no SamplingParams."""
        return SamplingParams(
            temperature=self._defaults.temperature, top_k=self._defaults.top_k, top_p=self._defaults.top_p
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, with special tokens, as generate would use them; errors as prepare's."""
        return self._preparation.encode(prompt)

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True, ends_at: int | None = None
    ) -> Submission:
        """Tokenises and validates a prompt. Nothing starts until the result is passed to submit.

        Args:
          prompt: text, or token ids.
          params: how to sample.
          add_special_tokens: let the tokenizer put its special tokens (BOS and such) around a text prompt. False for
            the text of a chat template, which contains them already.
          ends_at: a request with max_tokens=None ends when prompt and output together have this many tokens; None is
            max_model_len.

        Raises:
          TypeError: the prompt is neither text nor ids.
          ValueError: the prompt is empty, too long, has ids outside the vocabulary, or could never fit the KV pages; or
            the parameters contradict each other, need a tokenizer that the LLM lacks, or contain a bad grammar.
          ImportError: the parameters ask for structured output and llguidance is not installed.
        """
        submission = self._preparation.samples(prompt, params, add_special_tokens=add_special_tokens, ends_at=ends_at)
        self._engine.check_request(submission.requests[0])
        return submission

    def prepare_fork(self, output: RequestOutput, params: SamplingParams, *, at: int, index: int = 0) -> Submission:
        """Makes a submission that goes on from the middle of a generated text.

        Args:
          output: of an earlier request.
          params: how to sample what follows.
          at: tokens of the text to keep; below 0, as many fewer than all.
          index: which of the output's texts.

        Raises:
          IndexError: the output has no such text, or the text not so many tokens.
          ValueError: as prepare, or the kept tokens are not what the parameters' structured output could begin with.
        """
        if not 0 <= index < len(output.outputs):
            raise IndexError(f"index must be in 0..{len(output.outputs) - 1}, the output's texts, got {index}")
        token_ids = output.outputs[index].token_ids
        if not -len(token_ids) <= at <= len(token_ids):
            raise IndexError(f"at must be in {-len(token_ids)}..{len(token_ids)}, the text's tokens, got {at}")
        kept = token_ids[: at if at >= 0 else len(token_ids) + at]
        num_prompt = len(output.prompt_token_ids) - output.num_forked_tokens
        prompt, before = output.prompt_token_ids[:num_prompt], output.prompt_token_ids[num_prompt:]
        submission = self._preparation.samples(prompt, params, output_token_ids=before + kept)
        self._engine.check_request(submission.requests[0])
        return dataclasses.replace(submission, prompt=self._text_of_fork(output, kept, params))

    def _text_of_fork(self, output: RequestOutput, kept: Sequence[int], params: SamplingParams) -> str | None:
        """The text from which a fork goes on; None if there is no tokenizer, or the prompt was given as ids."""
        if self._tokenizer is None or output.prompt is None:
            return None
        detokenizer = IncrementalDetokenizer(
            self._tokenizer, output.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        return output.prompt + detokenizer.push(kept) + detokenizer.finish()

    def prepare_beam_search(self, prompt: Prompt, params: BeamSearchParams) -> Submission:
        """Tokenises and validates a prompt for a beam search.

        Raises:
          TypeError, ValueError: as prepare, or beam_width exceeds the number of sequences that can run side by side.
        """
        submission = self._preparation.beam_search(prompt, params)
        self._engine.check_request(submission.requests[0], beam_width=params.beam_width)
        return submission

    def check_captures(self, submissions: Sequence[Submission]) -> None:
        """Refuses submissions that together may capture more than the host is to hold.

        Raises:
          ValueError: their captures exceed max_research_bytes.
        """
        self._engine.check_capture_bytes([request for entry in submissions for request in entry.requests])

    def submit(self, submission: Submission) -> GrowingAnswer:
        """Starts a prepared submission.

        Returns:
          Its answer, which grows with every step until it is finished.

        Raises:
          Whatever exception the submission's constraint raises when it starts; no request is left in the engine then.
        """
        answer = GrowingAnswer(
            submission,
            tokenizer=self._tokenizer,
            eos_token_ids=self._preparation.eos_token_ids,
            provenance=self._provenance,
            weights_version=self.weights_version,
        )
        requests, params = submission.requests, submission.params
        if params.max_tokens == 0 and params.prompt_logprobs is None and params.capture is None:
            answer.finish("length")
            return answer
        try:
            for index, request in enumerate(requests):
                self._places[request.request_id] = (answer, index)
                if submission.beam_search is not None:
                    self._engine.add_beam_search(request, submission.beam_search)
                else:
                    self._engine.add_request(request, prefix_source=answer.request_id if index else None)
        except BaseException:
            self.forget(answer)
            raise
        return answer

    def has_unfinished(self) -> bool:
        """Whether the engine still has requests to run."""
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
        """Ends an answer with finish reason "abort"; it keeps the tokens that it has."""
        self._end_requests(answer)
        answer.finish("abort")

    def forget(self, answer: GrowingAnswer) -> None:
        """Aborts an answer if it still grows, and frees what the controller and the engine keep for it."""
        self.abort(answer)
        for request in answer.submission.requests:
            self._places.pop(request.request_id, None)

    def _consume(self, answer: GrowingAnswer, index: int, event: TokenEvent) -> None:
        """Adds a token to its text in the answer."""
        if answer.error is not None or answer.completions[index].finish_reason is not None:
            return  # an earlier token of this step ended the text by a stop string, or made the answer fail
        try:
            answer.push(index, event)
        except INTERRUPTS:
            raise
        except BaseException as error:  # the tokenizer failed; a panic of one written in Rust is not an Exception
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
