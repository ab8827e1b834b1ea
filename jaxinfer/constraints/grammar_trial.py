"""A program that tries to compile one grammar; structured.py runs it in a process with limits, which may crash.

Owns: the trial. Its only result is how the process ends: exit status 0, or a signal if it crashed or hit a limit.
Does not know: jaxinfer, which takes seconds to import; whether the grammar is correct (the caller compiles a grammar
that survived the trial again and reports its errors).

The trial is needed because a grammar can harm the process that compiles it. llguidance bounds much of its work itself,
but in version 1.9.1 a chain of 8,000 rules overflows the stack and crashes the process, and {"type": "integer",
"multipleOf": 999983} takes 7 s and 400 MB.
"""

from __future__ import annotations

import sys

import llguidance


class ByteTokens:
    """A vocabulary of single bytes in the form that llguidance.TokenizerWrapper takes; token 255 ends the text."""

    tokens = (*(bytes([byte]) for byte in range(255)), b"")
    eos_token_id = 255
    bos_token_id = None


def main(arguments: list[str]) -> None:
    """Compiles the grammar on standard input and computes its first mask; it ignores its arguments."""
    wrapper = llguidance.TokenizerWrapper(ByteTokens())
    tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(ByteTokens.tokens))
    grammar = sys.stdin.buffer.read().decode()
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
