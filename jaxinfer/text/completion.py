"""GrowingCompletion: one generated text while its tokens arrive.

Owns: turning the tokens into text piece by piece, looking for stop strings, the state from which CompletionDelta and
CompletionOutput are made.
Does not know: how prompts are prepared, the engine, devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from jaxinfer.captured_values import CapturedValues
from jaxinfer.outputs import CompletionDelta, CompletionOutput, Logprob
from jaxinfer.request import FinishReason, Request, TokenEvent, TokenLogprobs
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back an end that may be the beginning of one.

    Args:
      stop_strings: the strings, none of them empty.
      include: whether the stop string itself is part of the text.

    Example:
      >>> matcher = StopMatcher(["END"], include=False)
      >>> matcher.push("The E"), matcher.push("ast"), matcher.push(" END."), matcher.matched
      ('The ', 'East', ' ', 'END')
    """

    def __init__(self, stop_strings: Sequence[str], *, include: bool):
        self._stop_strings = tuple(stop_strings)
        self._first_characters = frozenset(stop[0] for stop in stop_strings)
        self._include = include
        self._held = ""
        self._num_suspended = 0  # how much of the held text came while suspended
        self.matched: str | None = None

    def push(self, text: str, *, suspended: bool = False) -> str:
        """Takes new text; returns as much of the text not yet returned as is certain.

        After a match, that is the text up to the stop string, or through it with include=True, and `matched` is the
        string. Without a match, it is everything but an end that may begin a stop string.

        Args:
          text: the new text.
          suspended: min_tokens is not reached, so no stop string may end in this text. One may begin in it.
        """
        if not self._held and self._first_characters.isdisjoint(text):
            return text  # the common case: no stop string begins here
        self._held += text
        if suspended:
            self._num_suspended = len(self._held)
        found = [(start, stop) for stop in self._stop_strings if (start := self._find(stop)) >= 0]
        if found:
            start, self.matched = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            released = self._held[: start + len(self.matched) * self._include]
            self._held = ""
            return released
        keep = max((self._overlap(stop) for stop in self._stop_strings), default=0)
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        self._num_suspended = max(0, self._num_suspended - len(released))
        return released

    def finish(self) -> str:
        """Returns the text that was held back; called at the end, when it cannot become a stop string any more."""
        released, self._held = self._held, ""
        return released

    def _find(self, stop: str) -> int:
        """Where the stop string's first occurrence begins that ends after the suspended text; -1 if there is none."""
        return self._held.find(stop, max(0, self._num_suspended - len(stop) + 1))

    def _overlap(self, stop: str) -> int:
        """Length of the longest suffix of the held text that is a proper prefix of the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


class GrowingText:
    """The text of one completion, built token by token.

    Args:
      tokenizer: decodes the tokens.
      prompt_token_ids: the prompt, on which the text of the first tokens may depend (a character may span both).
      params: uses stop, include_stop_str_in_output, min_tokens and skip_special_tokens.
      stop_token_ids: ids that end the text and are left out of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        stop_token_ids: frozenset[int],
    ):
        self._min_tokens = params.min_tokens
        self._stop_token_ids = stop_token_ids
        self._matcher = StopMatcher(params.stop_strings, include=params.include_stop_str_in_output)
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self.pieces: list[str] = []
        """The text that each token made certain, one entry per token ("" if none); finish adds one entry more."""
        self.num_tokens = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    def push(self, token_id: int) -> None:
        """Takes the next token."""
        self.num_tokens += 1
        piece = ""
        if token_id not in self._stop_token_ids:
            too_early = self.num_tokens < self._min_tokens
            piece = self._matcher.push(self._detokenizer.push_token(token_id), suspended=too_early)
        self.pieces.append(piece)

    def finish(self) -> None:
        """Ends the text: what was held back becomes one more piece. A second call changes nothing."""
        if len(self.pieces) == self.num_tokens:
            rest = "" if self.matched else self._matcher.push(self._detokenizer.finish()) + self._matcher.finish()
            self.pieces.append(rest)


