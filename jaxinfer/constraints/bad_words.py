"""BadWords: the constraint that keeps certain words out of the output, whichever tokens would spell them.

Owns: finding the tokens that would complete a word at each step.
Does not know: tokenizers (it is given the bytes of each token), requests, jax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxinfer.constraints.constraint import ConstraintState, pack_ids


class BadWords:
    """The constraint that the output contains none of the given words, not even spread over several tokens.

    It forbids every token that would complete a word. Which tokens these are depends only on the tail of the output:
    its longest suffix that is a proper prefix of a word. With the word "hello" and an output that ends in "say hel" the
    tail is "hel", and tokens that begin with "lo" are forbidden. Shorter suffixes count too: with the words "aab" and
    "ab", the tail "aa" forbids tokens that begin with "b" because of either word. Tokens that contain a whole word are
    always forbidden. The mask of a tail is made when an output first ends in it, in a few milliseconds for 150,000
    tokens, and is then shared by all sequences.

    Tokens that add no bytes, such as the end token, can complete no word and are always allowed. A vocabulary without
    such a token may reach a state in which no token is allowed; allowed() is then all zeros.

    Args:
      words: the words, none empty.
      token_bytes: the bytes that each token adds to a text, by token id (vocabulary.token_bytes).
      vocab_size: tokens of the model. Ids that token_bytes lacks are allowed; ids from vocab_size on are not in the
        mask.

    Raises:
      ValueError: a word is empty.

    Example:
      >>> constraint = BadWords(["ab"], [b"a", b"b", b"cab", b""], 4)
      >>> state = constraint.start()
      >>> state.advance(0)
      >>> f"{state.allowed()[0]:04b}"  # neither 1 nor 2
      '1001'
    """

    def __init__(self, words: Sequence[str], token_bytes: Sequence[bytes], vocab_size: int) -> None:
        # A word with a lone surrogate is kept as it is: no token contains such bytes, so it forbids nothing.
        self._words = tuple(dict.fromkeys(word.encode(errors="surrogatepass") for word in words))
        if b"" in self._words:
            raise ValueError(f"bad_words must not contain an empty string, got {words!r}")
        self._vocab_size = vocab_size
        self._vocabulary = _Vocabulary(token_bytes[:vocab_size])
        self._beginnings = frozenset(word[:k] for word in self._words for k in range(1, len(word)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._within = [self._vocabulary.containing(word) for word in self._words]
        self._masks: dict[bytes, np.ndarray] = {}

    def start(self) -> ConstraintState:
        """Makes the state of an empty output."""
        return _BadWordsState(self)

    def allowed_behind(self, tail: bytes) -> np.ndarray:
        """Returns the mask of the tokens that complete no word after a tail.

        Args:
          tail: the longest suffix of the output that is a proper prefix of a word; b"" if there is none.

        Returns:
          uint32[W], shared and read-only.
        """
        if tail not in self._masks:
            self._masks[tail] = self._mask(tail)
        return self._masks[tail]

    def tail_behind(self, tail: bytes, token_id: int) -> bytes:
        """Returns the tail of the output after one more token."""
        text = tail + self._vocabulary.bytes_of(token_id)
        ends = (text[start:] for start in range(max(0, len(text) - self._longest), len(text)))
        return next((end for end in ends if end in self._beginnings), b"")

    def _mask(self, tail: bytes) -> np.ndarray:
        ends = [tail[start:] for start in range(len(tail))]
        rests = {
            word[len(end) :] for end in ends for word in self._words if len(word) > len(end) and word.startswith(end)
        }
        mask = pack_ids(np.arange(self._vocab_size), self._vocab_size)
        for completing in (*self._within, *map(self._vocabulary.starting_with, rests)):
            mask &= ~pack_ids(completing, self._vocab_size)
        mask.setflags(write=False)
        return mask


class _BadWordsState:
    is_complete = False

    def __init__(self, constraint: BadWords) -> None:
        self._constraint = constraint
        self._tail = b""

    def allowed(self) -> np.ndarray:
        return self._constraint.allowed_behind(self._tail)

    def advance(self, token_id: int) -> None:
        self._tail = self._constraint.tail_behind(self._tail, token_id)


class _Vocabulary:
    """The bytes of all tokens in one array, so that numpy can search all of them at once."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._tokens = token_bytes
        self._lens = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
        self._starts = np.cumsum(self._lens) - self._lens
        self._letters = np.frombuffer(b"".join(token_bytes), np.uint8)

    def bytes_of(self, token_id: int) -> bytes:
        return self._tokens[token_id] if token_id < len(self._tokens) else b""

    def starting_with(self, text: bytes) -> np.ndarray:
        """Ids of the tokens that begin with the text, int64[n]."""
        ids = np.flatnonzero(self._lens >= len(text))
        return ids[self._match(self._starts[ids], text)]

    def containing(self, text: bytes) -> np.ndarray:
        """Ids of the tokens that contain the text, int64[n]; an id comes as often as its token contains it."""
        places = np.arange(max(0, len(self._letters) - len(text) + 1))
        places = places[self._match(places, text)]
        ids = np.searchsorted(self._starts, places, side="right") - 1
        return ids[places + len(text) <= self._starts[ids] + self._lens[ids]]

    def _match(self, places: np.ndarray, text: bytes) -> np.ndarray:
        """Indices into places of those at which the text begins, int64[n]."""
        found = np.arange(len(places))
        for offset, letter in enumerate(text):
            found = found[self._letters[places[found] + offset] == letter]
        return found
