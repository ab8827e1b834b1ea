"""How a caller's thread gets the outputs of its requests while the driver's thread makes them.

Owns: the iterator over the outputs of one request; waiting for many requests, with a progress bar.
Does not know: models, prompts.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError

from tqdm.auto import tqdm

from jaxinfer.api.driver import Ticket
from jaxinfer.outputs import RequestOutput

_BAR_SECONDS = 0.25


class OutputStream(Iterator[RequestOutput]):
    """An iterator over the outputs of one request while it runs.

    close(), leaving a `with` block or dropping the iterator aborts the request. Outputs are not queued: a caller that
    reads more slowly than tokens come gets several new tokens in one output.

    Args:
      ticket: gives out the outputs.
      cancel: aborts the request.
    """

    def __init__(self, ticket: Ticket, cancel: Callable[[], None]):
        self._ticket = ticket
        self._cancel = weakref.finalize(self, cancel)
        self._is_done = False

    def __next__(self) -> RequestOutput:
        if self._is_done:
            raise StopIteration
        try:
            output = self._ticket.next_output()
        except CancelledError:  # close() was called, perhaps by another thread
            self._is_done = True
            raise StopIteration from None
        except BaseException:
            self.close()
            raise
        self._is_done = output.finished
        return output

    def close(self) -> None:
        """Aborts the request if it still runs; iterating then ends, also in a thread that waits for an output."""
        self._is_done = True
        self._cancel()

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def wait_for(tickets: Sequence[Ticket], *, show_bar: bool) -> list[RequestOutput]:
    """Waits for the finished outputs of all tickets, in their order.

    Raises:
      RequestFailedError: one of the requests failed.
      EngineClosedError: the engine was closed or stopped on an error before all requests had ended.
    """
    started = time.monotonic()
    outputs: list[RequestOutput] = []
    with tqdm(
        total=len(tickets), desc="generating", unit="prompt", disable=None if show_bar else True, leave=False
    ) as bar:
        while len(outputs) < len(tickets):
            try:
                outputs.append(tickets[len(outputs)].next_output(_BAR_SECONDS if show_bar else None))
                bar.update()
            except TimeoutError:
                num_tokens = sum(ticket.num_tokens for ticket in tickets)
                bar.set_postfix_str(f"{num_tokens / (time.monotonic() - started):.0f} tokens/s")
    return outputs
