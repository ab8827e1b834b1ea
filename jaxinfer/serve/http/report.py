"""Report: what is told of one request once it is over, in the access log and in the metrics.

Owns: the fields of a line of the log, and which numbers a request adds to.
Does not know: where lines and numbers go.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jaxinfer.outputs import RequestDelta, RequestOutput
from jaxinfer.serve.http.metrics import Metrics
from jaxinfer.serve.interfaces.answered import Answered, TokenCount

logger = logging.getLogger("jaxinfer.access")


def show_access_log() -> None:
    """Prints the lines to standard error, unless the user has given the logger a place for them."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Report:
    """Collects what happens to a request.

    Args:
      metrics: numbers of the server.
      route: names the request in the metrics.
      path: names it in the log.
      method: of HTTP.
      client: the address from which it came.
      request_id: its name.
      is_logged: whether it has a line in the log.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        route: str,
        path: str,
        method: str,
        client: str,
        request_id: str,
        is_logged: bool = True,
    ):
        self._metrics = metrics
        self._is_logged = is_logged
        self._route = route
        self._about = {"request_id": request_id, "client": client, "method": method, "path": path}
        self._start = time.monotonic()
        self._last: dict[int, float] = {}
        self._first_seconds: float | None = None
        self._count = TokenCount()
        self._reasons: dict[tuple[int, int], str] = {}
        self.error: str | None = None
        """What went wrong, in a word; None if nothing did."""
        self.num_samples = 0
        """Samples that a stream has to bring; those that have not come count as aborted once others have."""
        self.model: str | None = None
        self.is_stream = False

    @property
    def has_begun(self) -> bool:
        """Whether a stream had an output."""
        return bool(self._last)

    def progress(self, number: int, delta: RequestDelta) -> None:
        """Notes the next delta of a stream's answer."""
        now = time.monotonic()
        if not self._last:
            self._note_first(now - self._start)
        elif number in self._last:
            self._metrics.between_tokens.observe(now - self._last[number])
        self._last[number] = now
        self._add(number, delta)

    def complete(self, outputs: Sequence[RequestOutput]) -> None:
        """Notes the outputs of a request that is no stream."""
        for number, output in enumerate(outputs):
            self._add(number, output)
        times = [output.metrics.first_token_time for output in outputs if output.metrics.first_token_time is not None]
        if times:
            self._note_first(max(min(times) - self._start, 0.0))

    def close(self, status: int) -> None:
        """Adds up the numbers and writes the line; 499 is the status of a client that has left."""
        seconds = time.monotonic() - self._start
        metrics, num_new = self._metrics, self._count.num_new
        metrics.count_answer(self._route, status)
        if self._reasons:
            metrics.latency.observe(seconds)
            metrics.prompt_tokens.observe(self._count.num_prompt)
            metrics.new_tokens.observe(num_new)
            if num_new > 1 and self._first_seconds is not None:
                metrics.per_token.observe(max(seconds - self._first_seconds, 0.0) / (num_new - 1))
        reasons = [self._reasons[key] for key in sorted(self._reasons)]
        if reasons:
            reasons += ["abort"] * (self.num_samples - len(reasons))
        for reason in reasons:
            metrics.count_sample(reason)
        if self._is_logged:
            self._write(status, seconds, reasons)

    def _note_first(self, seconds: float) -> None:
        self._first_seconds = seconds
        self._metrics.first_token.observe(seconds)

    def _add(self, number: int, answer: Answered) -> None:
        self._count.add(number, answer)
        for completion in answer.outputs:
            self._reasons[number, completion.index] = completion.finish_reason or "abort"

    def _write(self, status: int, seconds: float, reasons: Sequence[str]) -> None:
        line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "status": status}
        line |= self._about | {"seconds": round(seconds, 4)}
        if reasons:
            line |= {
                "model": self.model,
                "stream": self.is_stream,
                "prompt_tokens": self._count.num_prompt,
                "generation_tokens": self._count.num_new,
                "finish_reasons": reasons,
            }
        if self._first_seconds is not None:
            line["first_token_seconds"] = round(self._first_seconds, 4)
        if self.error is not None:
            line["error"] = self.error
        logger.info(json.dumps(line))
