"""Clients that leave, stall or send nonsense, and servers that are told to stop, harm nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
from held_steps import few_steps
from processes import simulating
from served_demo import ENGINE, served_demo

from jaxinfer import LLM, SamplingParams
from jaxinfer.serve.interfaces.text import TextExchange

LONG = {"model": "demo", "prompt": "In the beginning", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
SHORT = LONG | {"max_tokens": 4}


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served[1].url, timeout=60) as http:
        yield http


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def is_idle(llm):
    stats = llm.stats()
    return stats.num_requests_running == stats.num_requests_waiting == stats.kv_pages_used == 0


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_pages_although_the_request_had_much_to_say(served, stream):
    llm, server = served
    wait_until(lambda: is_idle(llm))
    with few_steps(llm), connected(server) as connection:
        send_request(connection, LONG | {"stream": stream})
        wait_until(lambda: llm.stats().num_requests_running == 1)
        connection.close()
        wait_until(lambda: is_idle(llm))


@contextlib.contextmanager
def connected(server):
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        yield connection


def send_request(connection, body, *, cut=None):
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    connection.sendall((head + content)[:cut])


@pytest.mark.parametrize("pieces", [1, 2])
def test_offer_of_another_protocol_does_not_lose_the_body(served, pieces):
    """Java's clients send such a head with every request."""
    content = json.dumps(SHORT).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    head += b"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\nContent-Length: %d\r\n\r\n" % len(content)
    with connected(served[1]) as connection:
        for piece in [head + content] if pieces == 1 else [head[:50], head[50:] + content[:9], content[9:]]:
            connection.sendall(piece)
            time.sleep(0.05)
        assert b"200 OK" in connection.recv(10_000)


def test_endless_head_is_refused(served):
    with connected(served[1]) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x: " + b"y" * 10_000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"431" in connection.recv(1000)


def test_prompt_that_fails_ends_the_others_of_its_request(served, http):
    llm, _ = served

    def broken(event):
        raise OverflowError("a token that breaks")

    with few_steps(llm):
        controller = llm._runner._controller
        submit, seen = controller.submit, []

        def submit_broken(submission):
            answer = submit(submission)
            seen.append(answer)
            if len(seen) == 2:
                answer.push = lambda index, event: broken(event)
            return answer

        controller.submit = submit_broken
        try:
            answer = http.post("/v1/completions", json=LONG | {"prompt": ["a", "b", "c"]})
        finally:
            del controller.submit
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "request_failed"
        wait_until(lambda: is_idle(llm))


def test_a_mob_of_clients_leaves_exact_answers_and_nothing_else(served):
    """A third of the clients leaves at random, some send nonsense or half a request; the others get their texts."""
    llm, server = served
    rng = random.Random(1)
    prompts = {number: f"And {number} " for number in range(12)}
    expected = {
        number: llm.generate(prompt, SamplingParams(temperature=0.8, seed=number, max_tokens=12), use_tqdm=False).text
        for number, prompt in prompts.items()
    }

    async def client(http, number):
        await asyncio.sleep(rng.random())
        body = {
            "model": "demo",
            "prompt": prompts[number % 12],
            "seed": number % 12,
            "temperature": 0.8,
            "max_tokens": 12,
        }
        body |= {"top_k": 0, "top_p": 1.0}
        kind = rng.choice(["stays", "stays", "stays", "streams", "streams", "leaves", "leaves", "leaves", "nonsense"])
        if kind == "nonsense":
            wrong = rng.choice([{"structured_outputs": {"regex": "("}}, {"temperature": "hot"}, {"prompt": None}])
            answer = await http.post("/v1/completions", json=body | wrong)
            return answer.status_code == 400
        if kind == "leaves":
            with contextlib.suppress(httpx.TimeoutException):
                long = body | {"max_tokens": 300, "ignore_eos": True, "stream": rng.random() < 0.5}
                await http.post("/v1/completions", json=long, timeout=0.05 + 0.3 * rng.random())
            return True
        if kind == "streams":
            text = ""
            async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
            return text == expected[number % 12]
        answer = await http.post("/v1/completions", json=body)
        return answer.json()["choices"][0]["text"] == expected[number % 12]

    async def mob():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            return await asyncio.gather(*(client(http, number) for number in range(200)))

    with connected(server) as half, connected(server) as headless:
        send_request(half, SHORT, cut=-10)
        send_request(headless, SHORT, cut=30)
        assert all(asyncio.run(mob()))
    wait_until(lambda: is_idle(llm))
    # A request that is cut short is noticed after its connection has been closed here.
    wait_until(lambda: not server.num_requests)


def test_slow_reader_holds_neither_the_engine_nor_other_clients(served, http):
    llm, server = served
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        address = urlsplit(server.url)
        slow.connect((address.hostname, address.port))
        send_request(slow, LONG | {"stream": True, "n": 8, "logprobs": 20})
        wait_until(lambda: llm.stats().num_requests_running == 8)
        assert http.post("/v1/completions", json=SHORT).status_code == 200
        wait_until(lambda: is_idle(llm))  # the engine is done, although nobody has read
        assert server.num_requests == 1  # the answer is larger than the system's buffers
    wait_until(lambda: not server.num_requests)


