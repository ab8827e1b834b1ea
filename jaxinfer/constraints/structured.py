"""Structured output: a JSON schema, regex, choice or grammar as a constraint on the tokens. The adapter of llguidance.

Owns: StructuredOutput -> llguidance's grammar -> TokenConstraint; the limits on what a grammar may cost.
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
"""Of one or two kilobytes each, made while texts go on; llguidance's own limit is five times that."""
MAX_MESSAGE_LEN = 500
NUM_KEPT = 64
"""Grammars kept compiled; an application asks for the same few again and again."""
TRIAL_SECONDS = 20.0
"""Of wall-clock time, for a machine too busy to give the trial its one second of processor time sooner."""
TRIAL = Path(__file__).with_name("grammar_trial.py")
TRIAL_LIMITS = {"RLIMIT_CPU": 1, "RLIMIT_AS": 1 << 30, "RLIMIT_STACK": 2 << 20}
"""Seconds of processor time, bytes of address space, and bytes of stack: a quarter of the usual stack of a thread, in
which the grammar will be compiled and followed."""
MARKER = b"\xff"  # llguidance takes tokens that begin with this byte, which UTF-8 never has, for special ones
# Without it a mask would hold only the tokenization that the tokenizer itself would choose for text that must come.
WHITESPACE = r"\n? {0,12}"
"""Between the tokens of JSON, unless a schema's own x-guidance says otherwise; unlimited, a weak model may never get
beyond it."""
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'


class GrammarCompiler:
    """Makes constraints of structured-output requests, for one tokenizer and model.

    Any sequence of tokens that spells an allowed text is allowed, not only the one the tokenizer would choose. Special
    tokens never come inside the text. Where the text may end, all end tokens are allowed; without end tokens it ends
    once nothing more can follow (an open-ended text such as a+ then goes on to its other limits).

    Args:
      tokenizer: of the checkpoint.
      vocab_size: tokens of the model; ids beyond the tokenizer's never come.
      eos_token_ids: tokens that end a text; they never stand for text here, whatever they spell.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._kept = lru_cache(maxsize=NUM_KEPT)(self._compile)

    def compile(self, spec: StructuredOutput) -> TokenConstraint:
        """The constraint that only texts of this form come.

        The first call builds llguidance's view of the vocabulary (up to a second for 150,000 tokens). Each new grammar
        is tried in a process of its own first (about 0.1 s) and may take one second there.

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
    """A vocabulary as llguidance.TokenizerWrapper takes one: the model's and one more token, which ends a text.

    llguidance must have an end token; a model may have several or none, so they are put in place of this one.
    """

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """llguidance's tokenizer beside the model's masks.

    Args:
      native: an LLTokenizer of size + 1 tokens.
      size: tokens of the model.
      text: mask of the tokens that stand for text, uint32[W].
      ends: mask of the end tokens, uint32[W].
      end_ids: the end tokens.
    """

    native: Any
    size: int
    text: np.ndarray
    ends: np.ndarray
    end_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Grammar:
    """A compiled grammar; every sequence follows it with a copy of the matcher (some microseconds).

    Args:
      matcher: an LLMatcher that never moves; any thread may copy it.
      vocabulary: of the model.
      first: the text mask of an empty text, uint32[W], read-only: the same for all sequences, and some milliseconds'
        work where many of 150,000 tokens may begin.
    """

    matcher: Any
    vocabulary: _Vocabulary
    first: np.ndarray = field(compare=False)

    def start(self) -> ConstraintState:
        return _GrammarState(self.matcher.deep_copy(), self.vocabulary, self.first)


class _GrammarState:
    """Where one text stands in a grammar.

    Args:
      matcher: its own copy.
      vocabulary: of the model.
      text: the text mask of the present state, where it is known already.

    Raises:
      ConstraintError: allowed, when following the grammar exceeds llguidance's limits or the vocabulary cannot write
        what must come next; advance, for a token that is not allowed.
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
        """The tokens that may go on with the text, uint32[W]; computed once a token."""
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
    """The field that is given, and its grammar in llguidance's Lark."""
    if spec.json is not None:
        schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}} | (json.loads(str(spec.json)) or {"type": "object"})
        return "structured.json", f"start: %json {json.dumps(schema)}{NO_FORCING}"
    if spec.regex is not None:
        pattern = _llguidance().regex_to_lark(spec.regex, "")
        return "structured.regex", f"start: /{pattern}/{NO_FORCING}"
    if spec.choice is not None:
        return "structured.choice", f"start: {' | '.join(map(_literal, spec.choice))}{NO_FORCING}"
    return "structured.lark", f"{spec.lark}{NO_FORCING}"


def _literal(text: str) -> str:
    """A string of Lark's, whose escapes are JSON's; DEL, which JSON leaves as it is, must be escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _try_elsewhere(field: str, grammar: str, llguidance: Any) -> None:
    """Compiles a grammar in a process of its own, which may die of it.

    Raises:
      ValueError: it did.
      RuntimeError: the trial itself could not be run.
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
