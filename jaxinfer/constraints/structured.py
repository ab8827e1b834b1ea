"""Structured output: turns a JSON schema, regex, choice or grammar into a constraint on the tokens, with llguidance.

Owns: the way from a StructuredOutput to a grammar in llguidance's syntax and from there to a TokenConstraint; the
limits on the time and memory that a grammar may take. Only this module and the trial program import llguidance.
Does not know: requests, the engine, jax.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.constraints.constraint import ConstraintError, ConstraintState, TokenConstraint, pack_ids, packed_len
from jaxinfer.constraints.structured_output import StructuredOutput
from jaxinfer.sandbox import confined
from jaxinfer.tokenizer.tokenizer import Tokenizer
from jaxinfer.tokenizer.vocabulary import token_bytes

logger = logging.getLogger("jaxinfer")

MAX_GRAMMAR_BYTES = 256 << 10
MAX_LEXER_STATES = 50_000
"""Limit of the states that llguidance makes while a grammar is followed, one or two kilobytes each. llguidance's own
limit is five times as many."""
MAX_MESSAGE_LEN = 500
NUM_KEPT = 64
"""How many compiled grammars stay cached; an application usually asks for the same few again and again."""
TRIAL_SECONDS = 20.0
"""Wall-clock limit of a trial. It exceeds the one second of processor time in TRIAL_LIMITS for the sake of machines so
busy that the trial has to wait for the processor."""
TRIAL = Path(__file__).with_name("grammar_trial.py")
TRIAL_LIMITS = {"RLIMIT_CPU": 1, "RLIMIT_AS": 1 << 30, "RLIMIT_STACK": 2 << 20}
"""Seconds of processor time, bytes of address space, bytes of stack. The stack is a quarter of a thread's usual 8 MiB,
so that a grammar that passes the trial is safe in the thread that compiles and follows it later."""
MARKER = b"\xff"  # llguidance takes tokens that begin with this byte, which UTF-8 never contains, for special tokens
WHITESPACE = r"\n? {0,12}"
"""The whitespace allowed between the tokens of JSON, unless the schema's own x-guidance says otherwise. It is limited
because a weak model might otherwise generate nothing but whitespace."""
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Makes llguidance allow every tokenization of text that must come. By default its mask allows only the one that the
tokenizer would choose."""


class GrammarCompiler:
    """Turns StructuredOutput into constraints, for one tokenizer and model.

    Every sequence of tokens that spells an allowed text is allowed, not only the one that the tokenizer would choose.
    Special tokens are not allowed inside the text. Where the text may end, all end tokens are allowed. If the
    checkpoint has no end tokens, the text ends where nothing more can follow; a text that could always go on, such as
    one of the regex a+, then ends only at max_tokens or another limit.

    Args:
      tokenizer: of the checkpoint.
      vocab_size: tokens of the model; ids that the tokenizer lacks are never allowed.
      eos_token_ids: tokens that end a text; they are never used as text, whatever they spell.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._kept = lru_cache(maxsize=NUM_KEPT)(self._compile)

    def compile(self, spec: StructuredOutput) -> TokenConstraint:
        """Returns the constraint that allows only outputs of this form.

        The first call builds llguidance's view of the vocabulary (up to a second for 150,000 tokens). Each new grammar
        is first compiled in a process of its own, which usually takes about 0.1 s and may take one second of processor
        time. A grammar that was compiled recently is taken from a cache.

        Raises:
          ImportError: llguidance is not installed.
          ValueError: the grammar is malformed, not supported, too costly, or matches no text; the message names the
            field and says why.
        """
        return self._kept(spec)

    def _compile(self, spec: StructuredOutput) -> TokenConstraint:
        llguidance = _llguidance()
        field, grammar = _grammar(spec)
        size = len(grammar.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(
                f"{field} must be at most {MAX_GRAMMAR_BYTES} bytes of grammar, got {size}; make it smaller"
            )
        _try_elsewhere(field, grammar, llguidance)
        limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._vocabulary.native, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"{field} must be a grammar that llguidance can follow, got: {_message(matcher)}")
        for warning in matcher.get_grammar_warnings():
            logger.warning("%s: %s", field, warning)
        try:
            first = _GrammarState(matcher.deep_copy(), self._vocabulary).text_mask()
        except ConstraintError as error:
            raise ValueError(f"{field} must match some text that this vocabulary can write: {error}") from error
        first.setflags(write=False)
        return _Grammar(matcher, self._vocabulary, first)

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        ends = [i for i in self._eos_token_ids if i < self._vocab_size]
        table = list(token_bytes(self._tokenizer)[: self._vocab_size])
        table += [b""] * (self._vocab_size - len(table))
        no_text = self._eos_token_ids | self._tokenizer.special_token_ids
        tokens = [b"" if i in no_text or text.startswith(MARKER) else text for i, text in enumerate(table)]
        llguidance = _llguidance()
        wrapper = llguidance.TokenizerWrapper(_Tokens(tokens))
        return _Vocabulary(
            native=llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size + 1),
            size=self._vocab_size,
            text=pack_ids([i for i, text in enumerate(tokens) if text], self._vocab_size),
            ends=pack_ids(ends, self._vocab_size),
            end_ids=self._eos_token_ids,
        )


class _Tokens:
    """The model's vocabulary, and one more token, in the form that llguidance.TokenizerWrapper takes.

    llguidance needs exactly one end token, but a model may have several or none. The added token is llguidance's end
    token; _GrammarState drops it from the masks and allows the model's end tokens where the text may end.
    """

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The vocabulary as llguidance sees it, and masks of the model's own tokens.

    Args:
      native: an LLTokenizer of size + 1 tokens (see _Tokens).
      size: tokens of the model.
      text: mask of the tokens that add text, uint32[W].
      ends: mask of the model's end tokens, uint32[W].
      end_ids: ids of the model's end tokens.
    """

    native: Any
    size: int
    text: np.ndarray
    ends: np.ndarray
    end_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Grammar:
    """A compiled grammar. Every sequence follows it with a matcher of its own, a copy that takes some microseconds.

    Args:
      matcher: an LLMatcher at the start of the grammar. It is never advanced, so any thread may copy it.
      vocabulary: of the model.
      first: the text mask of an empty output, uint32[W], read-only. All sequences share it, since computing it takes
        some milliseconds if many of 150,000 tokens may begin the text.
    """

    matcher: Any
    vocabulary: _Vocabulary
    first: np.ndarray = field(compare=False)

    def start(self) -> ConstraintState:
        return _GrammarState(self.matcher.deep_copy(), self.vocabulary, self.first)


