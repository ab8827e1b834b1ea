"""A server whose tiny model answers as a large one would, whatever it is asked.

The model can be made to say a text, or to fill in a schema, by fields of the request. The clients of other people know
none of these, so an ASGI application in front of the server adds them.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from served_demo import SETTINGS, saying

from jaxinfer import LLM
from jaxinfer.serve import app


class Front:
    """Adds to the body of a request what makes the model comply.

    Args:
      inner: the server's application.
    """

    def __init__(self, inner: Any):
        self._inner = inner

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._inner(scope, receive, send)
            return
        body, goes_on = b"", True
        while goes_on:
            message = await receive()
            body += message.get("body", b"")
            goes_on = message.get("more_body", False)
        changed = [{"type": "http.request", "body": json.dumps(_complying(json.loads(body))).encode()}]
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"content-length"]

        async def receive_changed():
            return changed.pop() if changed else await receive()

        await self._inner(scope, receive_changed, send)


def _complying(body: dict[str, Any]) -> dict[str, Any]:
    """Short values for the arguments of tools, and a call where the choice is the model's; else a short text."""
    tools = body.get("tools") or []
    for tool in tools:
        function = tool.get("function", tool)
        schema = function.get("parameters", function.get("input_schema"))
        schema |= {
            "properties": {name: {"const": "Rome"} for name in schema["properties"]},
            "additionalProperties": False,
        }
    if not tools:
        return body | saying("Hello there, my friend.")
    if body.get("tool_choice", "auto") == "auto":
        call = {"name": function["name"], "arguments": dict.fromkeys(schema["properties"], "Rome")}
        return body | saying(f"<tool_call>\n{json.dumps(call)}\n</tool_call>")
    return body


@contextlib.contextmanager
def compliant_server(llm: LLM) -> Iterator[str]:
    """Serves a model; gives the address."""
    from jaxinfer.serve.config import ServeConfig

    settings = {name: value for name, value in SETTINGS.items() if name != "port"}
    config = uvicorn.Config(Front(app(llm, ServeConfig(**settings))), port=0, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
