"""AsyncLLM, the Python API for asyncio.

Owns: passing outputs from the driver's thread into an event loop, and cancelling requests when tasks are cancelled.
Does not know: anything of generation beyond the methods of LLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, cast

from jaxinfer.api.arguments import score_params
from jaxinfer.api.driver import Ticket
from jaxinfer.api.llm import LLM
from jaxinfer.api.loop_waker import LoopWaker
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.engine.stats import EngineStats
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.text.preparation import Prompt, Submission
from jaxinfer.tokenizer.tokenizer import Tokenizer


class AsyncLLM:
    """An LLM for asyncio: any number of tasks, in any number of event loops, generate at the same time.

    Args:
      model, tokenizer, **engine: as LLM's. Loading blocks the calling thread.

    Raises:
      As LLM.

    Example:
      async with AsyncLLM("path/to/checkpoint") as llm:
          async for output in llm.generate("In the beginning", SamplingParams(max_tokens=32)):
              print(output.delta, end="", flush=True)
    """

    def __init__(self, model: str | Path = DEMO, *, tokenizer: str | Path | Tokenizer | None = None, **engine: Any):
        self._llm = LLM(model, tokenizer=tokenizer, **engine)

    @classmethod
    def from_params(
        cls,
        config: Mapping[str, Any],
        params: Mapping[str, Any],
        tokenizer: str | Path | Tokenizer | None = None,
        **engine: Any,
    ) -> AsyncLLM:
        """An AsyncLLM from weights that are already in memory; arguments and errors as LLM.from_params."""
        llm = cls.__new__(cls)
        llm._llm = LLM.from_params(config, params, tokenizer, **engine)
        return llm

    @classmethod
    def of(cls, llm: LLM) -> AsyncLLM:
        """An AsyncLLM over an LLM that exists already; both may be used at the same time."""
        async_llm = cls.__new__(cls)
        async_llm._llm = llm
        return async_llm

    def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncOutputStream:
        """Generates for one prompt and gives out the text while it grows; call it in a coroutine.

        Args:
          prompt: a string or a list of token ids.
          sampling_params: None takes default_params, the checkpoint's own sampling settings.

        Returns:
          An async iterator of RequestOutput. `text` is all text so far, `delta` what is new since the previous output;
          the last output is finished. Cancelling the task that waits for the iterator, calling its aclose() or
          dropping it aborts the request.

        Raises:
          TypeError, ValueError: raised by the call itself, not by the iterator, for the same reasons as LLM.generate.
          EngineClosedError: the LLM is closed.
          RuntimeError: no event loop is running.
        """
        return self.start(self._llm.prepare(prompt, sampling_params))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> AsyncChatStream:
        """Generates the next message of one conversation and gives out its text as it grows; call it in a coroutine.

        The template is rendered in a thread, so that the event loop is not blocked. The request starts as soon as that
        is done, even if no task waits for its outputs yet.

        Args:
          messages, sampling_params, **template: as LLM.stream_chat's.

        Returns:
          As generate.

        Raises:
          TypeError, ValueError: raised by the call itself if messages or parameters are wrong or there is no template;
            raised in place of the first output if the template is broken, refuses the messages or exceeds a limit, or
            if the rendered prompt is too long.
          EngineClosedError: the LLM is closed; raised in place of the first output.
          RuntimeError: no event loop is running.
        """
        loop = asyncio.get_running_loop()
        prepare = self._llm.check_chat(messages, sampling_params, **template)

        async def open_stream() -> AsyncOutputStream:
            return self.start(await asyncio.to_thread(prepare))

        return AsyncChatStream(loop.create_task(open_stream()), loop)

    async def beam_search(self, prompt: Prompt, params: BeamSearchParams | None = None) -> RequestOutput:
        """Searches for the most likely texts of one prompt; arguments, result and errors as LLM.beam_search's."""
        return await self.run(self._llm.prepare_beam_search(prompt, params))

    async def score(self, prompt: Prompt, *, prompt_logprobs: int = 0) -> RequestOutput:
        """Scores one prompt; arguments, result and errors as LLM.score's."""
        return await self.run(self._llm.prepare(prompt, score_params(prompt_logprobs)))

    async def run(self, submission: Submission) -> RequestOutput:
        """The finished output of a prepared request; cancelling the task aborts it.

        Args:
          submission: from a prepare method of `llm`.

        Raises:
          RequestFailedError, EngineClosedError: as AsyncLLM.generate.
        """
        return await self.start(submission, stream=False).whole()

    @property
    def llm(self) -> LLM:
        """The LLM that runs the requests; its prepare methods check requests and make them ready for `run`."""
        return self._llm

    @property
    def default_params(self) -> SamplingParams:
        """Sampling settings of the checkpoint's generation_config, used by calls that give no SamplingParams."""
        return self._llm.default_params

    def start(self, submission: Submission, *, stream: bool = True) -> AsyncOutputStream:
        """Starts a prepared request; call it in a coroutine.

        Args:
          submission: from a prepare method of `llm`.
          stream: give out unfinished outputs, too.

        Returns:
          As generate.

        Raises:
          EngineClosedError: the LLM is closed.
          RuntimeError: no event loop is running.
        """
        waker, has_update = LoopWaker.of(asyncio.get_running_loop()), asyncio.Event()

        def on_update(ticket: Ticket) -> None:
            try:
                waker.call_soon(has_update.set)
            except RuntimeError:  # the event loop is closed, so no task can read the outputs any more
                self._llm.cancel(ticket)

        ticket = self._llm.start(submission, stream=stream, on_update=on_update)
        return AsyncOutputStream(ticket, has_update, lambda: self._llm.cancel(ticket))

    async def warmup(self, *, background: bool = False) -> None:
        """As LLM.warmup, in a thread, so that the event loop is not blocked."""
        await asyncio.to_thread(self._llm.warmup, background=background)

    async def follow(self) -> None:
        """As LLM.follow, in a thread, so that the event loop is not blocked."""
        await asyncio.to_thread(self._llm.follow)

    def stats(self) -> EngineStats:
        """As LLM.stats."""
        return self._llm.stats()

    def close(self) -> None:
        """As LLM.close; waiting tasks get an EngineClosedError."""
        self._llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)


