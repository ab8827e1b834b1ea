"""The recipes for a server in containers, and what watches over it, agree with the server."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from served_demo import served_demo
from test_readme import test_readme_commands_have_the_flags_they_show as check_command

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.stats import EngineStats
from jaxinfer.serve.config import KEY_VARIABLE, ServeConfig
from jaxinfer.serve.http import server
from jaxinfer.serve.http.metrics import Metrics
from jaxinfer.serve.http.open_requests import OpenRequests
from jaxinfer.wrappers.compilation_cache import cache_directory

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "configs" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
OBJECTS = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes-serve.yaml").read_text())}
DEPLOYMENT = OBJECTS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
JOBS = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]


def instruction(name: str) -> list[str]:
    """The words of the Dockerfile's only instruction of a name, which are in JSON, perhaps after options."""
    (found,) = re.findall(rf"^{name} [^\[\n]*(\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(found)


def environment() -> dict[str, str]:
    """The variables that the Dockerfile sets."""
    (found,) = re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)
    return dict(entry.split("=", 1) for entry in found.split())


ENTRYPOINT = instruction("ENTRYPOINT")
PROBES = {"docker": instruction("HEALTHCHECK"), "kubernetes": CONTAINER["readinessProbe"]["exec"]["command"]}


# Dockerfile


def test_image_starts_the_server_with_flags_that_exist():
    init, separator, *command = ENTRYPOINT
    assert (init, separator, command[:2]) == ("tini", "--", ["jaxinfer", "serve"])
    check_command(" ".join(command))


def test_image_is_built_from_files_that_its_ignore_file_lets_through():
    """The last pattern that matches decides, as for Docker."""
    patterns = [
        line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    sent = {"pyproject.toml": True, "README.md": True, "LICENSE": True, "jaxinfer": True}
    sent |= {"jaxinfer/__pycache__": False, ".git": False, "tests": False, ".env": False}
    for path, is_sent in sent.items():
        matching = [one for one in patterns if fnmatch.fnmatch(path, one.removeprefix("!"))]
        assert matching[-1].startswith("!") == is_sent, path
    copied = [
        file for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for file in line.split()
    ]
    assert set(copied) == {path for path, is_sent in sent.items() if is_sent}


def test_image_has_extras_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)[1].split(",")) == {"serve", "cuda12"}
    assert {"serve", "cuda12", "cuda13"} <= set(extras)


def test_image_keeps_compiled_programs_in_its_volume(monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", environment()["JAXINFER_CACHE_DIR"])
    (volume,) = re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)
    assert Path(volume) in cache_directory().parents
    assert volume in [mount["mountPath"] for mount in CONTAINER["volumeMounts"]]


def test_docker_waits_longer_than_the_server_drains():
    (seconds,) = re.findall(r"--stop-timeout (\d+)", DOCKERFILE)
    assert int(seconds) > ServeConfig().drain_timeout + server._SPARE_SECONDS


# Kubernetes


def flags() -> dict[str, str]:
    return {
        name.replace("-", "_"): value
        for name, value in (argument.removeprefix("--").split("=", 1) for argument in CONTAINER["args"])
    }


def test_pod_has_flags_that_exist():
    known = {entry.name for settings in (ServeConfig, EngineConfig) for entry in dataclasses.fields(settings)}
    assert set(flags()) <= known | {"model", "tokenizer"}
    check_command(" ".join(["jaxinfer", "serve", *CONTAINER["args"]]).replace("=", " "))


def test_pod_has_as_many_gpus_as_its_flags_ask_for():
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    config = EngineConfig(**{name: int(value) for name, value in flags().items() if name in sizes})
    num_devices = config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == num_devices


def test_pod_is_killed_only_after_the_server_has_drained():
    sleep, seconds = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    needed = float(seconds) + float(flags()["drain_timeout"]) + server._SPARE_SECONDS
    assert POD["terminationGracePeriodSeconds"] > needed


