"""Runs of several real processes give the texts of one, whoever holds which part of the model."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
from conftest import load_golden
from group_tools import free_address
from mesh_tools import BASE, on_mesh, requests_of
from process_script import run_calls, serve
from processes import TESTS, Children, simulating

from jaxinfer.communication.ending import EXIT_LOST

SCRIPT = TESTS / "process_script.py"
# Some of these processes are killed, perhaps while they write a program: not into the cache of all other tests.
CACHE = tempfile.mkdtemp(prefix="jaxinfer-test-processes-xla-")
SEEDED = {"temperature": 1.0, "seed": 3, "ignore_eos": True}


def calls_of(model: str) -> list[dict[str, Any]]:
    """Calls of every kind; the first has requests of every kind in one batch."""
    pairs = [(prompt, asdict(params)) for prompt, params in requests_of(model)]
    pairs += [
        ([5, 6, 7] * 5, SEEDED | {"n": 3, "max_tokens": 9}),
        ([9] * 11, SEEDED | {"max_tokens": 12, "presence_penalty": 0.5, "repetition_penalty": 1.3}),
        ([1, 2, 3, 4] * 7, {"temperature": 0.0, "max_tokens": 6, "prompt_logprobs": 2, "logprobs": 3}),
        ("a structured", {"max_tokens": 14, "seed": 1, "structured": {"regex": "[0-9]{2}-[a-f]{3,8}"}}),
        ("stops", SEEDED | {"max_tokens": 20, "bad_words": ["a", "bc"], "stop": ["e", "xy"]}),
    ]
    prompts, params = zip(*pairs, strict=True)
    return [
        {"method": "generate", "prompts": prompts, "params": params},
        {
            "method": "beam_search",
            "prompts": [[3, 1, 4, 1, 5], [9, 2, 6]],
            "params": [{"beam_width": 3, "max_tokens": 6, "num_return_sequences": 2}, {"beam_width": 2}],
        },
        {"method": "score", "prompts": [list(range(30)), "scored"]},
    ]


@functools.cache
def alone(model: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The calls in one process with one device, first by themselves and then among requests that are aborted."""
    with on_mesh(model, (1, 1), tokenizer="byte") as llm:
        calls = json.loads(json.dumps(calls_of(model)))
        return run_calls(llm, calls), serve(llm, calls)


@dataclass(frozen=True)
class Arguments:
    """How the processes of a run are started; `each` has the arguments of process_script.main by process."""

    each: list[dict[str, Any]]

    def command(self, number: int) -> list[object]:
        return [SCRIPT, number, json.dumps(self.each[number])]

    def environment(self, num_devices: int) -> dict[str, str]:
        """With so many CPU devices."""
        path = f"{TESTS}:{TESTS.parent}"
        return {"XLA_FLAGS": simulating(num_devices), "PYTHONPATH": path, "JAXINFER_CACHE_DIR": CACHE}


def arguments_of(
    count: int, model: str, calls: list[dict[str, Any]], *, last: dict[str, Any] | None = None, **others: Any
) -> Arguments:
    """Arguments for so many processes; in those of the last one, some are replaced by `last`."""
    arguments = {
        "count": count,
        "model": str(load_golden(f"mesh/{model}").path),
        "calls": calls,
        "patience": {},
        **others,
        "engine": BASE | others["engine"],
    }
    return Arguments([arguments] * (count - 1) + [arguments | (last or {})])


@contextlib.contextmanager
def processes_of(count: int, num_devices: int, model: str, calls: list[dict[str, Any]], **others: Any):
    """A run of so many processes, each with so many CPU devices; others as arguments_of's."""
    arguments = arguments_of(count, model, calls, address=free_address(), **others)
    commands = [[sys.executable, *arguments.command(number)] for number in range(count)]
    with Children(*commands, **arguments.environment(num_devices)) as children:
        yield children


def found_by(children: Children) -> list[dict[str, Any]]:
    """What each process has printed."""
    lines = [children.out(number).splitlines() for number in range(len(children.processes))]
    return [json.loads(next(line for line in own if line.startswith("{"))) for own in lines]


def texts(outputs: list[dict[str, Any]]) -> list[Any]:
    names = ("token_ids", "text", "finish_reason", "stop_reason")
    return [[[entry[name] for name in names] for entry in output["outputs"]] for output in outputs]


def logprobs(outputs: list[dict[str, Any]]) -> list[float]:
    """All log-probabilities of outputs and prompts in one row."""
    maps = [entry for output in outputs for found in output["outputs"] for entry in found["logprobs"] or ()]
    maps += [entry for output in outputs for entry in output["prompt_logprobs"] or () if entry is not None]
    return [found["logprob"] for entry in maps for found in entry.values()]