class AsyncOutputStream(AsyncIterator[RequestOutput]):
    """An async iterator over the outputs of one request while it runs.

    Calling aclose(), dropping the iterator or cancelling the task that waits for it aborts the request. Outputs are
    not queued: a task that reads more slowly than tokens come gets several new tokens in one output.

    Args:
      ticket: gives out the outputs.
      has_update: set when the ticket may have a new output.
      cancel: aborts the request.
    """

    def __init__(self, ticket: Ticket, has_update: asyncio.Event, cancel: Callable[[], None]):
        self._ticket = ticket
        self._has_update = has_update
        self._cancel = weakref.finalize(self, cancel)
        self._is_done = False

    async def __anext__(self) -> RequestOutput:
        try:
            while not self._is_done:
                output = self._ticket.take()
                if output is not None:
                    self._is_done = output.finished
                    return output
                await self._has_update.wait()
                self._has_update.clear()
        except CancelledError:  # the request was cancelled (not this task), by aclose() in this or another task
            self._is_done = True
        except BaseException:
            await self.aclose()
            raise
        raise StopAsyncIteration

    async def whole(self) -> RequestOutput:
        """Waits for the finished output, which is made in a thread: log-probabilities are many objects.

        Raises:
          RequestFailedError, EngineClosedError: as AsyncLLM.generate.
        """
        try:
            while not self._ticket.has_ended:
                await self._has_update.wait()
                self._has_update.clear()
            output = await asyncio.to_thread(self._ticket.take)
        except BaseException:
            await self.aclose()
            raise
        self._is_done = True
        return cast(RequestOutput, output)

    async def aclose(self) -> None:
        """Aborts the request if it still runs; iterating then ends, also in a task that waits for an output."""
        self._is_done = True
        self._cancel()


class AsyncChatStream(AsyncIterator[RequestOutput]):
    """An async iterator like AsyncOutputStream, for a chat request whose prompt is still being rendered.

    Args:
      opening: renders the prompt, starts the request and returns its stream. It is cancelled when the task that waits
        for the first output is cancelled, by aclose(), or when this iterator is dropped; then no request starts.
      loop: the event loop in which `opening` runs.
    """

    def __init__(self, opening: asyncio.Task[AsyncOutputStream], loop: asyncio.AbstractEventLoop):
        self._opening = opening
        self._is_done = False
        self._drop = weakref.finalize(self, _cancel_soon, opening, loop)

    async def __anext__(self) -> RequestOutput:
        if self._is_done:
            raise StopAsyncIteration
        try:
            stream = await self._opening
        except BaseException as error:
            if self._is_done and isinstance(error, asyncio.CancelledError):  # another task has called aclose()
                raise StopAsyncIteration from None
            self._is_done = True
            raise
        return await anext(stream)

    async def aclose(self) -> None:
        """Aborts the request, whether it already runs or has not started yet; iterating then ends."""
        self._is_done = True
        if self._opening.cancel() or self._opening.cancelled():
            return
        if self._opening.exception() is None:
            await self._opening.result().aclose()


def _cancel_soon(task: asyncio.Task[AsyncOutputStream], loop: asyncio.AbstractEventLoop) -> None:
    """Cancels a task; the garbage collector may call it in any thread, so it goes through the task's event loop."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: its tasks run no more
        loop.call_soon_threadsafe(task.cancel)
