"""A batch that is interrupted and resumed gives the lines of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import sys
import time

import pytest
from batch_lines import requests, write
from conftest import load_golden
from mesh_tools import BASE, on_mesh
from processes import TESTS, Children

from jaxinfer.serve.batch import plan_batch, run_batch

MODEL = "llama"


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", requests(30))


@pytest.fixture
def llm(few_programs):
    with on_mesh(MODEL, (1, 1), tokenizer="byte") as llm:
        yield llm


class Killed(BaseException):
    pass


def test_batch_interrupted_and_resumed_gives_the_lines_of_an_undisturbed_one(llm, source, tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    counted = []
    assert run_batch(llm, plan_batch(source, whole), on_answer=lambda: counted.append(1)) == 0
    assert len(counted) == 30

    for number, lost in ((7, 30), (9, 0), (3, 1)):  # after so many answers; so many bytes of the last are lost
        left = [number]

        def stop(left=left):
            left[0] -= 1
            if not left[0]:
                raise Killed

        plan = plan_batch(source, torn)
        with pytest.raises(Killed):
            run_batch(llm, plan, on_answer=stop)
        with torn.open("rb+") as file:
            file.truncate(file.seek(0, 2) - lost)
    plan = plan_batch(source, torn)
    assert plan.num_left == 30 - (7 - 1) - 9 - (3 - 1)
    run_batch(llm, plan)
    assert sorted(torn.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    assert plan_batch(source, torn).num_left == 0
    answers = [json.loads(line) for line in whole.read_text().splitlines()]
    assert {answer["response"]["status_code"] for answer in answers} == {200}
    by_id = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    assert len(by_id) == 30 and len(by_id["request 4"]["choices"]) == 2
    assert all(by_id[f"request {number}"]["created"] == int(source.stat().st_mtime) for number in range(30))


def test_batch_answers_do_not_depend_on_the_other_lines(llm, source, tmp_path):
    alone = write(tmp_path / "alone.jsonl", list(requests(30))[7:8])
    os.utime(alone, (source.stat().st_mtime,) * 2)
    for path in (source, alone):
        run_batch(llm, plan_batch(path, path.with_suffix(".out")))
    (line,) = alone.with_suffix(".out").read_text().splitlines()
    assert line in source.with_suffix(".out").read_text().splitlines()


def test_batch_wrong_request_is_answered_with_its_error_and_the_others_go_on(llm, tmp_path):
    lines = list(requests(4))
    lines[0]["body"]["temperature"] = -1
    lines[1]["url"] = "/v1/embeddings"
    lines[2]["body"]["prompt"] = [999]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run_batch(llm, plan_batch(source, target)) == 3
    answers = {line["custom_id"]: line for line in map(json.loads, target.read_text().splitlines())}
    wrong = [answers[f"request {number}"] for number in range(3)]
    for answer, message in zip(
        wrong, ("temperature must be >= 0", "url must be", "prompt token 0 is 999"), strict=True
    ):
        assert answer["response"]["status_code"] == 400
        assert message in answer["error"]["message"] == answer["response"]["body"]["error"]["message"]
    assert answers["request 3"]["error"] is None
    assert plan_batch(source, target).num_left == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (["", "[]"], r"line 2: expected an object, got \[\]"),
        (['{"url": "/v1/completions", "body": {}}'], "line 1: custom_id must be a text, got None"),
        (['{"custom_id": "a", "body": {}}'], "line 1: url must be"),
        (['{"custom_id": "a", "url": "/v1/completions", "body": 3}'], "line 1: body must be an object, got 3"),
        (['{"custom_id": "a", "url": "x", "method": "GET", "body": {}}'], "method must be POST, got 'GET'"),
        (['{"custom_id": "a", "url": "x", "body": {}}'] * 2, "line 2 has the custom_id of line 1"),
    ],
)
def test_plan_batch_broken_requests_are_named_before_anything_runs(tmp_path, lines, message):
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        plan_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not an answer\n", "line 1 is not JSON"),
        ('{"custom_id": "request 1"}\n', "line 1 is no answer of a batch"),
        ('{"custom_id": "other", "response": {}}\n', "line 1 answers none of the requests"),
    ],
)
def test_plan_batch_file_of_something_else_is_not_written_to(source, tmp_path, text, message):
    target = tmp_path / "out.jsonl"
    target.write_text(text)
    with pytest.raises(ValueError, match=message):
        plan_batch(source, target)
    assert target.read_text() == text


def test_plan_batch_torn_line_without_any_break_leaves_an_empty_file(source, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text('{"id": "batch_req_1", "custom')
    assert plan_batch(source, target).num_left == 30
    assert target.read_text() == ""


def test_plan_batch_answers_into_the_requests_are_refused(source):
    with pytest.raises(ValueError, match="the answers cannot go into the file of the requests"):
        plan_batch(source, source)


@pytest.mark.matrix
def test_batch_of_10000_lines_killed_three_times_equals_an_undisturbed_one(tmp_path):
    source = write(tmp_path / "in.jsonl", requests(10_000))
    flags = [word for name, value in BASE.items() for word in (f"--{name}".replace("_", "-"), value)]
    flags += ["--model", load_golden(f"mesh/{MODEL}").path, "--tokenizer", "byte"]

    def run(target, *, killed_at=None):
        command = [sys.executable, "-m", "jaxinfer", "batch", source, target, *flags]
        with Children(command, PYTHONPATH=str(TESTS.parent)) as children:
            if killed_at is None:
                assert children.codes(0, seconds=500) == [0], children.err(0)
                return
            deadline = time.monotonic() + 300
            while not target.exists() or target.read_bytes().count(b"\n") < killed_at:
                assert time.monotonic() < deadline and children.processes[0].poll() is None, children.err(0)
                time.sleep(0.01)

    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    run(whole)
    for killed_at in sorted(random.Random(0).sample(range(100, 9900), 3)):
        run(torn, killed_at=killed_at)
    run(torn)
    assert sorted(torn.read_text().splitlines()) == sorted(whole.read_text().splitlines())
