"""Sixteen streams at a time for twenty minutes: `pytest -m soak -n 0 -s tests/serve/http/test_soak.py`.

Texts equal LLM.generate's, memory and open files stay as they are, and nothing is left over.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time

import httpx
import pytest

from jaxinfer import LLM, SamplingParams

MINUTES = float(os.environ.get("JAXINFER_SOAK_MINUTES", "20"))
STREAMS = 16
WORDS = ("And", "the", "LORD", "said", "unto", "Moses", "go", "down", "to", "people", "of", "Israel", "house", "king")
pytestmark = pytest.mark.soak


def requests(rng):
    """Requests of many lengths and all samplers; none of them depends on others."""
    for number in range(64):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
        yield {
            "prompt": prompt,
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": 0,
            "seed": number,
            "max_tokens": rng.randint(1, 120),
            "ignore_eos": rng.random() < 0.5,
        }


def memory():
    """Megabytes that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files():
    return len(os.listdir("/proc/self/fd"))


async def stream(http, body, *, leaves):
    """The text of a stream; None if the client leaves in the middle."""
    text = ""
    async with http.stream("POST", "/v1/completions", json=body | {"model": "demo", "stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if leaves and len(text) > 20:
                    return None
    return text


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory as Linux tells it")
def test_soak():
    bodies = list(requests(random.Random(0)))
    with LLM("demo", num_kv_pages=256, max_num_seqs=STREAMS) as llm, llm.serve(port=0, warmup=False) as server:
        params = [SamplingParams(**{k: v for k, v in body.items() if k != "prompt"}) for body in bodies]
        expected = [output.text for output in llm.generate([body["prompt"] for body in bodies], params)]
        end = time.monotonic() + 60 * MINUTES
        counts = {"whole": 0, "left": 0}
        sizes = []

        async def client(number, http):
            rng = random.Random(number)
            while time.monotonic() < end:
                chosen = rng.randrange(len(bodies))
                text = await stream(http, bodies[chosen], leaves=rng.random() < 0.1)
                counts["left" if text is None else "whole"] += 1
                assert text in (None, expected[chosen])

        async def watch():
            while time.monotonic() < end:
                await asyncio.sleep(min(60, 60 * MINUTES / 8))
                sizes.append((round(memory()), open_files()))
                print(counts, sizes[-1], llm.stats().num_compilations, flush=True)

        async def load():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
                await asyncio.gather(watch(), *(client(number, http) for number in range(STREAMS)))

        asyncio.run(load())
        deadline = time.monotonic() + 10
        while server.num_requests or llm.stats().kv_pages_used:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    quarter = len(sizes) // 4
    assert max(size for size, _ in sizes[-quarter:]) < 1.05 * max(size for size, _ in sizes[: quarter + 1])
    assert max(files for _, files in sizes) - min(files for _, files in sizes) < 8
