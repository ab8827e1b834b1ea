"""`bench serve`: what the server costs, as streams over HTTP against the same requests in LLM.generate.

Both kinds of runs take turns, so that what else the machine does slows both. The client is a process of its own on the
same machine, whose work the server's rate includes.
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
    """

    num_streams: int
    generate_tokens_per_s: tuple[float, ...]
    served_tokens_per_s: tuple[float, ...]
    server_us_per_token: tuple[float, ...]
    chunks_per_token: float

    @property
    def ratio(self) -> float:
        """Median throughput over HTTP over the median of LLM.generate."""
        return statistics.median(self.served_tokens_per_s) / statistics.median(self.generate_tokens_per_s)


def measure(llm: LLM, *, num_streams: int, prompt_len: int, output_len: int, repeats: int, seed: int) -> ServingResult:
    """Times runs of random prompts, after untimed ones that have compiled all programs.

    Requests over HTTP come one after the other, so their steps have many shapes: they are asked until nothing is
    compiled any more, but at most ten times.

    Args:
      llm: the model, with slots for all streams.
      num_streams: requests at once.
      prompt_len, output_len: tokens of each.
      repeats: timed runs of each kind.
      seed: of the prompts.
    """
    num_tokens = num_streams * output_len
    generated, served, costs, chunks = [], [], [], 0
    with BackgroundServer(llm, _config()) as server:
        _generate(llm, num_streams, prompt_len, output_len, seed - 1)
        for untimed in range(_MOST_UNTIMED):
            num_compilations = llm.stats().num_compilations
            _ask(server, llm, num_streams, prompt_len, output_len, seed - 2 - untimed)
            if llm.stats().num_compilations == num_compilations:
                break
        for repeat in range(repeats):
            seconds = _generate(llm, num_streams, prompt_len, output_len, seed + 2 * repeat)
            before = server.processor_seconds
            answer = _ask(server, llm, num_streams, prompt_len, output_len, seed + 2 * repeat + 1)
            generated.append(num_tokens / seconds)
            served.append(num_tokens / answer["seconds"])
            costs.append(1e6 * (server.processor_seconds - before) / num_tokens)
            chunks += answer["chunks"]
    return ServingResult(
        num_streams=num_streams,
        generate_tokens_per_s=tuple(generated),
        served_tokens_per_s=tuple(served),
        server_us_per_token=tuple(costs),
        chunks_per_token=chunks / (repeats * num_tokens),
    )


def _config() -> ServeConfig:
    key = stream_client.KEY.decode()  # JAXINFER_API_KEY may ask for keys, too
    return ServeConfig(port=0, served_model_name=["bench"], api_key=[key], warmup=False, access_log=False)


def _generate(llm: LLM, num_streams: int, prompt_len: int, output_len: int, seed: int) -> float:
    rng, vocab_size = random.Random(seed), llm.model_config.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt_len)] for _ in range(num_streams)]
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def _ask(
    server: BackgroundServer, llm: LLM, num_streams: int, prompt_len: int, output_len: int, seed: int
) -> dict[str, float]:
    address = urlsplit(server.url)
    numbers = (address.port, num_streams, output_len, prompt_len, llm.model_config.vocab_size, seed)
    command = [sys.executable, stream_client.__file__, str(address.hostname), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the client failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def render(result: ServingResult) -> str:
    """Text with the median rates, their ratio and the server's own work."""
    kinds = {"LLM.generate": result.generate_tokens_per_s, "streams over HTTP": result.served_tokens_per_s}
    rows = [[name, statistics.median(rates), min(rates), max(rates)] for name, rates in kinds.items()]
    table = format_table([f"{result.num_streams} at once", "tokens/s", "least", "most"], rows)
    costs = result.server_us_per_token
    return (
        f"{table}\n\n{result.ratio:.3f} of LLM.generate's throughput over HTTP; the server's thread takes "
        f"{statistics.median(costs):.1f} us a token ({min(costs):.1f} to {max(costs):.1f}), "
        f"{result.chunks_per_token:.2f} events a token"
    )
