"""What every process of a run does in test_processes.py; started by it, with a JSON object as its argument."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from shared_programs import take_few_programs

import jaxinfer
from jaxinfer import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from jaxinfer.api.async_llm import AsyncOutputStream
from jaxinfer.communication.progress import Patience

CLASSES = {"generate": SamplingParams, "beam_search": BeamSearchParams}


def run_calls(llm: LLM, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs of calls of an LLM's methods, as plain values without times."""
    return list(map(plain, itertools.chain.from_iterable(run_call(llm, call) for call in calls)))


def run_call(llm: LLM, call: dict[str, Any]) -> list[RequestOutput]:
    method = getattr(llm, call["method"])
    if call["method"] in CLASSES:
        params = [CLASSES[call["method"]](**fields) for fields in call["params"]]
        return method(call["prompts"], params, use_tqdm=False)
    return method(call["prompts"], use_tqdm=False)


def plain(output: RequestOutput) -> dict[str, Any]:
    fields = output.as_dict()
    del fields["metrics"], fields["request_id"]
    return json.loads(json.dumps(fields))


def serve(llm: LLM, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As run_calls, from a thread of its own, while other requests come and leave in mid-flight."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        outputs = pool.submit(run_calls, llm, calls)
        for length in (30, 3, 17, 9, 1):
            with closing(llm.stream(list(range(length)), params)) as stream:
                assert all(not output.finished for output in itertools.islice(stream, 1 + length % 4))
        return outputs.result()


async def serve_tasks(number: int, model: str, engine: dict[str, Any], call: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of a call whose prompts are tasks of process 0, while the others follow."""

    async def last(stream: AsyncOutputStream) -> RequestOutput:
        return [output async for output in stream][-1]

    async with AsyncLLM(model, tokenizer="byte", **engine) as llm:
        if number:
            await llm.follow()
            return []
        pairs = zip(call["prompts"], call["params"], strict=True)
        streams = [llm.generate(prompt, SamplingParams(**fields)) for prompt, fields in pairs]
        return list(map(plain, await asyncio.gather(*map(last, streams))))


def generate_until(llm: LLM, fault: str | None) -> None:
    """Generates without end; with a fault, this process breaks down in that way when the first tokens have come."""
    llm.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    print("generates", flush=True)
    if fault == "raise":
        raise ArithmeticError("bad luck")
    if fault == "stuck":
        wrapper = llm._loaded.wrapper
        getattr(wrapper, "wrapper", wrapper).launch = lambda batch: time.sleep(
            1000
        )  # on process 0 it is a LeadingWrapper
    while True:
        llm.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=30, ignore_eos=True), use_tqdm=False)


def run_random(llm: LLM, count: int) -> dict[str, list[int]]:
    """Makes requests of random kinds from eight threads; returns what the process holds after a tenth and at the end.

    The numbers are threads, open files and KiB of memory.
    """
    held = {"after a tenth": [], "at the end": []}
    for name, number in (("after a tenth", count // 10), ("at the end", count - count // 10)):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: run_one_random(llm, random.Random(seed)), range(number)))
        llm.generate([1], SamplingParams(max_tokens=1))  # runs behind the last abort
        status = Path("/proc/self/status").read_text()
        memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
        held[name] = [threading.active_count(), len(os.listdir("/proc/self/fd")), memory]
    return held


def run_one_random(llm: LLM, chosen: random.Random) -> None:
    prompt = [chosen.randrange(256) for _ in range(chosen.randint(1, 30))]
    limit = chosen.randint(1, 12)
    params = SamplingParams(
        max_tokens=limit,
        temperature=chosen.choice([0.0, 1.0]),
        top_k=chosen.choice([0, 5]),
        top_p=chosen.choice([1.0, 0.8]),
        seed=chosen.randrange(1000),
        n=chosen.choice([1, 1, 2]),
        ignore_eos=True,
        logprobs=chosen.choice([None, 2]),
        prompt_logprobs=chosen.choice([None, None, 1]),
        presence_penalty=chosen.choice([0.0, 0.0, 1.0]),
        bad_words=chosen.choice([None, None, ["a"]]),
    )
    kind = chosen.choice(["generate", "generate", "stream", "abort", "search", "score", "structured"])
    if kind == "generate":
        llm.generate(prompt, params)
    elif kind == "search":
        llm.beam_search(prompt, BeamSearchParams(beam_width=chosen.randint(1, 3), max_tokens=limit))
    elif kind == "score":
        llm.score(prompt[:1] * 2)
    elif kind == "structured":
        llm.generate(prompt, SamplingParams(max_tokens=limit, seed=1, structured={"regex": "[a-c]{2,9}"}))
    else:
        with closing(llm.stream(prompt, params)) as stream:
            for _ in itertools.islice(stream, None if kind == "stream" else 1):
                pass


def main(
    number: int,
    *,
    address: str,
    count: int,
    model: str,
    engine: dict[str, Any],
    calls: list[dict[str, Any]],
    fault: tuple[int, str] | None = None,
    num_random: int = 0,
    patience: dict[str, float],
    has_tasks: bool = False,
) -> None:
    take_few_programs(setattr)
    jaxinfer.distributed.initialize(
        address, count, number, secret="a secret of the tests", patience=Patience(**patience)
    )
    if has_tasks:
        print(json.dumps({"tasks": asyncio.run(serve_tasks(number, model, engine, calls[0]))}), flush=True)
        return
    with LLM(model, tokenizer="byte", **engine) as llm:
        found = {"calls": run_calls(llm, calls), "num_steps": llm.stats().num_steps}
        if fault is not None:
            print(json.dumps(found), flush=True)
            generate_until(llm, fault[1] if number == fault[0] else None)
        if number:
            llm.follow()
        elif num_random:
            found["held"] = run_random(llm, num_random)
            found["kv_pages_used"] = llm.stats().kv_pages_used
        else:
            found["serves"] = serve(llm, calls)
            found["kv_pages_used"] = llm.stats().kv_pages_used
            found["steps_of_replicas"] = [loaded.stats().num_steps for loaded in llm._replicas]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), **json.loads(sys.argv[2]))
