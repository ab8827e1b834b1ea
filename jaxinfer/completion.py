"""One text while its tokens arrive.

Owns: detokenisation, stop strings, the state from which a CompletionOutput is made.
Does not know: prompts, the engine, devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer.outputs import CompletionOutput, Logprob
from jaxinfer.request import FinishReason, Request, TokenEvent, TokenLogprobs
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.tokenizer import IncrementalDetokenizer, Tokenizer


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what may begin one.

    Args:
      stop_strings: none of them empty.
      include: leave the match in the text.
    """

    def __init__(self, stop_strings: Sequence[str], *, include: bool):
        self._stop_strings = tuple(stop_strings)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, suspended: bool = False) -> str:
        """Takes new text; returns what is certain not to belong to a stop string, up to the first match.

        Args:
          text: what is new.
          suspended: a stop string that ends in it does not count.
        """
        self._held += text
        stop_strings = () if suspended else self._stop_strings
        found = [(self._held.find(stop), stop) for stop in stop_strings if stop in self._held]
        if found:
            start, self.matched = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            released = self._held[: start + len(self.matched) * self._include]
            self._held = ""
            return released
        keep = max((self._overlap(stop) for stop in self._stop_strings), default=0)
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        return released

    def finish(self) -> str:
        """Returns what was held back: no stop string will come any more."""
        released, self._held = self._held, ""
        return released

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


class GrowingCompletion:
    """One text of one prompt.

    Args:
      index: which of the prompt's texts.
      request: what the engine was asked for.
      params: how its text ends and reads.
      tokenizer: None works on ids alone.
      eos_token_ids: the end tokens of the checkpoint.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        params: SamplingParams,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
    ):
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._matcher = StopMatcher(params.stop_strings, include=params.include_stop_str_in_output)
        self._logprobs: list[TokenLogprobs] = []
        self._text = ""
        self._num_reported = 0
        self._stop_reason: str | int | None = None
        self._score: float | None = None
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )

    def push(self, event: TokenEvent) -> None:
        """Takes its next token; it may end by that or by a stop string in its text."""
        if event.logprobs is not None:
            self._logprobs.append(event.logprobs)
        self._push(event.token_id)
        if self._matcher.matched is not None:
            self._stop_reason = self._matcher.matched
            self.finish("stop")
        elif event.finish_reason is not None:
            self.finish(event.finish_reason)

    def complete(self, token_ids: Sequence[int], reason: FinishReason, score: float) -> None:
        """Takes all its tokens at once, with beam search's score."""
        for token_id in token_ids:
            self._push(token_id)
        self._score = score
        self.finish(reason)

    def finish(self, reason: FinishReason) -> None:
        """Ends it."""
        if self._detokenizer is not None and self._matcher.matched is None:
            self._text += self._matcher.push(self._detokenizer.finish()) + self._matcher.finish()
        self.finish_reason = reason

    def output(self) -> CompletionOutput:
        """A snapshot; its delta is the text since the last one."""
        has_text, wants_logprobs = self._detokenizer is not None, self._params.logprobs is not None
        delta, self._num_reported = self._text[self._num_reported :], len(self._text)
        pairs = zip(self.token_ids, self._logprobs, strict=True) if wants_logprobs else ()
        return CompletionOutput(
            index=self._index,
            text=self._text if has_text else None,
            token_ids=tuple(self.token_ids),
            delta=delta if has_text else None,
            logprobs=tuple(as_logprobs(*pair, self._tokenizer) for pair in pairs) if wants_logprobs else None,
            cumulative_logprob=sum(entry.logprob for entry in self._logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            seed=self.request.seed,
            score=self._score,
        )

    def _push(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if token_id in self.request.stop_token_ids:  # ends the text and is no part of it
            self._stop_reason = None if token_id in self._eos_token_ids else token_id
        elif self._detokenizer is not None:
            too_early = len(self.token_ids) < self._params.min_tokens
            self._text += self._matcher.push(self._detokenizer.push([token_id]), suspended=too_early)


def as_logprobs(token_id: int, found: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """What was found at one position, as users see it: the token of that position first, then the most likely ones."""

    def entry(token_id: int, logprob: float, rank: int) -> Logprob:
        text = None if tokenizer is None else tokenizer.token_text(token_id)
        return Logprob(logprob=logprob, rank=rank, decoded_token=text)

    pairs = enumerate(zip(found.top_ids, found.top_logprobs, strict=True), start=1)
    top = {top_id: entry(top_id, logprob, rank) for rank, (top_id, logprob) in pairs}
    return {token_id: entry(token_id, found.logprob, found.rank), **top}
