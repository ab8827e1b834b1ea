"""What every process of a run does in test_processes.py; started by it, with a JSON object as its argument."""

from __future__ import annotations

import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from shared_programs import take_few_programs

import jaxinfer
from jaxinfer import LLM, BeamSearchParams, RequestOutput, SamplingParams
from jaxinfer.communication.process_group import Patience

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


def generate_until(llm: LLM, fault: str | None) -> None:
    """Generates without end; with a fault, this process breaks down in that way when the first tokens have come."""
    llm.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    print("generates", flush=True)
    if fault == "raise":
        raise ArithmeticError("bad luck")
    if fault == "stuck":
        llm._loaded.decoder.launch = lambda batch: time.sleep(1000)
    while True:
        llm.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=30, ignore_eos=True), use_tqdm=False)


def main(
    number: int,
    *,
    address: str,
    count: int,
    model: str,
    engine: dict[str, Any],
    calls: list[dict[str, Any]],
    fault: tuple[int, str] | None = None,
    patience: dict[str, float],
) -> None:
    take_few_programs(setattr)
    jaxinfer.distributed.initialize(
        address, count, number, secret="a secret of the tests", patience=Patience(**patience)
    )
    with LLM(model, tokenizer="byte", **engine) as llm:
        found = {"calls": run_calls(llm, calls), "num_steps": llm.stats().num_steps}
        if fault is not None:
            print(json.dumps(found), flush=True)
            generate_until(llm, fault[1] if number == fault[0] else None)
        if number:
            llm.follow()
        else:
            found["serves"] = serve(llm, calls)
            found["kv_pages_used"] = llm.stats().kv_pages_used
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), **json.loads(sys.argv[2]))
