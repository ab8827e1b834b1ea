"""The answer to one prompt while it grows.

Owns: its texts, its prompt's log-probabilities, its times and what made it fail; the snapshot of all these.
Does not know: the engine, threads, where requests come from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from jaxinfer.engine.beam_search import Hypothesis
from jaxinfer.errors import RequestFailedError
from jaxinfer.outputs import Logprob, RequestMetrics, RequestOutput
from jaxinfer.records.record import Provenance
from jaxinfer.request import TokenEvent, TokenLogprobs
from jaxinfer.text.completion import GrowingCompletion, as_logprobs
from jaxinfer.text.preparation import Submission
from jaxinfer.tokenizer.tokenizer import Tokenizer

PromptLogprobs = tuple[dict[int, Logprob] | None, ...]


class GrowingAnswer:
    """The answer to one submission. One thread lets it grow while another one reads it, as with GrowingCompletion.

    Args:
      submission: what was asked.
      tokenizer: None works on ids alone.
      eos_token_ids: the end tokens of the checkpoint.
      provenance: for the records of outputs; None makes outputs without a record.
    """

    def __init__(
        self,
        submission: Submission,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        provenance: Provenance | None,
    ):
        self.submission = submission
        self.error: BaseException | None = None
        self._tokenizer = tokenizer
        self._provenance = provenance
        requests = submission.requests
        count = len(requests) if submission.beam_search is None else submission.beam_search.num_return_sequences
        self.completions = [
            GrowingCompletion(
                index,
                requests[min(index, len(requests) - 1)],
                submission.params,
                tokenizer=tokenizer,
                eos_token_ids=eos_token_ids,
            )
            for index in range(count)
        ]
        self._num_cached_tokens = 0
        self._found_in_prompt: tuple[TokenLogprobs, ...] | None = None
        self._prompt_logprobs: PromptLogprobs | None = None
        self._arrival_time = time.monotonic()
        self._first_token_time: float | None = None
        self._finished_time: float | None = None

    @property
    def request_id(self) -> str:
        """Of its first request."""
        return self.submission.requests[0].request_id

    @property
    def num_tokens(self) -> int:
        """Tokens of all its texts so far."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def is_finished(self) -> bool:
        """Whether all its texts have ended, or it has failed."""
        return self.error is not None or all(entry.finish_reason is not None for entry in self.completions)

    def push(self, index: int, event: TokenEvent) -> None:
        """Takes the next token of one of its texts, and what came with it."""
        self._first_token_time = self._first_token_time or time.monotonic()
        if index == 0:
            self._num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            self._found_in_prompt = event.prompt_logprobs
        if self.submission.params.max_tokens == 0:  # the engine samples one token at least
            self.finish("length")
            return
        self.completions[index].push(event)
        if self.is_finished:
            self._finished_time = time.monotonic()

    def end_search(self, hypotheses: Sequence[Hypothesis], *, num_cached_tokens: int) -> None:
        """Takes the texts that a beam search found, best first.

        They are fewer than asked for if the vocabulary has no more; none, if the model's numbers are not finite, ends
        the answer with "abort".
        """
        self._num_cached_tokens = num_cached_tokens
        self._first_token_time = self._finished_time = time.monotonic()
        if not hypotheses:
            self.finish("abort")
            return
        completions = self.completions[: len(hypotheses)]
        for completion, found in zip(completions, hypotheses, strict=True):
            completion.complete(found.token_ids, found.finish_reason, found.score)
        self.completions = completions

    def finish(self, reason: Literal["length", "abort"]) -> None:
        """Ends the texts that have not ended yet."""
        self._finished_time = self._finished_time or time.monotonic()
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.finish(reason)

    def output(self) -> RequestOutput:
        """A snapshot; its deltas are the text since the previous one.

        Raises:
          RequestFailedError: the answer failed, or its tokens cannot be turned into text.
        """
        if self.error is not None:
            raise RequestFailedError.caused_by(self.error)
        is_finished, submission = self.is_finished, self.submission  # read first, as GrowingCompletion says
        try:
            outputs = tuple(completion.output() for completion in self.completions)
            prompt_logprobs = self._read_prompt_logprobs()
        except Exception as error:
            self.error = error
            raise RequestFailedError.caused_by(error) from error
        return RequestOutput(
            request_id=self.request_id,
            prompt=submission.prompt,
            prompt_token_ids=submission.requests[0].prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=is_finished,
            num_cached_tokens=self._num_cached_tokens,
            metrics=RequestMetrics(
                arrival_time=self._arrival_time,
                first_token_time=self._first_token_time,
                finished_time=self._finished_time,
            ),
            sampling_params=submission.params if submission.beam_search is None else None,
            beam_search_params=submission.beam_search,
            provenance=self._provenance,
        )

    def _read_prompt_logprobs(self) -> PromptLogprobs | None:
        """Log-probabilities of the prompt's tokens, converted once."""
        if self._prompt_logprobs is None and self._found_in_prompt is not None:
            pairs = zip(self.submission.requests[0].prompt_token_ids[1:], self._found_in_prompt, strict=True)
            self._prompt_logprobs = (None, *(as_logprobs(*pair, self._tokenizer) for pair in pairs))
        return self._prompt_logprobs
