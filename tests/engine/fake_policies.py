"""A drafter that knows what follows the fake wrapper's texts, a constraint that every token changes, and one that
raises."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from fake_wrapper import VOCAB_SIZE, next_token, seen

from jaxinfer.config.attention_span import WHOLE_TEXT, AttentionSpan
from jaxinfer.constraints.constraint import pack_ids


def right(position):
    return False


def wrong(position):
    return True


def partly(position):
    return position % 7 in (2, 3)


class Scripted:
    """Proposes what really follows, save at the positions that `wrong` names."""

    def __init__(self, wrong: Callable[[int], bool], num_tokens=4):
        self._wrong, self._num_tokens, self.span = wrong, num_tokens, AttentionSpan(1)
        self.model_span = WHOLE_TEXT
        """What the fake model sees; make_engine sets it."""

    def plan(self, sequence, most):
        return self._text(sequence, min(most, self._num_tokens))

    def complete(self, schedule):
        return schedule

    def _text(self, sequence, count):
        text, seed = list(sequence.token_ids), sequence.request.seed if sequence.request.top_k else 0
        for _ in range(count):
            text.append((next_token(seen(text, self.model_span), seed) + self._wrong(len(text))) % VOCAB_SIZE)
        return text[len(sequence.token_ids) :]


@dataclass(frozen=True)
class Residues:
    """Allows the tokens that have the residue of the sum of all before; complete after so many."""

    length: int = 1000

    def start(self):
        return ResidueState(self.length)


class ResidueState:
    def __init__(self, length):
        self._left, self._sum = length, 0

    is_complete = property(lambda self: self._left == 0)

    def allowed(self):
        return pack_ids(range(self._sum % 5, VOCAB_SIZE, 5), VOCAB_SIZE)

    def advance(self, token_id):
        self._sum, self._left = self._sum + token_id, self._left - 1


class Panic(BaseException):
    """As libraries written in Rust raise."""


@dataclass
class Raising:
    """A constraint that allows everything until one of its methods was called so often; then that raises.

    The calls of start are counted for all sequences together, those of other methods for each.
    """

    method: str
    error: BaseException
    after: int = 2
    is_complete: ClassVar[bool] = False

    def start(self):
        self._call("start")
        return replace(self)

    def allowed(self):
        self._call("allowed")
        return pack_ids(range(VOCAB_SIZE), VOCAB_SIZE)

    def advance(self, token_id):
        self._call("advance")

    def _call(self, method):
        self.after -= method == self.method
        if self.after < 0:
            raise self.error
