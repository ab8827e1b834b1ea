"""Program: compiles one grammar under limits of the operating system, and dies of it if the grammar is malicious.

Owns: the limits of time, memory and stack; nothing comes back but the exit status (by a signal, or 0).
Does not know: jaxinfer, which takes seconds to import; whether the grammar is right (the caller compiles it again).

llguidance bounds much of its work itself, but (1.9.1) a chain of 8,000 rules overflows the stack and ends the process,
and {"type": "integer", "multipleOf": 999983} takes 7 s and 400 MB: not in the process that serves everybody else.
"""

from __future__ import annotations

import resource
import sys

CPU_SECONDS = 1
ADDRESS_SPACE_BYTES = 1 << 30
STACK_BYTES = 2 << 20
"""A quarter of the usual stack of a thread, in which the grammar will be compiled and followed."""


class ByteTokens:
    """A vocabulary of single bytes, as llguidance.TokenizerWrapper takes one; 255 ends the text."""

    tokens = (*(bytes([byte]) for byte in range(255)), b"")
    eos_token_id = 255
    bos_token_id = None


def lower(limit: int, value: int) -> None:
    """Lowers one of the process's soft limits, within its hard one."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    """Compiles the grammar on standard input."""
    import llguidance

    wrapper = llguidance.TokenizerWrapper(ByteTokens())
    tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(ByteTokens.tokens))
    grammar = sys.stdin.buffer.read().decode()
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_CPU, CPU_SECONDS)
    lower(resource.RLIMIT_AS, ADDRESS_SPACE_BYTES)
    lower(resource.RLIMIT_STACK, STACK_BYTES)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()


if __name__ == "__main__":
    main()
