"""What answers are made of: outputs and deltas, which are read in the same way.

Owns: the count of an answer's tokens, and those of them that a stream has not told yet.
Does not know: any interface.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from jaxinfer.outputs import CompletionDelta, CompletionOutput, Logprob, RequestDelta, RequestOutput
from jaxinfer.serve.replies.thoughts import ThoughtCount

Answered = RequestOutput | RequestDelta
"""An answer, whole or what is new of it: the same fields of both are read in the same way."""
Completed = CompletionOutput | CompletionDelta
"""A text of it, likewise."""


class TokenCount:
    """Counts the tokens of a request, whose answers may come piece by piece.

    Args:
      new_thoughts: makes what counts the thoughts of a reply; None counts none.
    """

    def __init__(self, new_thoughts: Callable[[], ThoughtCount] | None = None):
        self._newest: dict[int, Answered] = {}
        self._thoughts = None if new_thoughts is None else defaultdict[tuple[int, int], ThoughtCount](new_thoughts)
        self.num_new = 0
        """Tokens that were generated."""

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput], new_thoughts: Callable[[], ThoughtCount] | None = None) -> TokenCount:
        """The count of whole answers."""
        count = cls(new_thoughts)
        for number, output in enumerate(outputs):
            count.add(number, output)
        return count

    def add(self, number: int, answer: Answered) -> None:
        """Adds the answer to a submission, or what is new of it."""
        self._newest[number] = answer
        for completion in answer.outputs:
            self.num_new += len(completion.token_ids)
            if self._thoughts is not None:
                self._thoughts[number, completion.index].add(completion.token_ids)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompts."""
        return sum(len(answer.prompt_token_ids) for answer in self._newest.values())

    @property
    def num_thoughts(self) -> int | None:
        """Tokens of thoughts among the new ones; None if they are not counted."""
        return None if self._thoughts is None else sum(count.number for count in self._thoughts.values())

    @property
    def num_cached(self) -> int:
        """Tokens of the prompts that came from the prefix cache."""
        return sum(answer.num_cached_tokens for answer in self._newest.values())


class Untold:
    """The tokens of a text of which no chunk has spoken yet: a parser may hold their text back."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self.has_told = False
        """Whether some were taken."""

    def add(self, delta: CompletionDelta) -> None:
        """Adds the tokens of a delta."""
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs or ()

    def take(self, delta: CompletionDelta) -> CompletionDelta | None:
        """A delta with all these tokens in place of its own; None if there are none."""
        if not self._token_ids:
            return None
        found = None if delta.logprobs is None else self._logprobs
        taken = delta._replace(token_ids=self._token_ids, logprobs=found)
        self._token_ids, self._logprobs, self.has_told = [], [], True
        return taken
