"""Batches: files with a request a line, answered into a file with an answer a line.

Owns: reading and checking both files, what is done already, and writing answers.
Does not know: how requests are answered (answering.py), the command line.

The lines are those of OpenAI's batch API. An answer depends on its line and the model alone, and "created" is the time
of the input file. A batch that was interrupted and resumed therefore gives the same lines as an undisturbed one, as far
as rounding allows, in another order.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.api.llm import LLM
from jaxinfer.serve.answering import RequestLine, answer_lines, digest, read_object

_MAX_LINE = 1 << 26
"""Bytes of a line at most, so that a file of another kind is noticed before it fills the memory."""


class _FileLine(NamedTuple):
    """A line of a file.

    Args:
      number: from 1.
      place: of its first byte in the file.
      text: the line.
    """

    number: int
    place: int
    text: bytes


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
    for number, _, line in _lines(source):
        key = RequestLine.read(line, f"{source}, line {number}").key
        if wanted.setdefault(key, number) != number:
            raise ValueError(f"{source}, line {number} has the custom_id of line {wanted[key]}; they must all differ")
    done: set[int] = set()
    if target.exists():
        _cut_torn_line(target)
        for number, _, line in _lines(target):
            key = digest(_answered_id(line, f"{target}, line {number}"))
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
    lines = (line for _, line in _left(plan))
    with contextlib.closing(answer_lines(llm, lines, created=plan.created)) as answers:
        return write_answers(plan, answers, on_answer)


def write_answers(
    plan: BatchPlan, answers: Iterable[Mapping[str, Any]], on_answer: Callable[[], object] = lambda: None
) -> int:
    """Adds answers to the target of a batch as they come; arguments and result as run_batch's."""
    num_errors = 0
    with plan.target.open("a", encoding="utf-8") as target:
        for answer in answers:
            target.write(json.dumps(answer) + "\n")
            target.flush()
            num_errors += answer["error"] is not None
            on_answer()
    return num_errors


def places_left(plan: BatchPlan) -> Iterator[int]:
    """The places in the source, in bytes, at which the requests without an answer begin."""
    return (place for place, _ in _left(plan))


def line_at(source: Path, place: int) -> bytes:
    """The line that begins at a place of a file."""
    with source.open("rb") as file:
        file.seek(place)
        return file.readline()


def _left(plan: BatchPlan) -> Iterator[tuple[int, RequestLine]]:
    """The requests without an answer, with their places."""
    for number, place, text in _lines(plan.source):
        line = RequestLine.read(text, f"{plan.source}, line {number}")
        if line.key not in plan.done:
            yield place, line


def _lines(path: Path) -> Iterator[_FileLine]:
    """The lines of a file that are not empty."""
    with path.open("rb") as file:
        number = place = 0
        while text := file.readline(_MAX_LINE + 1):
            number += 1
            if len(text) > _MAX_LINE:
                raise ValueError(f"{path}, line {number} is longer than {_MAX_LINE} bytes")
            if text.strip():
                yield _FileLine(number, place, text)
            place += len(text)


def _answered_id(line: bytes, where: str) -> str:
    fields = read_object(line, where)
    if not isinstance(fields.get("custom_id"), str) or "response" not in fields:
        raise ValueError(f"{where} is no answer of a batch; name a file that does not exist yet")
    return fields["custom_id"]


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
