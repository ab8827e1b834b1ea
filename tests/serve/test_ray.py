"""Batches and a deployment on a Ray of this machine give the answers of one LLM. Needs the extra [ray]."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from batch_lines import requests, write
from conftest import load_golden
from mesh_tools import BASE, on_mesh
from processes import TESTS, Children
from test_readme import ALL_PYTHON, PYTHON

from jaxinfer import SamplingParams
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.errors import EngineClosedError
from jaxinfer.serve.batch import plan_batch, run_batch

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore")]  # Ray and what it uses warn of themselves
ray = pytest.importorskip("ray", reason="needs the extra [ray]")
MODEL = str(load_golden("mesh/llama").path)
NUM_LINES = 400


@pytest.fixture(scope="module")
def cluster():
    paths = f"{TESTS}:{TESTS.parent}"
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", requests(NUM_LINES))


@pytest.fixture
def expected(source, tmp_path):
    with on_mesh("llama", (1, 1), tokenizer="byte") as llm:
        run_batch(llm, plan_batch(source, tmp_path / "alone.jsonl"))
    return sorted((tmp_path / "alone.jsonl").read_text().splitlines())


def actors() -> list[int]:
    """The processes of this machine in which Ray runs an LLM."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::MapWorker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def test_batch_over_two_llms_of_which_one_is_killed_equals_that_of_one(cluster, source, expected, tmp_path):
    from jaxinfer.ray import run_batch as run_batch_on_ray

    answered = threading.Event()
    killed = []

    def kill_one() -> None:
        answered.wait()
        killed.extend(actors()[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    target = tmp_path / "out.jsonl"
    plan = plan_batch(source, target)
    assert run_batch_on_ray(plan, MODEL, tokenizer="byte", num_llms=2, on_answer=answered.set, **BASE) == 0
    killer.join()
    assert killed
    assert sorted(target.read_text().splitlines()) == expected


def test_batch_whose_model_no_actor_finds_is_an_error_with_its_name(cluster, source, tmp_path):
    from jaxinfer.ray import run_batch as run_batch_on_ray

    plan = plan_batch(source, tmp_path / "out.jsonl")
    with pytest.raises(EngineClosedError, match="FileNotFoundError: no such checkpoint directory: /no/such"):
        run_batch_on_ray(plan, "/no/such")


def test_batch_command_on_ray_is_resumed(source, expected, tmp_path):
    flags = [word for name, value in BASE.items() for word in (f"--{name}".replace("_", "-"), value)]
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "jaxinfer", "batch", source, target, "--ray", 1, *flags]
    command += ["--model", MODEL, "--tokenizer", "byte"]
    with Children(command, PYTHONPATH=str(TESTS.parent)) as children:
        deadline = time.monotonic() + 200
        while not target.exists() or target.read_bytes().count(b"\n") < NUM_LINES // 4:
            assert time.monotonic() < deadline and children.processes[0].poll() is None, children.err(0)
            time.sleep(0.01)
    with Children(command, PYTHONPATH=str(TESTS.parent)) as children:
        assert children.codes(0, seconds=200) == [0], children.err(0)
        assert "answered already" in children.err(0) and " 0 answered already" not in children.err(0)
    assert sorted(target.read_text().splitlines()) == expected


def test_serve_file_names_what_there_is(cluster):
    from ray.serve.schema import ServeDeploySchema

    from jaxinfer import ray as jaxinfer_ray

    file = TESTS.parent / "configs" / "deploy" / "ray-serve.yaml"
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications
    package, name = application.import_path.split(":")
    assert package == jaxinfer_ray.__name__ and callable(getattr(jaxinfer_ray, name))
    (deployment,) = application.deployments
    assert deployment.name == jaxinfer_ray.LLMServer.name
    settings = {name: value for name, value in application.args.items() if name not in ("model", "tokenizer")}
    EngineConfig(**settings)


def post(path: str, body: object) -> tuple[int, dict]:
    request = urllib.request.Request(f"http://127.0.0.1:8000{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_server_answers_over_http_and_streams_through_its_handle(cluster, few_programs):
    from ray import serve

    from jaxinfer.ray import build_server

    handle = serve.run(build_server({"model": MODEL, "tokenizer": "byte", "warmup": False, **BASE}))
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3)
    body = {"model": "any", "prompt": "hello", "max_tokens": 8, "temperature": 1.0, "seed": 3}
    with on_mesh("llama", (1, 1), tokenizer="byte") as llm:
        expected = llm.generate("hello", params).outputs[0].text
    status, answer = post("/v1/completions", body)
    assert (status, answer["choices"][0]["text"]) == (200, expected)

    async def streamed():
        return [output async for output in handle.options(stream=True).generate.remote("hello", params)]

    outputs = asyncio.run(streamed())
    assert "".join(output.delta for output in outputs) == expected and outputs[-1].finished
    many = [handle.answer.remote("/v1/completions", body | {"seed": seed}) for seed in range(20)]
    assert many[3].result()["choices"][0]["text"] == expected

    assert post("/v1/embeddings", body)[0] == 404
    assert post("/v1/completions", [1])[0] == 400
    status, answer = post("/v1/completions", body | {"temperature": -1})
    assert status == 400 and "temperature must be >= 0" in answer["error"]["message"]
    status, answer = post("/v1/completions", body | {"stream": True})
    assert status == 400 and "stream must be False" in answer["error"]["message"]
    serve.shutdown()


def test_readme_python_runs(cluster, source, tmp_path, monkeypatch):
    from ray import serve

    (script,) = [script for script in ALL_PYTHON if script not in PYTHON]
    for there, here in {
        "path/or/hub-id": "demo",
        "requests/": str(source),
        "answers/": str(tmp_path / "answers"),
        "num_llms=8, max_num_seqs=128": "num_llms=1, max_num_seqs=8",
        '"num_gpus": 1': '"num_cpus": 1',
        "num_replicas=2": "num_replicas=1",
    }.items():
        assert there in script
        script = script.replace(there, here)
    exec(script, {})
    assert ray.data.read_parquet(str(tmp_path / "answers")).count() == NUM_LINES
    status, answer = post("/v1/completions", {"prompt": "In the beginning", "max_tokens": 8})
    assert status == 200 and answer["usage"]["completion_tokens"] == 8
    serve.shutdown()
