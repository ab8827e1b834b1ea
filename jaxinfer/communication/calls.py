"""Calls that every process of a run makes, and that only the leader carries out.

Owns: opening engines on all processes, matching the calls of all processes, and sending their results to the followers.
Does not know: what a call does; its arguments are a digest here and its result a text.

A follower either makes the same calls as the leader, in the same order, or says once that it only follows an engine.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from jaxinfer.communication.connection import Message
from jaxinfer.communication.follower import Follower
from jaxinfer.communication.leader import Leader
from jaxinfer.communication.process_group import GatherError, Kind
from jaxinfer.errors import EngineClosedError


class LeadingCalls:
    """The calls of a run on process 0.

    Args:
      group: the processes.
    """

    def __init__(self, group: Leader):
        self._group = group
        self._num_engines = itertools.count()
        self._made: dict[tuple[int, int], dict[int, str]] = {}  # by engine and call: descriptions by process
        self._following: dict[int, set[int]] = {}  # by engine: the processes that make no calls
        group.handle(Kind.CALL, self._hear_call)
        group.handle(Kind.FOLLOW, self._hear_follow)

    def open(self, description: str) -> int:
        """Tells the followers of a new engine; returns its number."""
        engine = next(self._num_engines)
        self._group.send(Message(Kind.OPEN, engine, description.encode()))
        return engine

    def begin(self, engine: int, number: int, description: str) -> bool:
        """Waits until every follower has made the same call, or only follows.

        Args:
          engine: number of the engine.
          number: of the call, from 0, counted for each engine.
          description: what the call is, in a few words and a digest of its arguments.

        Returns:
          Whether any follower waits for the call's result.

        Raises:
          GatherError: a process has made another call, or none and has ended; the followers get this error, too.
          ProcessLostError: the run has failed.
        """
        group = self._group
        others = range(1, group.num_processes)
        made, following = self._made.setdefault((engine, number), {}), self._following.setdefault(engine, set())

        def is_known(process_id: int) -> bool:
            return process_id in made or process_id in following or group.has_left(process_id)

        group.wait_for(lambda: all(map(is_known, others)), "the other processes to make the same call, or to follow")
        del self._made[engine, number]
        error = None
        for process_id in others:
            if process_id in made and made[process_id] != description:
                error = f"process {process_id} calls {made[process_id]}, process 0 calls {description}"
            elif process_id not in made and process_id not in following:
                error = f"process {process_id} has ended, process 0 calls {description}"
        if error is not None:
            error += "; make the same calls on all processes, or llm.follow() on all but process 0"
            self.end(engine, number, {"error": "GatherError", "message": error})
            raise GatherError(error)
        return bool(made)

    def end(self, engine: int, number: int, result: Mapping[str, Any]) -> None:
        """Sends the result of a call, as values for JSON, to the followers."""
        text = json.dumps({"engine": engine, **result})
        self._group.send(Message(Kind.RESULT, number, text.encode()))

    def _hear_call(self, process_id: int, message: Message) -> None:
        call = json.loads(message.payload)
        with self._group.change():
            self._made.setdefault((call["engine"], message.number), {})[process_id] = call["description"]

    def _hear_follow(self, process_id: int, message: Message) -> None:
        with self._group.change():
            self._following.setdefault(message.number, set()).add(process_id)


class FollowingCalls:
    """The calls of a run on another process.

    Args:
      group: the processes.
    """

    def __init__(self, group: Follower):
        self._group = group
        self._num_engines = 0
        self._opened: dict[int, str] = {}
        self._closed: set[int] = set()
        self._results: dict[tuple[int, int], dict[str, Any]] = {}
        self._num_calls: dict[int, int] = {}
        group.handle(Kind.RESULT, self._hear_result)

    def next_opened(self) -> tuple[int, str]:
        """Waits until the leader has opened the next engine; returns its number and description.

        Raises:
          EngineClosedError: the leader has ended.
          ProcessLostError: the run has failed.
        """
        self.peek_opened()
        engine = self._num_engines
        self._num_engines += 1
        return engine, self._opened.pop(engine)

    def peek_opened(self) -> str:
        """Waits like next_opened and returns the description, which next_opened will return again."""
        engine, group = self._num_engines, self._group
        group.wait_for(lambda: engine in self._opened or group.is_leader_leaving)
        if engine not in self._opened:
            raise EngineClosedError("process 0 has ended")
        return self._opened[engine]

    def make(self, engine: int, description: str) -> dict[str, Any]:
        """Makes a call and waits for its result, as the leader has sent it.

        Raises:
          EngineClosedError: the leader has closed the engine before the call had ended.
          ProcessLostError: the run has failed.
        """
        number = self._num_calls.get(engine, 0)
        self._num_calls[engine] = number + 1
        key = engine, number
        text = json.dumps({"engine": engine, "description": description})
        self._group.send(Message(Kind.CALL, number, text.encode()))
        self._group.wait_for(lambda: key in self._results or engine in self._closed, f"process 0 to call {description}")
        if key not in self._results:
            raise EngineClosedError(
                f"process 0 has closed the LLM, process {self._group.process_id} calls {description}"
            )
        return self._results.pop(key)

    def follow(self, engine: int) -> None:
        """Tells the leader that this process makes no calls of this engine any more."""
        self._group.send(Message(Kind.FOLLOW, engine))

    def await_close(self, engine: int) -> None:
        """Waits until the leader has closed an engine."""
        self._group.wait_for(lambda: engine in self._closed)

    def is_closed(self, engine: int) -> bool:
        """Whether the leader has closed an engine."""
        return engine in self._closed

    def close(self, engine: int) -> None:
        """Notes that the leader has closed an engine."""
        with self._group.change():
            self._closed.add(engine)

    def open(self, message: Message) -> None:
        """Notes that the leader has opened an engine."""
        with self._group.change():
            self._opened[message.number] = message.payload.decode()

    def _hear_result(self, process_id: int, message: Message) -> None:
        result = json.loads(message.payload)
        with self._group.change():
            self._results[result.pop("engine"), message.number] = result
