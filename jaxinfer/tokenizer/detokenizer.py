"""Incremental detokenisation: the text of an output that grows token by token.

Owns: which text is certain, the window of tokens that is decoded.
Does not know: tokenizer files, requests, stop strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from jaxinfer.tokenizer.fixed_texts import REPLACEMENT, FixedText, FixedTexts
from jaxinfer.tokenizer.tokenizer import Tokenizer

# A character has at most four bytes in UTF-8, so an incomplete one shows as at most three U+FFFD.
MAX_HELD = 3
# When the detokenisation window reaches MAX_WINDOW tokens, all but the newest KEPT_WINDOW are dropped from it. Before
# that, the last MATCHED_TAIL characters of its text must read the same without the dropped tokens. The kept tokens hold
# at least seven whole characters, even if each token is one byte and each character takes four: enough to compare.
MAX_WINDOW = 64
KEPT_WINDOW = 32
MATCHED_TAIL = 6


class IncrementalDetokenizer:
    """Decodes an output token by token.

    What push and finish return adds up to the text of prompt and output without the prompt's text at its beginning:

        decode(prompt + output)[len(decode(prompt)):]

    Text is returned as soon as it is certain, and never half a character. A character whose bytes are spread over
    several tokens decodes to up to three U+FFFD until it is complete, so up to three U+FFFD at the end of the text are
    held back. If there are more in a row, the older ones cannot be part of one incomplete character and are returned.

    In two cases the text differs from that formula:
    - A prompt ends in half a character. The character counts as part of the prompt, so the output begins after it.
    - A tokenizer with ByteFallback gets a malformed run of byte tokens. It would decode the whole run to U+FFFD, even
      characters that were returned before the malformed byte came. Returned text is never taken back: those characters
      stay, and only the bytes after them become U+FFFD (as sentencepiece decodes such a run).

    Cost: a token with a fixed text (see FixedTexts; nearly all tokens of ordinary text have one) that follows another
    such token is looked up, not decoded. Any other token costs one decode of a window: the tokens from that last one
    on, at most about MAX_WINDOW of them however long the text is. (The window grows further only inside a malformed run
    of byte tokens longer than the window, because its end then depends on its beginning.) Of the prompt, only such a
    window is decoded.

    Args:
      tokenizer: decodes. If it has an attribute fixed_texts that is not None, texts are looked up there first.
      prompt_token_ids: the prompt.
      skip_special_tokens: leave special tokens out of the text.

    Source: the prefix_offset/read_offset scheme of text-generation-inference
    (server/text_generation_server/models/model.py, Model.decode_token) and vLLM
    (transformers_utils/detokenizer_utils.py, detokenize_incrementally): decode a short window with and without the new
    tokens and return the difference. Deviations: the border between old and new text is a number of characters, not of
    tokens, so that text comes out even if every token ends inside a character, and U+FFFD that belong to the text are
    not held back for ever; the window moves only to a token with a fixed text, or after a check that its end does not
    depend on the tokens dropped; special tokens that are left out of the text never enter the window.

    Example:
      >>> from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
      >>> detokenizer = IncrementalDetokenizer(ByteTokenizer(), [104], skip_special_tokens=True)
      >>> [detokenizer.push([byte]) for byte in "aé".encode()], detokenizer.finish(), detokenizer.text
      (['a', '', 'é'], '', 'aé')
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._dropped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._fixed_texts: FixedTexts | None = getattr(tokenizer, "fixed_texts", None)
        self._parts: list[str] = []
        self._window: list[int] = []
        self._max_window = MAX_WINDOW
        # The first _num_settled tokens of the window decode to _given (returned already) + _held (held back). Tokens
        # after them are undecided.
        self._given = self._held = ""
        self._num_settled = 0
        # The last token and its text, if that is fixed. Then nothing is held or undecided, and no later text depends on
        # the tokens before it: the window, which is not kept meanwhile, begins anew at this token.
        self._last_fixed: tuple[int, FixedText] | None = None
        self._read_prompt(prompt_token_ids)

    @property
    def text(self) -> str:
        """All text that push and finish have returned so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds the next output tokens.

        Returns:
          The text that is certain now and was not returned before; "" while a character is incomplete.
        """
        return "".join([self.push_token(token_id) for token_id in token_ids])

    def push_token(self, token_id: int) -> str:
        """Adds one token; returns as push."""
        if token_id in self._dropped:
            return ""
        fixed = None if self._fixed_texts is None else self._fixed_texts[token_id]
        if fixed is None:
            new_text = self._read(token_id)
        else:
            new_text = self._read(token_id) if self._last_fixed is None else fixed.inside
            self._last_fixed = token_id, fixed
        self._parts.append(new_text)
        return new_text

    def finish(self) -> str:
        """Ends the output.

        Returns:
          The text that was held back, which is an incomplete character as U+FFFD; "" if there is none.
        """
        if self._last_fixed is not None:
            return ""
        new_text = self._restart() if self._num_settled < len(self._window) else ""
        new_text += self._held
        self._given, self._held = self._given + self._held, ""
        self._parts.append(new_text)
        return new_text

    def _read_prompt(self, token_ids: Sequence[int]) -> None:
        """Makes the window of the end of the prompt, as many tokens as the output's text can depend on."""
        newest_first = (i for i in reversed(token_ids) if i not in self._dropped)
        if self._fixed_texts is None:
            self._grow_window(newest_first)
            return
        newest: list[int] = []
        for token_id in newest_first:
            newest.append(token_id)
            if self._fixed_texts[token_id] is not None:
                break
        self._take_as_given(newest[::-1])
        fixed = self._fixed_texts[newest[0]] if len(newest) == 1 else None
        self._last_fixed = None if fixed is None else (newest[0], fixed)
        if len(newest) >= MAX_WINDOW:
            self._slide()

    def _grow_window(self, newest_first: Iterator[int]) -> None:
        """Takes ever more tokens of the prompt's end into the window until its text no longer depends on the oldest."""
        num_more = MAX_WINDOW
        while True:
            more = list(islice(newest_first, num_more))
            self._take_as_given(more[::-1] + self._window)
            if len(more) < num_more or self._slide():
                return
            num_more = len(self._window)

    def _take_as_given(self, window: list[int]) -> None:
        """Sets the window to tokens of the prompt, whose text is not part of the output."""
        self._window, self._num_settled = window, len(window)
        self._given = self._decode(window)

    def _read(self, token_id: int) -> str:
        """Adds a token to the window, decodes the window and returns the text that is new and certain."""
        if self._last_fixed is not None:
            first, fixed = self._last_fixed
            self._window, self._given, self._num_settled = [first], fixed.alone, 1
            self._max_window, self._last_fixed = MAX_WINDOW, None
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.startswith(self._given.rstrip(REPLACEMENT)):
            return self._advance(text)
        # Text that was returned decodes differently now. Either ByteFallback waits for the rest of a character, or its
        # run of byte tokens has become malformed, which is certain after more than MAX_HELD tokens.
        num_open = len(self._window) - self._num_settled
        if text.endswith(REPLACEMENT) and num_open <= MAX_HELD:
            return ""
        return self._restart()

    def _advance(self, text: str) -> str:
        """Returns the part of the window's text that is new and certain, and remembers it as returned."""
        end = max(self._certain_len(text), len(self._given))
        new_text = text[len(self._given) : end]
        self._given, self._held = text[:end], text[end:]
        self._num_settled = len(self._window)
        if len(self._window) >= self._max_window and len(self._held) <= MAX_HELD:
            self._slide()
        return new_text

    def _certain_len(self, text: str) -> int:
        """Length of the beginning of the window's text that no further token can change."""
        settled_len = len(text.rstrip(REPLACEMENT))
        if len(text) - settled_len <= MAX_HELD:
            return settled_len
        # While a character is incomplete, ByteFallback decodes even a whole U+FFFD of the text to one for each byte.
        shorter = (self._decode(self._window[:-i]) for i in range(1, MAX_HELD + 1))
        return max(settled_len, min(len(text) - MAX_HELD, *map(len, shorter)))

    def _restart(self) -> str:
        """Keeps the text that was returned, drops its tokens, and decodes the undecided tokens by themselves."""
        held = self._held
        del self._window[: self._num_settled]
        self._given = self._held = ""
        return held + self._advance(self._decode(self._window))

    def _slide(self) -> bool:
        """Drops the oldest tokens of the window if its end decodes the same without them; returns whether it did."""
        newest = len(self._window) - KEPT_WINDOW
        # Compared also without the last one to three tokens, to tell a malformed run from one that is only incomplete.
        ends = [len(self._window) - i for i in range(MAX_HELD + 1)]
        old = [self._decode(self._window[:end]) for end in ends]
        for start in range(newest, newest - MAX_HELD - 1, -1):  # of four neighbours one does not split a character
            new = [self._decode(self._window[start:end]) for end in ends]
            if _end_alike(old, new):
                del self._window[:start]
                self._given = new[0][: len(new[0]) - len(self._held)]
                self._num_settled = len(self._window)
                self._max_window = MAX_WINDOW
                return True
        self._max_window *= 2  # so that all further attempts together cost no more than decoding the tokens
        return False

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _end_alike(old: list[str], new: list[str]) -> bool:
    """Whether texts at the same index end in the same MATCHED_TAIL characters, and the first text of each list is
    longer than its last by equally many characters."""
    alike = all(len(b) > MATCHED_TAIL and b.endswith(a[-MATCHED_TAIL:]) for a, b in zip(old, new, strict=True))
    return alike and len(old[0]) - len(old[-1]) == len(new[0]) - len(new[-1])
