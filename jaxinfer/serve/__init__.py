"""Interfaces of others: requests and answers of OpenAI's, Anthropic's and Megatron's APIs, over HTTP and in files.

What is served over HTTP needs the extra [serve], and is imported when the first name of it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxinfer.serve.config import ServeConfig

if TYPE_CHECKING:
    from jaxinfer.serve.http.application import app
    from jaxinfer.serve.http.server import BackgroundServer, bound_socket, run_server, url_of
else:
    _PLACES = {"app": "application"} | dict.fromkeys(
        ("BackgroundServer", "bound_socket", "run_server", "url_of"), "server"
    )

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{__name__}.http.{_PLACES[name]}"), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"the server needs {error.name}: pip install 'jaxinfer[serve]'") from error


__all__ = ["BackgroundServer", "ServeConfig", "app", "bound_socket", "run_server", "url_of"]
