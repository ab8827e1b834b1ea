"""Program: compiles one grammar, in a process that may die of it; structured.py runs it, with limits.

Owns: what a trial is; nothing comes back but the exit status (by a signal, or 0).
Does not know: jaxinfer, which takes seconds to import; whether the grammar is right (the caller compiles it again).

llguidance bounds much of its work itself, but (1.9.1) a chain of 8,000 rules overflows the stack and ends the process,
and {"type": "integer", "multipleOf": 999983} takes 7 s and 400 MB: not in the process that serves everybody else.
"""

from __future__ import annotations

import sys

import llguidance


class ByteTokens:
    """A vocabulary of single bytes, as llguidance.TokenizerWrapper takes one; 255 ends the text."""

    tokens = (*(bytes([byte]) for byte in range(255)), b"")
    eos_token_id = 255
    bos_token_id = None


def main(arguments: list[str]) -> None:
    """Compiles the grammar on standard input; takes no arguments."""
    wrapper = llguidance.TokenizerWrapper(ByteTokens())
    tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(ByteTokens.tokens))
    grammar = sys.stdin.buffer.read().decode()
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