class GrowingCompletion:
    """One generated text of one prompt, written by one thread and read by another without a lock.

    The writer calls push, complete and finish, the reader calls delta and output. The lists are only appended to, and
    always in this order: a token's log-probabilities, its text, its id, and after the last token finish_reason. The
    reader reads in the opposite order: if it sees a token's id, the text and log-probabilities of that token are there
    already.

    Each token is turned into text once: by the reader when it looks at it, or by the writer if the text must be
    searched for stop strings. Only the reader makes Logprob objects.

    Args:
      index: which of the prompt's samples this is, from 0.
      request: the engine's request for it.
      params: uses ignore_eos, logprobs and the fields that GrowingText uses.
      tokenizer: None makes outputs with token ids only.
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
        self.captured: CapturedValues | None = None
        """What the engine has captured; set before the first token is added."""
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._found: list[TokenLogprobs] = []
        self._stop_reason: str | int | None = None
        self._score: float | None = None
        # Only the reader uses these; they say what it has seen.
        self._num_seen = 0
        self._num_pieces = 0
        self._seen_reason: FinishReason | None = None
        self._text = ""
        self._num_in_text = 0  # pieces that _text has
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0

    def push(self, event: TokenEvent) -> None:
        """Adds the next token. The completion ends if the engine says so or if a stop string is found."""
        if event.logprobs is not None:
            self._found.append(event.logprobs)
        if self._params.stop and self._growing_text is not None:
            self._growing_text.push(event.token_id)
            self._stop_reason = self._growing_text.matched
        self.token_ids.append(event.token_id)
        if self._stop_reason is not None:
            self.finish("stop")
        elif event.finish_reason is not None:
            self.finish(event.finish_reason)

    def complete(self, token_ids: Sequence[int], reason: FinishReason, score: float) -> None:
        """Sets all tokens at once and ends the completion, with the score of beam search."""
        self.token_ids.extend(token_ids)
        self._score = score
        self.finish(reason)

    def finish(self, reason: FinishReason) -> None:
        """Ends the completion. If it ends with one of the caller's stop_token_ids, that becomes its stop_reason."""
        last = self.token_ids[-1] if self.token_ids else None
        if last in self.request.stop_token_ids and last not in self._eos_token_ids and self._stop_reason is None:
            self._stop_reason = last
        self.finish_reason = reason

    def delta(self) -> CompletionDelta | None:
        """What is new since the last delta or output; None if nothing is."""
        reason = self.finish_reason  # read first: if it is set, all tokens are there
        start, end = self._num_seen, len(self.token_ids)
        if start == end and reason == self._seen_reason:
            return None
        text = self._read_text(end, has_ended=reason is not None)
        logprobs = None if self._params.logprobs is None else self._read_logprobs(start, end)
        self._num_seen, self._seen_reason = end, reason
        stop_reason = None if reason is None else self._stop_reason
        return CompletionDelta(self._index, text, self.token_ids[start:end], logprobs, reason, stop_reason)

    def output(self) -> CompletionOutput:
        """Takes a snapshot; its delta is the text that is new since the last delta or output."""
        delta, reason, num_tokens = self.delta(), self._seen_reason, self._num_seen
        text = None
        if self._growing_text is not None:
            self._text += "".join(self._growing_text.pieces[self._num_in_text : self._num_pieces])
            self._num_in_text, text = self._num_pieces, self._text
        wants_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self._index,
            text=text,
            token_ids=tuple(self.token_ids)[:num_tokens],  # copied once unless the writer has added one meanwhile
            delta=None if text is None else (delta.text if delta is not None else ""),
            logprobs=tuple(self._logprobs) if wants_logprobs else None,
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            finish_reason=reason,
            stop_reason=None if reason is None else self._stop_reason,
            seed=self.request.seed,
            score=self._score,
            captures=None if reason is None else self._captures,
        )

    @cached_property
    def _captures(self) -> dict[str, np.ndarray] | None:
        """The captured values of the finished text; its last token was sampled and never went through the model."""
        if self.captured is None:
            return None
        return self.captured.arrays(len(self.request.known_token_ids) + max(len(self.token_ids), 1) - 1)

    @cached_property
    def _growing_text(self) -> GrowingText | None:
        """Created at the first use, by the one thread that turns this completion's tokens into text."""
        if self._tokenizer is None:
            return None
        request = self.request
        return GrowingText(
            self._tokenizer, request.known_token_ids, self._params, stop_token_ids=request.stop_token_ids
        )

    def _read_text(self, num_tokens: int, *, has_ended: bool) -> str | None:
        """Turns the first num_tokens tokens into text; returns what is new, None without a tokenizer."""
        text = self._growing_text
        if text is None:
            return None
        for token_id in self.token_ids[text.num_tokens : num_tokens]:
            text.push(token_id)
        if has_ended:
            text.finish()
        start, self._num_pieces = self._num_pieces, len(text.pieces) if has_ended else num_tokens
        return "".join(text.pieces[start : self._num_pieces])

    def _read_logprobs(self, start: int, end: int) -> list[dict[int, Logprob]]:
        """Log-probabilities of the tokens from start to end."""
        pairs = zip(self.token_ids[start:end], self._found[start:end], strict=True)
        new = [as_logprobs(*pair, self._tokenizer) for pair in pairs]
        self._logprobs += new
        for found in self._found[start:end]:
            self._cumulative_logprob += found.logprob
        return new


def as_logprobs(token_id: int, found: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Makes the Logprob objects of one position: the token of that position first, then the most likely tokens."""

    def entry(token_id: int, logprob: float, rank: int) -> Logprob:
        text = None if tokenizer is None else tokenizer.token_text(token_id)
        return Logprob(logprob=logprob, rank=rank, decoded_token=text)

    pairs = enumerate(zip(found.top_ids, found.top_logprobs, strict=True), start=1)
    top = {top_id: entry(top_id, logprob, rank) for rank, (top_id, logprob) in pairs}
    return {token_id: entry(token_id, found.logprob, found.rank), **top}