class _GrammarState:
    """The position of one text in a grammar.

    Args:
      matcher: a copy of the grammar's matcher, for this text alone.
      vocabulary: of the model.
      text: the text mask of the present position, if it is known already.

    Raises:
      ConstraintError: raised by allowed if following the grammar exceeds llguidance's limits, or if no token can write
        what must come next; raised by advance for a token that is not allowed.
    """

    def __init__(self, matcher: Any, vocabulary: _Vocabulary, text: np.ndarray | None = None) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ended = False
        self._text = text

    def allowed(self) -> np.ndarray:
        return self.text_mask() | self._vocabulary.ends if self._may_end else self.text_mask()

    def advance(self, token_id: int) -> None:
        self._text = None
        if token_id in self._vocabulary.end_ids:
            self._ended = True
        elif not self._matcher.consume_token(token_id):
            raise ConstraintError(f"structured: token {token_id} is not allowed here: {_message(self._matcher)}")

    @property
    def is_complete(self) -> bool:
        return self._ended or (self._may_end and not self.text_mask().any())

    @property
    def _may_end(self) -> bool:
        return self._ended or self._matcher.is_accepting()

    def text_mask(self) -> np.ndarray:
        """Mask of the tokens that may continue the text, end tokens excluded, uint32[W]; computed once per position."""
        if self._text is None:
            self._text = self._compute_text_mask()
        return self._text

    def _compute_text_mask(self) -> np.ndarray:
        if self._ended or (self._matcher.is_stopped() and not self._matcher.is_error()):
            return np.zeros_like(self._vocabulary.text)
        mask = np.zeros(packed_len(self._vocabulary.size + 1), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(f"structured: the grammar cannot be followed further: {_message(self._matcher)}")
        text = mask[: len(self._vocabulary.text)] & self._vocabulary.text
        if not (text.any() or self._may_end):
            raise ConstraintError(
                "structured: no token of the vocabulary can go on with the text, which must not end here"
            )
        return text


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError("structured output needs llguidance: pip install 'jaxinfer[structured]'") from error
    return llguidance


def _grammar(spec: StructuredOutput) -> tuple[str, str]:
    """Returns the name of the field that is given, and its grammar in llguidance's dialect of Lark."""
    if spec.json is not None:
        schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}} | (json.loads(str(spec.json)) or {"type": "object"})
        return "structured.json", f"start: %json {json.dumps(schema)}{NO_FORCING}"
    if spec.regex is not None:
        pattern = _llguidance().regex_to_lark(spec.regex, "")
        return "structured.regex", f"start: /{pattern}/{NO_FORCING}"
    if spec.choice is not None:
        # One lexeme: llguidance's parser follows at most 2,000 alternatives at once, its lexer any number.
        return "structured.choice", f"start: CHOICE\nCHOICE: {' | '.join(map(_literal, spec.choice))}{NO_FORCING}"
    return "structured.lark", f"{spec.lark}{NO_FORCING}"


def _literal(text: str) -> str:
    """The text as a string literal of Lark. Its escapes are those of JSON, except that DEL must be escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _try_elsewhere(field: str, grammar: str, llguidance: Any) -> None:
    """Compiles a grammar in a process of its own, so that a grammar that crashes or hangs does no harm here.

    Raises:
      ValueError: the process crashed or exceeded a limit.
      RuntimeError: the trial program itself failed, for example because it cannot import llguidance.
    """
    try:
        trial = subprocess.run(
            confined.command(TRIAL, limits=TRIAL_LIMITS),
            input=grammar.encode(),
            env=confined.environment([str(Path(llguidance.__file__).parents[1])]),
            capture_output=True,
            timeout=TRIAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        trial = None
    if trial is None or trial.returncode < 0:
        raise ValueError(
            f"{field} must be a grammar that compiles within a second, a gigabyte and a stack of two megabytes, "
            "got one that does not; make it smaller, with fewer steps from rule to rule"
        )
    if trial.returncode > 0:
        error = trial.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{TRIAL.name}, run by {sys.executable} to try {field}, failed: {error}")


def _message(matcher: Any) -> str:
    """llguidance's error on one line, without the dumps of state, grammar and stack that may follow it."""
    text = " ".join(matcher.get_error().partition("\n<")[0].split())
    return text if len(text) <= MAX_MESSAGE_LEN else text[:MAX_MESSAGE_LEN] + " ..."
