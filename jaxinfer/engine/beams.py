"""Runs a beam search as sequences of the scheduler.

Owns: which sequence holds which live beam.
Does not know: how beams are chosen, devices. Never imports jax.

Every live beam is a host-fed sequence, which waits after each token until all beams have been read. BeamGroup then
chooses the new beams. The first one that continues an old beam takes over its sequence; further ones are forks that
share its pages; an old beam that nothing continues ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxinfer.engine.beam_search import BeamCandidates, BeamGroup, BeamStep, Hypothesis
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.request import Request, TokenLogprobs
from jaxinfer.sampling_params import BeamSearchParams


class BeamSearch:
    """The sequences of one search.

    Args:
      request: gives the prompt, the length and the end tokens.
      params: the search's other settings.
      scheduler: runs the sequences.

    Raises:
      ValueError: the request could never run.
    """

    def __init__(self, request: Request, params: BeamSearchParams, scheduler: Scheduler):
        self._scheduler = scheduler
        self._num_returned = params.num_return_sequences
        self._group = BeamGroup(
            beam_width=params.beam_width,
            max_tokens=scheduler.limits.max_total_len(request) - len(request.prompt_token_ids),
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            stop_token_ids=request.stop_token_ids,
        )
        self._live = [scheduler.add(request, num_top=self._group.num_candidates, is_host_fed=True)]
        self._candidates: dict[SequenceState, BeamCandidates] = {}
        self.num_cached_tokens = 0

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The texts to return, best first."""
        return self._group.hypotheses(self._num_returned)

    def read(self, sequence: SequenceState, found: TokenLogprobs) -> bool:
        """Takes the most likely tokens after a live beam; the last beam of a step makes the search choose.

        Args:
          sequence: the beam's sequence, which pauses until the choice is made.
          found: its most likely next tokens.

        Returns:
          Whether the search has ended.
        """
        self._scheduler.park(sequence)
        self.num_cached_tokens = sequence.num_cached_tokens or 0
        # Tokens of log-probability -inf are padding, or come from a diverged model.
        pairs = zip(found.top_ids, found.top_logprobs, strict=True)
        possible = {token_id: logprob for token_id, logprob in pairs if logprob > -math.inf}
        self._candidates[sequence] = BeamCandidates(token_ids=list(possible), logprobs=list(possible.values()))
        if len(self._candidates) < len(self._live):
            return False
        steps = self._group.advance([self._candidates.pop(beam) for beam in self._live])
        self._live = self._heirs(steps)
        return not steps

    def abort(self) -> None:
        """Ends all its sequences."""
        for sequence in self._live:
            self._scheduler.finish(sequence, "abort")

    def _heirs(self, steps: Sequence[BeamStep]) -> list[SequenceState]:
        first: dict[int, int] = {}
        for number, step in enumerate(steps):
            first.setdefault(step.parent, number)
        heirs = [
            beam if first[step.parent] == number else self._scheduler.fork(beam, step.token_id)
            for number, step in enumerate(steps)
            for beam in [self._live[step.parent]]
        ]
        for parent, number in first.items():  # after the forks, which copy the beam without its new token
            self._scheduler.extend(self._live[parent], steps[number].token_id)
        for parent, beam in enumerate(self._live):
            if parent not in first:
                self._scheduler.finish(beam, "abort")
        return heirs
