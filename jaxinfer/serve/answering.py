"""Requests in the form of OpenAI's API, answered by an LLM: one, or many lines of a batch while the LLM is kept busy.

Owns: which request a body is for a URL, lines and their answers, and how many requests run at the same time.
Does not know: what the fields of a body mean (interfaces/), files, HTTP.

An answer depends on its line and the model alone: a request without a seed gets one made of its custom_id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.api.driver import Ticket
from jaxinfer.api.llm import LLM
from jaxinfer.errors import RequestFailedError
from jaxinfer.serve.interfaces.chat import CHAT, ChatRequest
from jaxinfer.serve.interfaces.errors import WRONG_REQUEST, error_body
from jaxinfer.serve.interfaces.exchange import Exchange, Label
from jaxinfer.serve.interfaces.text import TEXT, TextRequest
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Submission


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line of a batch.

    Args:
      custom_id: the name that the request has in the batch.
      url: says which kind of request it is.
      body: the request's fields.
    """

    custom_id: str
    url: str
    body: Mapping[str, Any]

    @property
    def key(self) -> int:
        """A digest of custom_id, 0 .. 2**64 - 1."""
        return digest(self.custom_id)

    @classmethod
    def read(cls, line: bytes | str, where: str) -> RequestLine:
        """Reads a line of JSON.

        Args:
          line: the line.
          where: names it in errors.

        Raises:
          ValueError: it is no request.
        """
        fields = read_object(line, where)
        custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
        if not isinstance(custom_id, str) or not custom_id:
            raise ValueError(f"{where}: custom_id must be a text, got {custom_id!r}")
        if not isinstance(url, str):
            raise ValueError(f"{where}: url must be {CHAT} or {TEXT}, got {url!r}")
        if fields.get("method", "POST") != "POST":
            raise ValueError(f"{where}: method must be POST, got {fields['method']!r}")
        if not isinstance(body, dict):
            raise ValueError(f"{where}: body must be an object, got {body!r:.80}")
        return cls(custom_id, url, body)

    def answer(self, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the line that answers this one.

        Args:
          status: as in HTTP; 200 for a request that was answered.
          body: the answer, or error_body.
        """
        name = f"{self.key:016x}"
        return {
            "id": f"batch_req_{name}",
            "custom_id": self.custom_id,
            "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
            "error": None if status == 200 else {"code": str(status), "message": body["error"]["message"]},
        }


def read_exchange(
    served: ServedModel, url: str, body: Mapping[str, Any], label: Label, *, seed: int | None = None
) -> Exchange:
    """Reads a request that is answered by one body.

    Args:
      served: will run it.
      url: CHAT or TEXT.
      body: the fields.
      label: of the answer.
      seed: for a request that names none; None lets the LLM choose.

    Raises:
      WRONG_REQUEST, RefusedError: the request is wrong, or asks for what this LLM cannot do.
    """
    if url not in (CHAT, TEXT):
        raise ValueError(f"url must be {CHAT} or {TEXT}, got {url!r}")
    if body.get("stream"):
        raise ValueError(f"stream must be False, got {body['stream']!r}; nothing else is supported")
    defaults = dataclasses.replace(served.default_params, seed=seed)
    model = served.answering_name(body.get("model"))
    reader = ChatRequest if url == CHAT else TextRequest
    return reader.read(body, defaults).prepared(served, label, model=model)


def answer_lines(llm: LLM, lines: Iterable[RequestLine], *, created: int) -> Generator[dict[str, Any]]:
    """Answers lines; their answers come in the order in which they are ready.

    So many requests run at the same time that the LLM is busy, and so few that any number of lines fits into memory.

    Args:
      llm: answers them.
      lines: the lines, which are read as needed.
      created: what the answers say when they were made, in seconds since 1970.

    Returns:
      The answers as RequestLine.answer makes them. Closing the iterator ends the requests that run.

    Raises:
      EngineClosedError: the engine stopped.
    """
    window = 4 * llm.config.max_num_seqs * llm.config.data_parallel_size
    finished: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
    running: dict[Ticket, tuple[RequestLine, Exchange]] = {}
    served = ServedModel.of(llm)

    def take() -> dict[str, Any]:
        ticket = finished.get()
        line, exchange = running.pop(ticket)
        try:
            output = ticket.next_output()
        except RequestFailedError as error:
            return line.answer(500, error_body(error))
        return line.answer(200, exchange.answer([output]))

    try:
        for line in lines:
            try:
                label = Label(name=f"{line.key:016x}", created=created)
                exchange = read_exchange(served, line.url, line.body, label, seed=line.key >> 1)
                (submission,) = _one_submission(exchange)
            except WRONG_REQUEST as error:
                yield line.answer(400, error_body(error))
                continue
            running[llm.start(submission, stream=False, on_update=finished.put)] = line, exchange
            if len(running) >= window:
                yield take()
        while running:
            yield take()
    finally:
        for ticket in running:
            llm.cancel(ticket)


def _one_submission(exchange: Exchange) -> Sequence[Submission]:
    if len(exchange.submissions) > 1:
        raise ValueError(
            f"prompt must be one text or one list of token ids, got {len(exchange.submissions)} prompts; send each"
        )
    return exchange.submissions


def digest(custom_id: str) -> int:
    """A digest of a custom_id, 0 .. 2**64 - 1."""
    return int.from_bytes(hashlib.sha256(custom_id.encode(errors="surrogatepass")).digest()[:8], "little")


def read_object(line: bytes | str, where: str) -> dict[str, Any]:
    """Reads a line with a JSON object.

    Raises:
      ValueError: it has none; the message begins with `where`.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object, got {fields!r:.80}")
    return fields