def test_clients_that_stall_are_given_up_and_idle_streams_hear_comments():
    with served_demo(stall_timeout=0.6, keep_alive=0.2) as (llm, server):
        with connected(server) as headless, connected(server) as half, connected(server) as silent:
            send_request(headless, SHORT, cut=30)
            send_request(half, SHORT, cut=-10)
            assert silent.recv(100) == headless.recv(100) == b""  # closed
            assert b"408" in half.recv(10_000)
        with few_steps(llm, 0), connected(server) as waiting:
            send_request(waiting, SHORT | {"stream": True})
            answer = b""
            while answer.count(b": keep-alive") < 2:
                answer += waiting.recv(10_000)
        assert b"200 OK" in answer
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            address = urlsplit(server.url)
            deaf.connect((address.hostname, address.port))
            send_request(deaf, LONG | {"stream": True, "n": 8, "logprobs": 20})
            wait_until(lambda: server.num_requests == 1)
            wait_until(lambda: not server.num_requests, seconds=30)
        wait_until(lambda: is_idle(llm))


def test_half_a_request_at_the_end_is_told_that_the_server_stops():
    with served_demo(stall_timeout=60) as (_, server), connected(server) as half:
        send_request(half, SHORT, cut=-10)
        wait_until(lambda: server.num_requests == 1)
        server.close(drain_timeout=0.2)
        answer = half.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 503") and b"server_stopped" in answer


def test_making_an_answer_does_not_hold_the_loop(served, http, monkeypatch):
    """The answer, which may be large, is not made before a stream has ended, which takes the loop."""
    others = threading.Event()
    make = TextExchange.answer

    def answer(self, outputs):
        assert others.wait(60)
        return make(self, outputs)

    monkeypatch.setattr(TextExchange, "answer", answer)
    with connected(served[1]) as connection:
        send_request(connection, SHORT)
        wait_until(lambda: served[1].num_requests == 1)
        assert "[DONE]" in http.post("/v1/completions", json=SHORT | {"stream": True}).text
        others.set()
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")


def test_closing_lets_requests_end_and_ends_the_rest_with_an_error():
    with served_demo(drain_timeout=0.5) as (llm, server):
        with few_steps(llm, 0), connected(server) as connection, connected(server) as streaming:
            send_request(connection, SHORT)
            send_request(streaming, SHORT | {"stream": True})
            wait_until(lambda: llm.stats().num_requests_waiting == 2)
            closing = threading.Thread(target=server.close)
            closing.start()
            wait_until(lambda: refused(server))
            answers = [read_all(connection), read_all(streaming)]
            closing.join()
        assert all(b"503" in answer and b"server_stopped" in answer for answer in answers)
        assert is_idle(llm) or llm.stats().num_requests_running == 0


def read_all(connection):
    return b"".join(iter(lambda: connection.recv(10_000), b""))


def refused(server):
    try:
        with connected(server):
            return False
    except ConnectionRefusedError:
        return True


@contextlib.contextmanager
def command(*flags, before=()):
    arguments = [sys.executable, "-m", "jaxinfer", *before, "serve", "--port", "0", "--no-warmup", *flags]
    arguments += [part for name, value in ENGINE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": simulating(1)}
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
    lines = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr])
    reader.start()
    try:
        while not (line := lines.get(timeout=60)).startswith("serving"):
            pass
        url = line.split()[-1]
        yield process, url
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def streamed(url, body, lines, *, timeout=60):
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=timeout) as answer:
        lines += (line for line in answer.iter_lines() if line.startswith("data: "))


def test_sigterm_under_load_completes_what_runs_and_exits_with_zero():
    expected = None
    with LLM("demo", **ENGINE) as llm:
        expected = llm.generate("In the beginning", SamplingParams(temperature=0, max_tokens=160, ignore_eos=True)).text
    with command("--drain-timeout", "120") as (process, url):
        streams = [[] for _ in range(4)]
        threads = [
            threading.Thread(target=streamed, args=[url, LONG | {"max_tokens": 160}, lines]) for lines in streams
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(streams))
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(timeout=60) == 0
    for lines in streams:
        assert lines[-1] == "data: [DONE]"
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == expected


def test_server_of_two_processes_streams_and_ends_with_both():
    with command(
        "--tensor-parallel-size", "2", "--drain-timeout", "120", before=["launch", "--processes", "2", "--"]
    ) as (process, url):
        lines = []
        thread = threading.Thread(target=streamed, args=[url, LONG | {"max_tokens": 100}, lines])
        thread.start()
        wait_until(lambda: lines)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert process.wait(timeout=60) == 0
    assert lines[-1] == "data: [DONE]" and len(lines) > 2


def test_second_sigterm_ends_at_once():
    with command("--drain-timeout", "60") as (process, url):
        lines = []
        body = LONG | {"n": 8}

        def ask():
            with contextlib.suppress(httpx.HTTPError):
                streamed(url, body, lines)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=2) == 128 + signal.SIGTERM
        thread.join()


def test_taken_port_is_said_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = [sys.executable, "-m", "jaxinfer", "serve", "--port", port, "--model", "/nothing/there"]
        ended = subprocess.run(arguments, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in ended.stderr
