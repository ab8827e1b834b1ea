"""Batches: files with a request a line, answered into a file with an answer a line.

Owns: reading and checking the lines, what is done already, and keeping an LLM busy without holding all lines in memory.
Does not know: what the fields of a request mean (openai.py), the command line.

The lines are those of OpenAI's batch API. An answer depends on its line and the model alone: a request without a seed
gets one made of its custom_id, and "created" is the time of the input file. A batch that was interrupted and resumed
therefore gives the same lines as an undisturbed one, as far as rounding allows, in another order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxinfer.api.driver import Ticket
from jaxinfer.api.llm import LLM
from jaxinfer.errors import RequestFailedError
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.openai import CHAT, TEXT, ChatRequest, TextRequest, error_body, read_chat, read_text
from jaxinfer.text.preparation import Submission

_MAX_LINE = 1 << 26
"""Bytes of a line at most, so that a file of another kind is noticed before it fills the memory."""
Request = ChatRequest | TextRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """What there is to do.

    Args:
      source: the file of requests.
      target: the file of answers.
      num_lines: requests in the source.
      done: digests of the custom_ids that the target has answers to.
      created: time of the source, in seconds since 1970.
    """

    source: Path
    target: Path
    num_lines: int
    done: frozenset[int]
    created: int

    @property
    def num_left(self) -> int:
        """Requests without an answer."""
        return self.num_lines - len(self.done)


@dataclass(frozen=True, slots=True)
class _Line:
    custom_id: str
    url: str
    body: dict[str, Any]


def plan_batch(source: Path, target: Path) -> BatchPlan:
    """Checks all lines of a batch, finds those that are answered already, and cuts off a last answer that is torn.

    Raises:
      ValueError: a line of the source is no request, or repeats a custom_id; or the target is no file of answers to
        these requests. The message names the line.
      OSError: a file cannot be read.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"the answers cannot go into the file of the requests, {source}")
    wanted: dict[int, int] = {}  # by digest: the line
    for number, line in _lines(source):
        key = _digest(_read_line(line, f"{source}, line {number}").custom_id)
        if wanted.setdefault(key, number) != number:
            raise ValueError(f"{source}, line {number} has the custom_id of line {wanted[key]}; they must all differ")
    done: set[int] = set()
    if target.exists():
        _cut_torn_line(target)
        for number, line in _lines(target):
            key = _digest(_answered_id(line, f"{target}, line {number}"))
            if key not in wanted:
                raise ValueError(f"{target}, line {number} answers none of the requests of {source}; name another file")
            done.add(key)
    created = int(source.stat().st_mtime)
    return BatchPlan(source=source, target=target, num_lines=len(wanted), done=frozenset(done), created=created)


def run_batch(llm: LLM, plan: BatchPlan, *, on_answer: Callable[[], object] = lambda: None) -> int:
    """Answers all requests of a batch that have no answer yet.

    Args:
      llm: answers them.
      plan: the batch.
      on_answer: called after every answer.

    Returns:
      How many requests got an error as their answer.

    Raises:
      EngineClosedError: the engine stopped; the answers so far are in the target.
    """
    with plan.target.open("a", encoding="utf-8") as target:
        return _BatchRun(llm, plan, target, on_answer).run()