def test_rollout_lasts_at_least_as_long_as_a_pod_may_start():
    startup = CONTAINER["startupProbe"]
    assert DEPLOYMENT["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]


def test_manifest_refers_to_what_it_has():
    name = OBJECTS["Deployment"]["metadata"]["name"]
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    assert DEPLOYMENT["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert {one["metadata"]["name"] for one in OBJECTS.values()} == {name, f"{name}-cache"}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == set(volumes)
    claim = OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == claim
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == ServeConfig().port and f"EXPOSE {ServeConfig().port}\n" in DOCKERFILE
    (service_port,) = OBJECTS["Service"]["spec"]["ports"]
    probes = [CONTAINER[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe")]
    assert {service_port["targetPort"], *probes} == {port["name"]}
    (variable,) = CONTAINER["env"]
    assert variable["name"] == KEY_VARIABLE


def test_volume_for_compiled_programs_is_writable_by_the_image_user():
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert POD["securityContext"]["fsGroup"] == int(user[1])
    # Otherwise the group may write to programs of the pod before, and the server compiles them again.
    assert POD["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


# The probes, against a server


def run_probe(command: list[str], url: str, **variables: str) -> int:
    """Runs a probe as in the container, where the server has another port; a proxy must not be asked."""
    python, option, script = command
    assert (python, option) == ("python", "-c") and script.count(str(ServeConfig().port)) == 1
    script = script.replace(str(ServeConfig().port), url.rpartition(":")[2])
    clean = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    variables |= {"http_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, "-c", script], env=clean | variables, capture_output=True).returncode


@pytest.fixture(scope="module")
def guarded():
    with served_demo(api_key="secret") as (_, running):
        yield running


@pytest.mark.parametrize("name", PROBES)
def test_probe_of_a_server_without_a_key_succeeds(served, name):
    assert run_probe(PROBES[name], served[1].url) == 0


def test_probes_of_a_server_with_a_key(guarded):
    assert run_probe(PROBES["docker"], guarded.url) == 0
    assert run_probe(PROBES["kubernetes"], guarded.url, **{KEY_VARIABLE: "secret"}) == 0
    assert run_probe(PROBES["kubernetes"], guarded.url, **{KEY_VARIABLE: "wrong"}) == 1
    assert run_probe(PROBES["kubernetes"], guarded.url) == 1


def test_probe_of_a_server_that_compiles_fails_for_readiness_alone(guarded, monkeypatch):
    monkeypatch.setattr(guarded._application.warmup, "is_done", False)
    assert run_probe(PROBES["kubernetes"], guarded.url, **{KEY_VARIABLE: "secret"}) == 1
    assert run_probe(PROBES["docker"], guarded.url) == 0


@pytest.mark.parametrize("name", PROBES)
def test_probe_without_a_server_fails(name):
    with server.bound_socket(ServeConfig(port=0)) as bound:  # does not listen
        assert run_probe(PROBES[name], server.url_of(ServeConfig(port=0), bound)) == 1


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe"])
def test_path_of_probe_needs_no_key(guarded, probe):
    with urlopen(guarded.url + CONTAINER[probe]["httpGet"]["path"]) as answer:
        assert answer.status == 200


# Prometheus and Grafana


@pytest.fixture(scope="module")
def labels_of() -> dict[str, set[str]]:
    """Every name that the server's metrics have, with its labels."""
    stats = EngineStats(**dict.fromkeys((entry.name for entry in dataclasses.fields(EngineStats)), 0))
    llm = SimpleNamespace(stats=lambda: stats, config=EngineConfig())
    metrics = Metrics(llm, model_name="demo", open_requests=OpenRequests(ServeConfig(), num_running=1))
    metrics.count_sample("stop")
    metrics.count_answer("/v1/completions", 200)
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_dashboard_asks_for_metrics_and_labels_that_exist(labels_of, expression):
    names = re.findall(r"\bjaxinfer_\w+", expression)
    assert names and expression.count('{model_name=~"$model_name"}') == len(names)
    wanted = {"model_name", *re.findall(r"by \((\w+)\)", expression)}
    for name in names:
        assert wanted <= labels_of[name], name


def test_dashboard_shows_all_numbers_of_the_engine(labels_of):
    """Save those that another one tells: the usage of pages, and samples that ended, which are shown by reason."""
    ours = {name for name, labels in labels_of.items() if name.startswith("jaxinfer_") and "engine" in labels}
    shown = set(re.findall(r"\bjaxinfer_\w+", " ".join(EXPRESSIONS)))
    assert ours - shown == {"jaxinfer_kv_cache_usage", "jaxinfer_num_requests_finished_total"}


def test_dashboard_texts_name_labels_that_their_query_keeps():
    for target in (target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])):
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(re.findall(r"by \((\w+)\)", target["expr"]))


def test_dashboard_panels_have_ids_and_places_of_their_own():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )


def test_dashboard_variables_are_those_that_queries_use(labels_of):
    variables = {entry["name"]: entry for entry in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "model_name"}
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["model_name"]["definition"]).groups()
    assert label in labels_of[name]
    sources = [panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert set(sources) == {"${datasource}"}


def test_prometheus_finds_the_pods_and_brings_the_key():
    assert all(job["authorization"]["credentials_file"] for job in JOBS)
    (discovery,) = JOBS[1]["kubernetes_sd_configs"]
    (selector,) = discovery["selectors"]
    (label,) = DEPLOYMENT["template"]["metadata"]["labels"].items()
    assert selector["label"] == "=".join(label)
    assert JOBS[1]["relabel_configs"][0]["regex"] == CONTAINER["ports"][0]["name"]
