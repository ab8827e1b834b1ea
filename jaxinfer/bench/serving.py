"""`bench serve`: what the server costs, as streams over HTTP against the same requests in LLM.generate.

Both kinds of runs take turns, so that what else the machine does slows both. The client is a process of its own on the
same machine, whose work the server's rate includes. Another server that speaks OpenAI's API can be asked the same.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from jaxinfer.api.llm import LLM
from jaxinfer.bench import stream_client
from jaxinfer.bench.report import format_table
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.server import BackgroundServer

_MOST_UNTIMED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingResult:
    """The rates of both kinds of runs.

    Args:
      num_streams: requests at once.
      generate_tokens_per_s, served_tokens_per_s: output tokens per second of each timed run.
      server_us_per_token: processor time of the server's thread per token, in microseconds, of each timed run: taking
        tokens from the engine, making text and events of them, and sending these.
      chunks_per_token: events per token; below 1 if the server sent several tokens at a time.
      beside_tokens_per_s: of another server; empty without one.
    """

    num_streams: int
    generate_tokens_per_s: tuple[float, ...]
    served_tokens_per_s: tuple[float, ...]
    server_us_per_token: tuple[float, ...]
    chunks_per_token: float
    beside_tokens_per_s: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """Median throughput over HTTP over the median of LLM.generate."""
        return statistics.median(self.served_tokens_per_s) / statistics.median(self.generate_tokens_per_s)


def measure(
    llm: LLM,
    *,
    num_streams: int,
    prompt_len: int,
    output_len: int,
    repeats: int,
    seed: int,
    beside: str | None = None,
    beside_model: str = stream_client.MODEL,
) -> ServingResult:
    """Times runs of random prompts, after untimed ones that have compiled all programs.

    Requests over HTTP come one after the other, so their steps have many shapes: they are asked until nothing is
    compiled any more, but at most ten times.

    Args:
      llm: the model, with slots for all streams.
      num_streams: requests at once.
      prompt_len, output_len: tokens of each.
      repeats: timed runs of each kind.
      seed: of the prompts.
      beside: the address of another server with the same model, which takes its turns, too. It has to read prompts of
        token ids and know ignore_eos, as vLLM's and llama.cpp's do.
      beside_model: what that server calls the model.

    Raises:
      ValueError: beside is no address.
      ConnectionError: a server did not answer, or not with whole streams.
    """
    load = _Load(num_streams, prompt_len, output_len, llm.model_config.vocab_size)
    generated, served, others, costs, chunks = [], [], [], [], 0
    with BackgroundServer(llm, _config()) as server:
        load.generate(llm, seed - 1)
        for untimed in range(_MOST_UNTIMED):
            num_compilations = llm.stats().num_compilations
            load.ask(server.url, seed - 2 - untimed)
            if llm.stats().num_compilations == num_compilations:
                break
        if beside is not None:
            load.ask(beside, seed - 1, model=beside_model)
        for first in range(seed, seed + 2 * repeats, 2):
            generated.append(load.num_tokens / load.generate(llm, first))
            before = server.processor_seconds
            answer = load.ask(server.url, first + 1)
            served.append(load.num_tokens / answer["seconds"])
            costs.append(1e6 * (server.processor_seconds - before) / load.num_tokens)
            chunks += answer["chunks"]
            if beside is not None:
                others.append(load.num_tokens / load.ask(beside, first + 1, model=beside_model)["seconds"])
    return ServingResult(
        num_streams=num_streams,
        generate_tokens_per_s=tuple(generated),
        served_tokens_per_s=tuple(served),
        server_us_per_token=tuple(costs),
        chunks_per_token=chunks / (repeats * load.num_tokens),
        beside_tokens_per_s=tuple(others),
    )


def _config() -> ServeConfig:
    key = [stream_client.KEY]  # JAXINFER_API_KEY may ask for keys, too
    return ServeConfig(port=0, served_model_name=[stream_client.MODEL], api_key=key, warmup=False, access_log=False)


@dataclass(frozen=True, slots=True)
class _Load:
    """What is asked for in each run."""

    num_streams: int
    prompt_len: int
    output_len: int
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_streams * self.output_len

    def generate(self, llm: LLM, seed: int) -> float:
        """The seconds that LLM.generate takes."""
        rng = random.Random(seed)
        prompts = [[rng.randrange(self.vocab_size) for _ in range(self.prompt_len)] for _ in range(self.num_streams)]
        params = SamplingParams(max_tokens=self.output_len, ignore_eos=True, temperature=0)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    def ask(self, url: str, seed: int, *, model: str = stream_client.MODEL) -> dict[str, float]:
        """What the client tells of streams from a server."""
        address = urlsplit(url)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(f"expected an address such as http://127.0.0.1:8080, got {url!r}")
        numbers = (
            address.port or 80,
            self.num_streams,
            self.output_len,
            self.prompt_len,
            self.vocab_size,
            seed,
        )
        command = [sys.executable, stream_client.__file__, address.hostname, *map(str, numbers), model]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ConnectionError(f"{url} gave no whole streams: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout)


def render(result: ServingResult) -> str:
    """Text with the median rates, their ratio and the server's own work."""
    kinds = {"LLM.generate": result.generate_tokens_per_s, "streams over HTTP": result.served_tokens_per_s}
    if result.beside_tokens_per_s:
        kinds["the other server"] = result.beside_tokens_per_s
    rows = [[name, statistics.median(rates), min(rates), max(rates)] for name, rates in kinds.items()]
    table = format_table([f"{result.num_streams} at once", "tokens/s", "least", "most"], rows)
    costs = result.server_us_per_token
    beside = ""
    if result.beside_tokens_per_s:
        ratio = statistics.median(result.served_tokens_per_s) / statistics.median(result.beside_tokens_per_s)
        beside = f"\n{ratio:.2f} times the other server's throughput"
    return (
        f"{table}\n\n{result.ratio:.3f} of LLM.generate's throughput over HTTP; the server's thread takes "
        f"{statistics.median(costs):.1f} us a token ({min(costs):.1f} to {max(costs):.1f}), "
        f"{result.chunks_per_token:.2f} events a token{beside}"
    )