LAYOUTS = {  # processes, devices of each, stages x shards
    "2 processes, stages": (2, 1, (2, 1)),
    "2 processes, shards": (2, 1, (1, 2)),
    "2 processes of 2 devices, stages": (2, 2, (2, 2)),
    "2 processes of 2 devices, shards": (2, 2, (1, 4)),
    "4 processes, stages and shards": (4, 1, (2, 2)),
    "4 processes, stages": (4, 1, (4, 1)),
    "4 processes, shards": (4, 1, (1, 4)),
}


def assert_equal_to_one_process(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    leader, *others = found
    for other in others:
        assert other["calls"] == leader["calls"] and other["num_steps"] == leader["num_steps"]
    assert texts(leader["calls"]) == texts(expected)
    np.testing.assert_allclose(logprobs(leader["calls"]), logprobs(expected), rtol=0, atol=1e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["llama", "mixtral", "gemma3"])
def test_calls_of_every_kind_in_several_processes_give_what_one_gives(model, layout, few_programs):
    count, num_devices, (stages, shards) = LAYOUTS[layout]
    engine = {"pipeline_parallel_size": stages, "tensor_parallel_size": shards}
    with processes_of(count, num_devices, model, calls_of(model), engine=engine) as children:
        assert children.codes(*range(count), seconds=300) == [0] * count, children.err(0)
        found = found_by(children)
    expected, served = alone(model)
    assert_equal_to_one_process(found, expected)
    assert texts(found[0]["serves"]) == texts(served) == texts(expected)
    assert found[0]["kv_pages_used"] == 0


@pytest.mark.matrix
def test_tasks_of_process_0_get_what_one_process_gives_while_the_others_follow(few_programs):
    calls = calls_of("llama")[:1]
    with processes_of(2, 1, "llama", calls, engine={"tensor_parallel_size": 2}, has_tasks=True) as children:
        assert children.codes(0, 1, seconds=200) == [0, 0], children.err(0)
        found = found_by(children)[0]["tasks"]
    expected, _ = alone("llama")
    assert texts(found) == texts(expected[: len(found)]) and len(found) == len(calls[0]["prompts"])


REPLICAS = {  # processes, devices of each, stages x shards, replicas
    "2 processes, a replica each": (2, 1, (1, 1), 2),
    "2 processes of 2 devices, two replicas each": (2, 2, (1, 1), 4),
    "2 processes of 2 devices, a replica of two shards each": (2, 2, (1, 2), 2),
    "4 processes, replicas of two stages": (4, 1, (2, 1), 2),
    "3 processes of 2 devices, replicas of three stages": (3, 2, (3, 1), 2),
}


@pytest.mark.matrix
@pytest.mark.parametrize("layout", REPLICAS)
@pytest.mark.parametrize("fields", [{}, {"draft_model": "a checkpoint", "num_draft_tokens": 3}], ids=["", "drafts"])
def test_replicas_over_several_processes_give_what_one_process_gives(layout, fields, few_programs):
    count, num_devices, (stages, shards), replicas = REPLICAS[layout]
    engine = {"pipeline_parallel_size": stages, "tensor_parallel_size": shards, "data_parallel_size": replicas}
    engine |= {"num_kv_pages": None, "gpu_memory_utilization": 0.1} | fields
    if fields:
        engine["draft_model"] = str(load_golden("mesh/llama").path)
    with processes_of(count, num_devices, "llama", calls_of("llama"), engine=engine) as children:
        assert children.codes(*range(count), seconds=300) == [0] * count, children.err(0)
        found = found_by(children)
    expected, served = alone("llama")
    assert_equal_to_one_process(found, expected)
    assert texts(found[0]["serves"]) == texts(served)
    assert found[0]["kv_pages_used"] == 0
    assert all(num_steps > 0 for num_steps in found[0]["steps_of_replicas"])


@pytest.mark.matrix
@pytest.mark.parametrize("draft_model", ["prompt-lookup", "a checkpoint"])
@pytest.mark.parametrize("layout", ["2 processes, shards", "2 processes of 2 devices, stages"])
def test_drafts_in_several_processes_give_what_one_process_gives_without(layout, draft_model, few_programs):
    count, num_devices, (stages, shards) = LAYOUTS[layout]
    if draft_model != "prompt-lookup":
        draft_model = str(load_golden("mesh/llama").path)  # the model itself, which is always right
    drafts = {"draft_model": draft_model, "num_draft_tokens": 3}
    engine = {"pipeline_parallel_size": stages, "tensor_parallel_size": shards} | drafts
    with processes_of(count, num_devices, "llama", calls_of("llama"), engine=engine) as children:
        assert children.codes(*range(count), seconds=300) == [0] * count, children.err(0)
        found = found_by(children)
    expected, served = alone("llama")
    assert_equal_to_one_process(found, expected)
    assert texts(found[0]["serves"]) == texts(served)


SIZES = {"tensor_parallel_size": 2}
DIFFERENT = {
    "settings": (
        {"engine": BASE | SIZES | {"page_size": 16}},
        "page_size must be the same on all processes: process 1 has 16, process 0 has 8",
    ),
    "checkpoint": (
        {"model": str(load_golden("mesh/gemma3").path)},
        "the checkpoint's fingerprint must be the same on all processes: process 0 has ",
    ),
    "no checkpoint": ({"model": "no/such/folder/here"}, "FileNotFoundError"),
}


@pytest.mark.matrix
@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_make_different_llms_all_end_with_the_reason(what):
    last, message = DIFFERENT[what]
    with processes_of(2, 1, "llama", [], engine=SIZES, last=last) as children:
        codes = children.codes(0, 1, seconds=60)
        assert all(codes), codes
        for number in (0, 1):
            (line,) = [line for line in children.err(number).splitlines() if line.startswith("jaxinfer: process ")]
            assert "failed" in line
            assert message in children.err(number)


@pytest.mark.matrix
def test_thousand_random_requests_leave_nothing_behind(few_programs):
    with processes_of(2, 1, "llama", [], engine={"tensor_parallel_size": 2}, num_random=1000) as children:
        assert children.codes(0, 1, seconds=900) == [0, 0], [children.err(0), children.err(1)]
        found = found_by(children)[0]
    (threads, files, memory), (threads_then, files_then, memory_then) = found["held"].values()
    print(f"threads {threads} -> {threads_then}, files {files} -> {files_then}, KiB {memory} -> {memory_then}")
    assert threads_then <= threads and files_then <= files
    assert memory_then < memory + 50_000
    assert found["kv_pages_used"] == 0


def break_down(children: Children, who: int, what: str) -> None:
    """Waits until all processes generate, and sends one a signal, unless it breaks down by itself then."""
    children.wait_for("generates", seconds=100)
    if what.startswith("SIG"):
        children.processes[who].send_signal(getattr(signal, what))


def test_two_processes_give_what_one_gives_and_end_when_one_is_killed(few_programs):
    calls = calls_of("llama")[:1]
    params = [entry | {"max_tokens": 6} for entry in calls[0]["params"][:2]]
    calls[0] |= {"prompts": calls[0]["prompts"][:2], "params": params}
    with processes_of(2, 1, "llama", calls, engine={"tensor_parallel_size": 2}, fault=(1, "SIGKILL")) as children:
        break_down(children, 1, "SIGKILL")
        assert children.codes(0, seconds=15) == [EXIT_LOST], children.err(0)
        assert "jaxinfer: process 1 of 2 was lost: " in children.err(0)
        found = found_by(children)
    with on_mesh("llama", (1, 1), tokenizer="byte") as llm:
        assert_equal_to_one_process(found, run_calls(llm, calls))


FAULTS = {  # what the survivors say, and the seconds until it can be noticed
    "SIGKILL": ("process {} of 2 was lost: ", 0),
    "SIGSTOP": ("process {} of 2 was lost: nothing was heard of it for 3 s", 3),
    "raise": ("process {} of 2 failed: ArithmeticError: bad luck", 0),
    "stuck": ("process {} of 2 is stuck: a step did not end within 4 s", 4),
}


@pytest.mark.matrix
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("size", ["tensor_parallel_size", "data_parallel_size"])
def test_process_that_breaks_down_ends_the_others_within_15_seconds(size, what, who, few_programs):
    message, notice = FAULTS[what]
    settings = {"fault": (who, what), "patience": {"silence": 3.0, "step": 4.0}}
    with processes_of(2, 1, "llama", [], engine={size: 2}, **settings) as children:
        break_down(children, who, what)
        began = time.monotonic()
        (code,) = children.codes(1 - who, seconds=notice + 15)
        print(f"{size}, {what} of process {who}: the other ended with {code} after {time.monotonic() - began:.1f} s")
        assert code and message.format(who) in children.err(1 - who)


@pytest.mark.matrix
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("size", ["tensor_parallel_size", "data_parallel_size"])
def test_sigterm_of_any_process_ends_all_with_code_0(size, who, few_programs):
    with processes_of(2, 1, "llama", [], engine={size: 2}, fault=(who, "SIGTERM")) as children:
        break_down(children, who, "SIGTERM")
        began = time.monotonic()
        assert children.codes(0, 1, seconds=60) == [0, 0], [children.err(0), children.err(1)]
        print(f"{size}, SIGTERM of process {who}: all ended with 0 after {time.monotonic() - began:.1f} s")
        assert "Traceback" not in children.err(0) + children.err(1)
