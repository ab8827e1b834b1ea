"""A client that asks a server for many streams at once and counts what comes; a program of its own.

It reads as little as it can, so that on a machine with few cores the server has the rest. Arguments: host, port,
number of streams, new tokens of each, tokens of each prompt, size of the vocabulary, seed, the model's name. It prints
the number of chunks and the seconds, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

KEY = "bench"
MODEL = "bench"


async def _count_chunks(host: str, port: int, body: dict[str, object]) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
    )
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
    text = await reader.read()
    writer.close()
    if b"data: [DONE]" not in text:
        raise RuntimeError(f"a stream was not complete: {text[-500:]!r}")
    return text.count(b"data: {")


async def _ask(
    host: str, port: int, *, streams: int, output_len: int, prompt_len: int, vocab_size: int, seed: int, model: str
) -> tuple[int, float]:
    rng = random.Random(seed)
    bodies: list[dict[str, object]] = [
        {
            "model": model,
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
    host, numbers, model = sys.argv[1], [int(argument) for argument in sys.argv[2:-1]], sys.argv[-1]
    names = ("streams", "output_len", "prompt_len", "vocab_size", "seed")
    chunks, seconds = asyncio.run(_ask(host, numbers[0], **dict(zip(names, numbers[1:], strict=True)), model=model))
    print(json.dumps({"chunks": chunks, "seconds": seconds}))
