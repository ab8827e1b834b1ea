"""LLMServer: an LLM as a deployment of Ray Serve.

Owns: the deployment's methods and HTTP answers.
Does not know: what requests mean (serve/interfaces).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse

from jaxinfer.api.async_llm import AsyncLLM
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.errors import EngineClosedError, RequestFailedError
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.answering import read_exchange
from jaxinfer.serve.interfaces.chat import CHAT
from jaxinfer.serve.interfaces.errors import WRONG_REQUEST, error_body
from jaxinfer.serve.interfaces.exchange import Exchange, Label
from jaxinfer.serve.interfaces.text import TEXT
from jaxinfer.serve.served_model import ServedModel


@serve.deployment(max_ongoing_requests=256)
class LLMServer:
    """Answers requests of OpenAI's API over HTTP, and generates for other deployments.

    Over HTTP it takes POST /v1/chat/completions and /v1/completions, without streams. Other deployments call `generate`
    and `answer` through its handle. It counts as unhealthy, and Ray starts it again, when its engine has stopped; with
    data_parallel_size, when all of them have.

    Args:
      model, tokenizer, **engine: as LLM's.
      warmup: whether to compile enough programs for all requests before the first one is taken.

    Raises:
      As LLM.

    Example:
      server = LLMServer.options(num_replicas=2, ray_actor_options={"num_gpus": 1})
      serve.run(server.bind("path/to/checkpoint", max_num_seqs=128))
    """

    def __init__(
        self,
        model: str | Path = DEMO,
        *,
        tokenizer: str | Path | None = None,
        warmup: bool = True,
        **engine: Any,
    ):
        self._llm = AsyncLLM(model, tokenizer=tokenizer, **engine)
        self._served = ServedModel.of(self._llm.llm)
        if warmup:
            self._llm.llm.warmup(background=True)

    async def __call__(self, request: Request) -> JSONResponse:
        """Answers an HTTP request."""
        url = request.url.path
        url = next((known for known in (CHAT, TEXT) if url.endswith(known)), url)
        if url not in (CHAT, TEXT) or request.method != "POST":
            wrong = ValueError(f"there is POST {CHAT} and POST {TEXT}, got {request.method} {url}")
            return JSONResponse(error_body(wrong), 404)
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise ValueError(f"the body must be an object, got {body!r:.80}")
            exchange = await self._read(url, body)
        except WRONG_REQUEST as error:
            return JSONResponse(error_body(error), 400)
        try:
            return JSONResponse(await self._run(exchange))
        except (RequestFailedError, EngineClosedError) as error:
            return JSONResponse(error_body(error), 500)

    async def answer(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body of the answer to a request.

        Args:
          url: "/v1/chat/completions" or "/v1/completions".
          body: the request's fields.

        Raises:
          TypeError, ValueError, ImportError: the request is wrong.
          RequestFailedError: it failed.
          EngineClosedError: the engine has stopped.
        """
        return await self._run(await self._read(url, body))

    async def _read(self, url: str, body: Mapping[str, Any]) -> Exchange:
        """In a thread, since templates take time."""
        label = Label(name=uuid.uuid4().hex, created=int(time.time()))
        return await asyncio.to_thread(read_exchange, self._served, url, body, label)

    async def _run(self, exchange: Exchange) -> dict[str, Any]:
        return dict(exchange.answer(await asyncio.gather(*map(self._llm.run, exchange.submissions))))

    async def generate(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """As AsyncLLM.generate; call it through a handle with the option stream=True."""
        async for output in self._llm.generate(prompt, sampling_params):
            yield output

    def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
          EngineClosedError: the engine has stopped.
        """
        if not self._llm.llm.is_running:
            raise EngineClosedError("the engine has stopped")


def build_server(arguments: dict[str, Any]) -> Application:
    """An application of one LLMServer, for files that Ray's `serve run` and `serve deploy` read.

    Args:
      arguments: as LLMServer's, by name.
    """
    return LLMServer.bind(**arguments)  # pyrefly: ignore[missing-attribute]
