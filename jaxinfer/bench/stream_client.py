"""A client that asks a server for many streams at once and counts what comes; a program of its own.

It reads as little as it can, so that on a machine with few cores the server has the rest. Arguments: host, port,
number of streams, new tokens of each, tokens of each prompt, size of the vocabulary, seed. It prints the number of
chunks and the seconds, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

KEY = b"bench"


async def _count_chunks(host: str, port: int, body: dict[str, object]) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nx-api-key: %b\r\nconnection: close\r\n" % KEY
    writer.write(head + b"content-length: %d\r\n\r\n" % len(content) + content)
    text = await reader.read()
    writer.close()
    if b"data: [DONE]" not in text:
        raise RuntimeError(f"a stream was not complete: {text[-500:]!r}")
    return text.count(b"data: {")


async def _ask(
    host: str, port: int, *, streams: int, output_len: int, prompt_len: int, vocab_size: int, seed: int
) -> tuple[int, float]:
    rng = random.Random(seed)
    bodies: list[dict[str, object]] = [
        {
            "model": "bench",
            "prompt": [rng.randrange(vocab_size) for _ in range(prompt_len)],
            "max_tokens": output_len,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        for _ in range(streams)
    ]
    start = time.perf_counter()
    counts = await asyncio.gather(*(_count_chunks(host, port, body) for body in bodies))
    return sum(counts), time.perf_counter() - start


if __name__ == "__main__":
    host, numbers = sys.argv[1], [int(argument) for argument in sys.argv[2:]]
    names = ("streams", "output_len", "prompt_len", "vocab_size", "seed")
    chunks, seconds = asyncio.run(_ask(host, numbers[0], **dict(zip(names, numbers[1:], strict=True))))
    print(json.dumps({"chunks": chunks, "seconds": seconds}))