class _BatchRun:
    """The requests of a batch that run at present; few enough for any memory, and enough to keep the engine busy."""

    def __init__(self, llm: LLM, plan: BatchPlan, target: IO[str], on_answer: Callable[[], object]):
        self._llm = llm
        self._plan = plan
        self._target = target
        self._on_answer = on_answer
        self._window = 4 * llm.config.max_num_seqs * llm.config.data_parallel_size
        self._finished: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._running: dict[Ticket, tuple[_Line, Request]] = {}
        self._num_errors = 0

    def run(self) -> int:
        try:
            for line in _left(self._plan):
                self._start(line)
                if len(self._running) >= self._window:
                    self._finish_one()
            while self._running:
                self._finish_one()
        except BaseException:
            for ticket in self._running:
                self._llm.cancel(ticket)
            raise
        return self._num_errors

    def _start(self, line: _Line) -> None:
        try:
            request, submission = _prepare(self._llm, line)
        except (TypeError, ValueError, ImportError) as error:
            self._write(line, 400, error_body(error))
        else:
            ticket = self._llm.start(submission, stream=False, on_update=self._finished.put)
            self._running[ticket] = line, request

    def _finish_one(self) -> None:
        ticket = self._finished.get()
        line, request = self._running.pop(ticket)
        try:
            output = ticket.next_output()
        except RequestFailedError as error:
            self._write(line, 500, error_body(error))
        else:
            self._write(line, 200, request.answer(output, name=_name(line), created=self._plan.created))

    def _write(self, line: _Line, status: int, body: dict[str, Any]) -> None:
        is_error = status != 200
        fields = {
            "id": f"batch_req_{_name(line)}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": f"req_{_name(line)}", "body": body},
            "error": {"code": str(status), "message": body["error"]["message"]} if is_error else None,
        }
        self._target.write(json.dumps(fields) + "\n")
        self._target.flush()
        self._num_errors += is_error
        self._on_answer()


def _prepare(llm: LLM, line: _Line) -> tuple[Request, Submission]:
    """Reads a request and makes it ready to start."""
    if line.url == CHAT:
        chat = read_chat(line.body, llm.default_params)
        return chat, llm.prepare_chat(chat.messages, _seeded(chat.params, line), **chat.template)
    if line.url == TEXT:
        text = read_text(line.body, llm.default_params)
        return text, llm.prepare(text.prompt, _seeded(text.params, line))
    raise ValueError(f"url must be {CHAT} or {TEXT}, got {line.url!r}")


def _seeded(params: SamplingParams, line: _Line) -> SamplingParams:
    """The parameters with a seed, made of the custom_id if they have none."""
    return params if params.seed is not None else dataclasses.replace(params, seed=_digest(line.custom_id) >> 1)


def _left(plan: BatchPlan) -> Iterator[_Line]:
    for number, line in _lines(plan.source):
        found = _read_line(line, f"{plan.source}, line {number}")
        if _digest(found.custom_id) not in plan.done:
            yield found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, with their numbers from 1."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise ValueError(f"{path}, line {number} is longer than {_MAX_LINE} bytes")
            if line.strip():
                yield number, line


def _read_line(line: bytes, where: str) -> _Line:
    fields = _object(line, where)
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"{where}: custom_id must be a text, got {custom_id!r}")
    if not isinstance(url, str):
        raise ValueError(f"{where}: url must be {CHAT} or {TEXT}, got {url!r}")
    if fields.get("method", "POST") != "POST":
        raise ValueError(f"{where}: method must be POST, got {fields['method']!r}")
    if not isinstance(body, dict):
        raise ValueError(f"{where}: body must be an object, got {body!r:.80}")
    return _Line(custom_id, url, body)


def _answered_id(line: bytes, where: str) -> str:
    fields = _object(line, where)
    if not isinstance(fields.get("custom_id"), str) or "response" not in fields:
        raise ValueError(f"{where} is no answer of a batch; name a file that does not exist yet")
    return fields["custom_id"]


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object, got {fields!r:.80}")
    return fields


def _cut_torn_line(path: Path) -> None:
    """Removes the end of a file behind its last line break: the start of an answer whose writing was interrupted."""
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        while end:
            start = max(end - (1 << 16), 0)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                file.truncate(start + place + 1)
                return
            end = start
        file.truncate(0)


def _digest(custom_id: str) -> int:
    return int.from_bytes(hashlib.sha256(custom_id.encode(errors="surrogatepass")).digest()[:8], "little")


def _name(line: _Line) -> str:
    return f"{_digest(line.custom_id):016x}"
