"""The decisions of a beam search: which beams continue, which finished texts are kept, and when the search ends.

Owns: the live beams and the finished hypotheses of one prompt, as token ids and sums of log-probabilities.
Does not know: the engine, slots, pages, text. Never imports jax.

Source: Hugging Face transformers 5, generation/utils.py, `_beam_search` without sampling and logits processors for a
batch of one. Deliberate deviations:

- Sums are float64, not float32.
- Ties go to the earlier beam, then to the lower token id (torch.topk leaves them open); among finished texts of equal
  score the older one stays first.
- A vocabulary too small for beam_width gives fewer beams, not an error.
- A finished text may have any score (transformers marks an empty place by a score of -1e9).
- A beam_width of 1 is a beam search too, where transformers turns to greedy search: the two differ only for
  early_stopping="never" with a length_penalty above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxinfer.sampling_params import EarlyStopping


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamCandidates:
    """The most likely next tokens of one live beam.

    Args:
      token_ids: distinct, at least BeamGroup.num_candidates of them or the whole vocabulary.
      logprobs: raw log-probabilities (natural log) of token_ids, finite.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamStep:
    """How a live beam was made from one of the beams before.

    Args:
      parent: index of that beam among the live beams before this step.
      token_id: the token added to it.
    """

    parent: int
    token_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Hypothesis:
    """A finished text.

    Args:
      token_ids: the tokens generated, the end token included.
      score: log-probability / length ** length_penalty.
      finish_reason: "stop" after an end token, "length" at max_tokens.
    """

    token_ids: tuple[int, ...]
    score: float
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Beam:
    token_ids: tuple[int, ...]
    logprob: float


class _Continuation(NamedTuple):
    """A live beam with one more token; the smaller tuple is the better choice."""

    cost: float
    """Minus the log-probability of all generated tokens, the new one included."""
    parent: int
    token_id: int


class BeamGroup:
    """The beams of one prompt: it chooses among tokens whose log-probabilities the caller computes.

    Args:
      beam_width: how many live beams, and how many finished hypotheses, there are at most.
      max_tokens: new tokens at most, >= 1.
      length_penalty: exponent of the length in a score.
      early_stopping: as in BeamSearchParams.
      stop_token_ids: ids that end a text.

    Example:
      >>> group = BeamGroup(beam_width=2, max_tokens=2)
      >>> steps = group.advance([BeamCandidates(token_ids=[7, 3, 5], logprobs=[-0.5, -1.0, -3.0])])
      >>> [(step.parent, step.token_id) for step in steps]
      [(0, 7), (0, 3)]
      >>> likely = BeamCandidates(token_ids=[4, 9, 1], logprobs=[-0.25, -2.0, -2.5])
      >>> group.advance([likely, likely])
      ()
      >>> [(found.token_ids, found.score) for found in group.hypotheses(2)]
      [((7, 4), -0.375), ((3, 4), -0.625)]
    """

    def __init__(
        self,
        *,
        beam_width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop_token_ids: frozenset[int] = frozenset(),
    ):
        self._beam_width = beam_width
        self._max_tokens = max_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._stop_token_ids = stop_token_ids
        self._length = 0
        self._live = [_Beam(token_ids=(), logprob=0.0)]
        self._finished: list[Hypothesis] = []  # best first

    @property
    def num_candidates(self) -> int:
        """How many of each beam's most likely tokens suffice for the same choice as from the whole vocabulary.

        At most beam_width tokens of one beam are taken: its best ones, or the best of those that do not end the text.
        In the worst case all end tokens rank before the latter, hence beam_width + end tokens. transformers looks at
        (1 + end tokens) * beam_width tokens of all beams together, which gives the same choice.
        """
        return self._beam_width + len(self._stop_token_ids)

    def advance(self, candidates: Sequence[BeamCandidates]) -> tuple[BeamStep, ...]:
        """Chooses the next live beams among the candidates of the present ones.

        Args:
          candidates: one entry for each live beam, in the order that the last call returned; the first call takes one
            entry, for the prompt.

        Returns:
          The new live beams, best first; empty when the search has ended.

        Raises:
          ValueError: the number of candidates is not that of the live beams.
        """
        if len(candidates) != len(self._live):
            raise ValueError(f"advance takes candidates of {len(self._live)} live beams, got {len(candidates)}")
        ranked = self._rank(candidates)
        self._length += 1
        self._finish([entry for entry in ranked[: self._beam_width] if self._ends(entry)])
        going_on = [entry for entry in ranked if not self._ends(entry)][: self._beam_width]
        if going_on and not self._can_improve(-going_on[0].cost):
            going_on = []
        self._live = [_Beam(token_ids=self._token_ids(entry), logprob=-entry.cost) for entry in going_on]
        return tuple(BeamStep(parent=entry.parent, token_id=entry.token_id) for entry in going_on)

    def hypotheses(self, count: int) -> tuple[Hypothesis, ...]:
        """The best finished texts, best first, at most count."""
        return tuple(self._finished[:count])

    def _rank(self, candidates: Sequence[BeamCandidates]) -> list[_Continuation]:
        return sorted(
            _Continuation(-(beam.logprob + logprob), parent, token_id)
            for parent, (beam, entry) in enumerate(zip(self._live, candidates, strict=True))
            for token_id, logprob in zip(entry.token_ids, entry.logprobs, strict=True)
        )

    def _ends(self, entry: _Continuation) -> bool:
        return self._length == self._max_tokens or entry.token_id in self._stop_token_ids

    def _token_ids(self, entry: _Continuation) -> tuple[int, ...]:
        return (*self._live[entry.parent].token_ids, entry.token_id)

    def _finish(self, entries: Sequence[_Continuation]) -> None:
        self._finished += [
            Hypothesis(
                token_ids=self._token_ids(entry),
                score=self._score(-entry.cost, self._length),
                finish_reason="stop" if entry.token_id in self._stop_token_ids else "length",
            )
            for entry in entries
        ]
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: among equals the older stays first
        del self._finished[self._beam_width :]

    def _can_improve(self, best_logprob: float) -> bool:
        """Whether a live beam may still become one of the beam_width best texts, estimated as early_stopping says."""
        if len(self._finished) < self._beam_width:
            return True
        if self._early_stopping is True:
            return False
        goes_far = self._early_stopping == "never" and self._length_penalty > 0
        length = self._max_tokens if goes_far else self._length
        return self._score(best_logprob, length) > self._finished[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self._length_penalty
