"""Keys, limits, health, metrics and what a server says of itself."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import shutil
import ssl
import subprocess
import threading
import time

import httpx
import pytest
from held_steps import few_steps
from prometheus_client.parser import text_string_to_metric_families
from served_demo import served_demo
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from jaxinfer.serve import ServeConfig, app

COMPLETION = {"model": "demo", "prompt": "In the beginning", "max_tokens": 3}


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served[1].url, timeout=60) as http:
        yield http


def metrics(http) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        (sample.name, sample.labels.get("finished_reason", "")): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels and "route" not in sample.labels
    }


def test_health_and_ready(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.head("/health").status_code == 200
    assert http.post("/health").status_code == 405 and "GET" in http.post("/health").headers["allow"]


def test_metrics_count_requests_under_both_names(http):
    before = metrics(http)
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
    with http.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as answer:
        answer.read()
    key = ("vllm:request_success_total", "length")
    while (after := metrics(http))[key] - before.get(key, 0.0) < 2:  # a request counts once its answer is sent
        time.sleep(0.01)
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    for prefix in ("jaxinfer_", "vllm:"):
        assert grown[f"{prefix}generation_tokens_total", ""] == 6
        assert grown[f"{prefix}time_to_first_token_seconds_count", ""] == 2
        assert after[f"{prefix}num_requests_running", ""] == 0
    assert grown[key] == 2
    assert grown["vllm:e2e_request_latency_seconds_count", ""] == 2
    assert grown["jaxinfer_inter_token_latency_seconds_count", ""] >= 1
    assert after["jaxinfer_slots", ""] == 8 and after["jaxinfer_kv_pages", ""] == 128


@contextlib.contextmanager
def access_log():
    """Takes the next line of the access log."""
    lines = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(lines)
    logger = logging.getLogger("jaxinfer.access")
    logger.addHandler(handler)
    yield lambda: json.loads(lines.get(timeout=10).message)
    logger.removeHandler(handler)


def test_access_log_has_a_line_of_json_for_each_request(http):
    with access_log() as next_line:
        http.post("/v1/completions", json=COMPLETION)
        http.post("/v1/completions", json={})
        http.get("/v1/models"), http.get("/health"), http.get("/ready"), http.get("/metrics"), http.get("/nothing")
        good, bad, models, nothing = (next_line() for _ in range(4))
    assert good["status"] == 200 and good["generation_tokens"] == 3 and good["finish_reasons"] == ["length"]
    assert bad["status"] == 400 and "model must be given" in bad["error"]
    assert (models["path"], models["method"], models["status"]) == ("/v1/models", "GET", 200)
    assert (nothing["path"], nothing["status"], nothing["error"]) == ("/nothing", 404, "not_found")


@pytest.mark.parametrize(("proxies", "client"), [(None, "127.0.0.1"), (["127.0.0.1"], "203.0.113.9")])
def test_address_behind_a_proxy_is_believed_if_the_proxy_is_trusted(served, proxies, client):
    server = served[0].serve(served_model_name=["demo"], port=0, warmup=False, access_log=True, trusted_proxies=proxies)
    headers = {"x-forwarded-for": "203.0.113.9"}
    with access_log() as next_line, server, httpx.Client(base_url=server.url, headers=headers) as http:
        http.post("/v1/completions", json=COMPLETION)
        assert next_line()["client"] == client


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/", 405)]
)
def test_what_is_not_there_is_said_in_json(http, method, path, status):
    answer = http.request(method, path)
    assert answer.status_code == status and path in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "must be JSON"),
        (b"[]", "must be an object"),
        (b"\xff", "must be JSON"),
        (b"[" * 100_000, "JSON|recursion"),
    ],
)
def test_malformed_bodies_are_refused(http, body, message):
    answer = http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert any(part in answer.json()["error"]["message"] for part in message.split("|"))


@pytest.mark.parametrize("origin", ["http://elsewhere.example", "null", "http://["])
def test_pages_of_other_origins_are_refused(http, origin):
    answer = http.post("/v1/completions", json=COMPLETION, headers={"origin": origin})
    assert answer.status_code == 403 and "cors_origins" in answer.json()["error"]["message"]
    assert http.get("/v1/models", headers={"origin": "http://[::1"}).status_code == 403
    own = str(http.base_url).rstrip("/")
    assert http.post("/v1/completions", json=COMPLETION, headers={"origin": own}).status_code == 200


def test_names_that_lead_to_this_machine_by_chance_are_refused(http, served):
    port = served[1].url.rpartition(":")[2]
    for name, status in (("evil.example", 421), ("localhost", 200), ("127.0.0.1", 200), ("[::1]", 200)):
        assert http.get("/v1/models", headers={"host": f"{name}:{port}"}).status_code == status
    with served[0].serve(port=0, warmup=False, allowed_hosts=["llm.example"]) as server:
        assert httpx.get(f"{server.url}/v1/models", headers={"host": "llm.example"}).status_code == 200


def test_requests_of_many_samples_are_refused_for_good(http):
    answer = http.post("/v1/completions", json=COMPLETION | {"prompt": ["x"] * 200, "n": 10})
    assert answer.status_code == 400 and "at a time" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def guarded():
    """A server with keys, narrow limits and a friend on another origin."""
    settings = {
        "api_key": ["secret", "other"],
        "cors_origins": ["http://friend.example"],
        "max_body_bytes": 2000,
        "max_prompts": 2,
        "max_n": 2,
        "max_output_tokens": 5,
        "max_stop": 1,
        "max_grammar_bytes": 50,
        "max_waiting": 0,
        "max_per_client": 2,
        "served_model_name": ["alias", "other-name"],
    }
    with served_demo(**settings) as (llm, server), httpx.Client(base_url=server.url, timeout=60) as http:
        yield llm, http


KEY = {"authorization": "Bearer secret"}
ROUTES = [
    ("GET", "/"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/tokenize"),
    ("PUT", "/api"),
    ("POST", "/completions"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/health/../v1/models"),
    ("GET", "/nothing"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}])
def test_every_route_but_health_needs_a_key(guarded, method, path, headers):
    answer = guarded[1].request(method, path, headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_refused_requests_are_counted(guarded):
    _, http = guarded
    http.get("/v1/models")
    assert 'route="refused",status="401"' in http.get("/metrics", headers=KEY).text


def test_keys_are_taken_in_both_headers(guarded):
    _, http = guarded
    assert http.get("/health").status_code == 200
    for headers in (KEY, {"x-api-key": "other"}, {"authorization": "bearer other"}):
        assert http.get("/v1/models", headers=headers).status_code == 200
    page = http.get("/", headers={"accept": "text/html"})
    assert page.status_code == 401 and "API key" in page.text
    anthropics = http.post("/v1/messages", headers={"anthropic-version": "2023-06-01"}).json()
    assert anthropics["error"]["type"] == "authentication_error"


def test_friendly_origins_may_ask(guarded):
    _, http = guarded
    origin = {"origin": "http://friend.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    missing = http.get("/nothing", headers=KEY | origin)
    assert missing.status_code == 404 and missing.headers["access-control-allow-origin"] == "http://friend.example"
    preflight = http.options("/v1/completions", headers=origin | asked)
    assert preflight.status_code == 200
    answer = http.get("/v1/models", headers=KEY | origin)
    assert answer.headers["access-control-allow-origin"] == "http://friend.example"
    assert [model["id"] for model in answer.json()["data"]] == ["alias", "other-name"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"prompt": "x" * 3000}, 413, "at most 2000 bytes"),
        ({"prompt": ["a", "b", "c"]}, 400, "prompt must be at most 2 (the server's max_prompts), got 3"),
        ({"n": 3}, 400, "n must be at most 2"),
        ({"max_tokens": 6}, 400, "max_tokens must be at most 5 (the server's max_output_tokens)"),
        ({"stop": ["a", "b"]}, 400, "stop must be at most 1"),
        ({"bad_words": ["a", "b"]}, 400, "bad_words must be at most 1"),
        ({"stop": "a" * 300}, 400, "stop and bad_words must be at most 256"),
        ({"structured_outputs": {"regex": "a" * 60}}, 400, "structured_outputs must be at most 50"),
        ({"n": -1}, 400, "n must be >= 1"),
        ({"max_tokens": -1}, 400, "max_tokens must be >= 0"),
        ({"model": "demo"}, 404, "this server has alias, other-name"),
    ],
)
def test_limits_are_named(guarded, fields, status, message):
    answer = guarded[1].post("/v1/completions", json={"model": "alias", "prompt": "x"} | fields, headers=KEY)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_chat_without_a_limit_ends_at_the_servers(guarded):
    body = {"model": "alias", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
    answer = guarded[1].post("/v1/chat/completions", json=body, headers=KEY).json()
    assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "length"


def test_full_server_and_busy_client_are_told_to_come_back(guarded):
    llm, http = guarded
    body = {"model": "alias", "prompt": ["x", "y"], "n": 2, "max_tokens": 5, "ignore_eos": True}
    answers = []

    def post(key):
        answers.append(http.post("/v1/completions", json=body, headers={"x-api-key": key}))

    with few_steps(llm, 0):
        threads = [threading.Thread(target=post, args=[key]) for key in ("secret", "secret")]
        for thread in threads:
            thread.start()
        while llm.stats().num_requests_waiting + llm.stats().num_requests_running < 8:
            time.sleep(0.01)
        busy = http.post("/v1/completions", json=body, headers=KEY)
        full = http.post("/v1/completions", json=body, headers={"x-api-key": "other"})
    for thread in threads:
        thread.join()
    assert busy.status_code == 429 and busy.headers["retry-after"] == "1"
    assert full.status_code == 503 and full.headers["retry-after"] == "1"
    assert full.json()["error"]["code"] == "server_full"
    assert [answer.status_code for answer in answers] == [200, 200]


def test_app_can_be_mounted_in_another(served):
    llm, _ = served
    outer = Starlette(routes=[Mount("/llm", app=app(llm, warmup=False))])
    with TestClient(outer) as client:
        assert client.get("/llm/health").json() == {"status": "ok"}
        answer = client.post("/llm/v1/completions", json=COMPLETION | {"seed": 1, "temperature": 1})
        again = client.post("/llm/v1/completions", json=COMPLETION | {"seed": 1, "temperature": 1})
        assert answer.json()["choices"] == again.json()["choices"]
    with pytest.raises(TypeError, match="did you mean 'max_waiting'"):
        app(llm, max_waitng=3)
    with pytest.raises(TypeError, match="either config or settings"):
        app(llm, ServeConfig(), port=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70000}, "port must be in 0..65535"),
        ({"max_waiting": -1}, "max_waiting must be >= 0"),
        ({"api_key": [""]}, "api_key must be a sequence of at least one text"),
        ({"ssl_certfile": "x"}, "ssl_certfile and ssl_keyfile are given together"),
        ({"root_path": "llm"}, "root_path must be empty or a path"),
        ({"drain_timeout": -1}, "drain_timeout must be >= 0"),
        ({"keep_alive": 0}, "keep_alive must be > 0"),
        ({"max_per_client": 0}, "max_per_client must be >= 1"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ServeConfig(**fields)


def test_wrong_certificate_is_an_error_of_the_call(served, tmp_path):
    (tmp_path / "x.pem").write_text("nothing")
    files = dict.fromkeys(("ssl_certfile", "ssl_keyfile"), str(tmp_path / "x.pem"))
    with pytest.raises(ssl.SSLError):
        served[0].serve(port=0, warmup=False, **files)


def test_settings_do_not_show_keys():
    assert "secret" not in repr(ServeConfig(api_key=["secret"]))


def test_llm_serves_itself_in_the_background(served):
    llm, _ = served
    with llm.serve(port=0, warmup=False) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.url in repr(server) and server.url in server._repr_html_()
        again = llm.serve(port=0, warmup=False)  # replaces the first
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        body = {"model": "demo", "prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{again.url}/v1/completions", json=body).status_code == 200
        again.close()
    with pytest.raises(TypeError, match="did you mean 'port'"):
        llm.serve(prt=1)


def test_server_behind_a_path_and_with_a_certificate(served, tmp_path):
    llm, _ = served
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    subprocess.run([*command, "-days", "1", "-subj", "/CN=localhost"], check=True, capture_output=True)
    files = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with llm.serve(port=0, warmup=False, root_path="/llm", **files) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        context.check_hostname = False
        with httpx.Client(base_url=server.url, verify=context) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "demo"
            assert http.get("/health").status_code == 200 and "jaxinfer" in http.get("/").text
