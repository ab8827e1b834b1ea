"""Exchange: a request that was read, and the forms that its answer has.

Owns: what every interface gives to the server, and the values that pass between them.
Does not know: any interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jaxinfer.outputs import RequestDelta, RequestOutput
from jaxinfer.serve.interfaces.errors import ErrorFacts
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Submission


class _Done:
    """The word with which OpenAI's streams end, which is no JSON."""


DONE = _Done()


class Event(NamedTuple):
    """An event of a stream.

    Args:
      data: a value of JSON, or DONE.
      name: the event's name; None for interfaces that give none.
    """

    data: Any
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What tells an answer from others.

    Args:
      name: unique among all answers.
      created: when the request came, in seconds since 1970.
    """

    name: str
    created: int


class Stream(Protocol):
    """Turns the answers to one request into events while they grow."""

    def opening(self) -> Iterable[Event]:
        """The events before all others."""
        ...

    def progress(self, number: int, delta: RequestDelta) -> Iterable[Event]:
        """The events that the next delta of an answer brings.

        Args:
          number: of its submission.
          delta: what is new.
        """
        ...

    def closing(self) -> Iterable[Event]:
        """The events behind all others."""
        ...

    def failure(self, facts: ErrorFacts) -> Iterable[Event]:
        """The last events of a stream that fails."""
        ...


class Exchange(Protocol):
    """A request that was read and can be run."""

    @property
    def submissions(self) -> Sequence[Submission]:
        """What the LLM has to run."""
        ...

    @property
    def wants_stream(self) -> bool:
        """Whether the answer comes as a stream."""
        ...

    def answer(self, outputs: Sequence[RequestOutput]) -> Mapping[str, Any]:
        """The body of the answer, from the finished output of each submission."""
        ...

    def stream(self) -> Stream:
        """A stream that has not begun."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """A way in which requests come.

    Args:
      path: its address.
      bodies: have the fields of requests as their annotations, and what they mean in their docstrings.
      read: reads the body of a request; raises one of errors.WRONG_REQUEST or RefusedError. It takes a while, since it
        renders templates, tokenizes and compiles grammars.
      error: the body of an answer that is an error.
      method: POST or PUT.
      takes_sampling: whether the fields of SamplingParams are fields of requests, too.
    """

    path: str
    bodies: tuple[type, ...]
    read: Callable[[ServedModel, Mapping[str, Any], Label], Exchange]
    error: Callable[[ErrorFacts], Mapping[str, Any]]
    method: str = "POST"
    takes_sampling: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """A way to ask for what needs no generation.

    Args:
      path: its address.
      bodies: as Interface's.
      answer: makes the body of the answer from that of the request; raises as Interface.read.
      error: the body of an answer that is an error.
    """

    path: str
    bodies: tuple[type, ...]
    answer: Callable[[ServedModel, Mapping[str, Any]], Mapping[str, Any]]
    error: Callable[[ErrorFacts], Mapping[str, Any]]
