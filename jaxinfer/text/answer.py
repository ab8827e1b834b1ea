"""GrowingAnswer: the answer to one prompt while its tokens arrive.

Owns: the answer's texts (one per sample), the log-probabilities of its prompt, its times and the error that made it
fail; the RequestOutput that is a snapshot of all these, and the RequestDelta that says what is new.
Does not know: the engine, how threads are started, where requests come from.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

from jaxinfer.captured_values import joined_along_tokens
from jaxinfer.engine.beam_search import Hypothesis
from jaxinfer.errors import RequestFailedError
from jaxinfer.outputs import CompletionOutput, Logprob, RequestDelta, RequestMetrics, RequestOutput
from jaxinfer.records.provenance import Provenance
from jaxinfer.request import TokenEvent, TokenLogprobs
from jaxinfer.text.completion import GrowingCompletion, as_logprobs
from jaxinfer.text.preparation import Submission
from jaxinfer.tokenizer.tokenizer import Tokenizer

PromptLogprobs = tuple[dict[int, Logprob] | None, ...]


class GrowingAnswer:
    """The answer to one submission while it grows.

    One thread adds tokens (push, end_search, finish) while another one looks at them (output, delta), without a lock;
    GrowingCompletion explains the order of reads and writes that makes this safe.

    Args:
      submission: the prompt and its requests.
      tokenizer: None makes outputs with token ids only.
      eos_token_ids: the end tokens of the checkpoint.
      provenance: put into every output, for its record; None makes outputs without a record.
      weights_version: how often the model's weights had been replaced when it began.
    """

    def __init__(
        self,
        submission: Submission,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        provenance: Provenance | None,
        weights_version: int = 0,
    ):
        self.submission = submission
        self.error: BaseException | None = None
        self._tokenizer = tokenizer
        self._provenance = provenance
        self._weights_version = weights_version
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
        self._metrics = RequestMetrics(arrival_time=time.monotonic())

    @property
    def request_id(self) -> str:
        """The id of its first request, which names the whole answer."""
        return self.submission.requests[0].request_id

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, summed over its texts."""
        num = 0
        for completion in self.completions:  # asked for every token: faster than a generator
            num += len(completion.token_ids)
        return num

    @property
    def is_finished(self) -> bool:
        """Whether all its texts have ended, or it has failed."""
        for completion in self.completions:
            if completion.finish_reason is None:
                return self.error is not None
        return True

    def push(self, index: int, event: TokenEvent) -> None:
        """Adds the next token to the text of that index, and takes the other results that the event carries."""
        if self._metrics.first_token_time is None:
            self._metrics = dataclasses.replace(self._metrics, first_token_time=time.monotonic())
        if index == 0:
            self._num_cached_tokens = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            self._found_in_prompt = event.prompt_logprobs
        if event.captured is not None:
            self.completions[index].captured = event.captured
        if self.submission.params.max_tokens == 0:  # the engine samples at least one token, which is not part of it
            self.finish("length")
            return
        completion = self.completions[index]
        completion.push(event)
        if completion.finish_reason is not None and self.is_finished:
            self._metrics = dataclasses.replace(self._metrics, finished_time=time.monotonic())

    def end_search(self, hypotheses: Sequence[Hypothesis], *, num_cached_tokens: int) -> None:
        """Ends the answer with the texts that a beam search found.

        Args:
          hypotheses: the texts, best first. They are fewer than num_return_sequences if a tiny vocabulary has no more.
            An empty sequence means that the model's logits were not finite; the answer then ends with "abort".
          num_cached_tokens: prompt tokens that came from the prefix cache.
        """
        self._num_cached_tokens = num_cached_tokens
        now = time.monotonic()
        self._metrics = dataclasses.replace(self._metrics, first_token_time=now, finished_time=now)
        if not hypotheses:
            self.finish("abort")
            return
        completions = self.completions[: len(hypotheses)]
        for completion, found in zip(completions, hypotheses, strict=True):
            completion.complete(found.token_ids, found.finish_reason, found.score)
        self.completions = completions

    def finish(self, reason: Literal["length", "abort"]) -> None:
        """Ends all texts that have not ended yet, with this reason."""
        if self._metrics.finished_time is None:
            self._metrics = dataclasses.replace(self._metrics, finished_time=time.monotonic())
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.finish(reason)

    def delta(self) -> RequestDelta:
        """What is new since the last delta or output; captures are not part of it.

        Raises:
          RequestFailedError: as output.
        """
        if self.error is not None:
            raise RequestFailedError.caused_by(self.error)
        # is_finished is read before the tokens: if it is True, all tokens are there (see GrowingCompletion).
        is_finished, submission = self.is_finished, self.submission
        try:
            deltas = [delta for completion in self.completions if (delta := completion.delta()) is not None]
            found = self._read_prompt_logprobs()
        except Exception as error:
            raise self._failed(error) from error
        known = submission.requests[0].known_token_ids
        return RequestDelta(submission.prompt, known, found, self._num_cached_tokens, deltas, is_finished)

    def output(self) -> RequestOutput:
        """Takes a snapshot; the deltas in it hold the text that is new since the last delta or output.

        Raises:
          RequestFailedError: the answer failed, or its tokens cannot be turned into text.
        """
        if self.error is not None:
            raise RequestFailedError.caused_by(self.error)
        is_finished, submission = self.is_finished, self.submission  # read first, as in delta
        try:
            outputs = self._with_captures_of_prompt([completion.output() for completion in self.completions])
            prompt_logprobs = self._read_prompt_logprobs()
        except Exception as error:
            raise self._failed(error) from error
        return RequestOutput(
            request_id=self.request_id,
            prompt=submission.prompt,
            prompt_token_ids=submission.requests[0].known_token_ids,
            num_forked_tokens=len(submission.requests[0].output_token_ids),
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=is_finished,
            num_cached_tokens=self._num_cached_tokens,
            metrics=self._metrics,
            sampling_params=submission.params if submission.beam_search is None else None,
            beam_search_params=submission.beam_search,
            provenance=self._provenance,
            weights_version=self._weights_version,
        )

    def _failed(self, error: Exception) -> RequestFailedError:
        """What to raise for an error by which the answer fails."""
        self.error = error
        return RequestFailedError.caused_by(error)

    def _with_captures_of_prompt(self, outputs: Sequence[CompletionOutput]) -> tuple[CompletionOutput, ...]:
        """The texts, with the prompt's captures, which the first one alone has, put in front of those of the others."""
        request = self.submission.requests[0]
        if request.capture is None:
            return tuple(outputs)
        if outputs[0].captures is None:  # the prompt's are not there yet
            return tuple(dataclasses.replace(output, captures=None) for output in outputs)
        num_shared = len(request.capture.span.within(0, len(request.known_token_ids)))
        of_prompt = {name: values[:num_shared] for name, values in outputs[0].captures.items()}

        def completed(output: CompletionOutput) -> CompletionOutput:
            if output.finish_reason is None:
                return output
            own = output.captures or {name: values[:0] for name, values in of_prompt.items()}
            joined = {name: joined_along_tokens(of_prompt[name], values) for name, values in own.items()}
            return dataclasses.replace(output, captures=joined)

        return (outputs[0], *map(completed, outputs[1:]))

    def _read_prompt_logprobs(self) -> PromptLogprobs | None:
        """Log-probabilities of the prompt's tokens, converted to Logprob objects at the first call."""
        if self._prompt_logprobs is None and self._found_in_prompt is not None:
            pairs = zip(self.submission.requests[0].known_token_ids[1:], self._found_in_prompt, strict=True)
            self._prompt_logprobs = (None, *(as_logprobs(*pair, self._tokenizer) for pair in pairs))
        return self._prompt_logprobs
