"""`jaxinfer serve`: serves a model over HTTP.

Owns: the command's flags, what is printed.
Does not know: HTTP (serve/http, which is imported when the command runs).
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from typing import Annotated, Any

import typer

from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.cli.chosen_template import chosen_template
from jaxinfer.cli.flags import takes_settings
from jaxinfer.cli.lasting_imports import lasting_imports
from jaxinfer.cli.terminal import remark
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.serve.config import ServeConfig

_SERVE_FIELDS = {entry.name for entry in dataclasses.fields(ServeConfig)}


@takes_settings(ServeConfig, EngineConfig)
def serve(
    *,
    model: Annotated[
        str | None, typer.Option(help=f"checkpoint directory or hub id (default: {DEMO}, the bundled model)")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help='another tokenizer\'s directory or hub id, or "byte"')] = None,
    **fields: Any,
) -> None:
    """Serve a model over HTTP: OpenAI's, Anthropic's and Megatron's interfaces, metrics, and a playground at /.

    The first SIGTERM or Ctrl-C lets running requests end (--drain-timeout), the second one ends at once.
    """
    engine = EngineConfig(**{name: value for name, value in fields.items() if name not in _SERVE_FIELDS})
    config = ServeConfig(**{name: value for name, value in fields.items() if name in _SERVE_FIELDS})
    with lasting_imports():
        from jaxinfer.api.llm import LLM, find_chat_templates
        from jaxinfer.serve import bound_socket, run_server, url_of
    if config.chat_template is not None:
        templates = find_chat_templates(tokenizer, model or DEMO)
        template = chosen_template(config.chat_template, templates, flag="--chat-template")
        config = dataclasses.replace(config, chat_template=template)
    _end_on_sigterm()
    with bound_socket(config) as bound, LLM(model or DEMO, tokenizer=tokenizer, **dataclasses.asdict(engine)) as llm:
        where = f"serving {llm.name} at {url_of(config, bound)}"
        run_server(llm, config, bound, on_start=lambda: remark(where + _warning(config)))


def _end_on_sigterm() -> None:
    """Ends the process on SIGTERM while the model is loaded. The system would do so, but not for the first process of a
    container, which gets only signals that it has a handler for."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _warning(config: ServeConfig) -> str:
    is_open = config.host not in ("127.0.0.1", "::1", "localhost") and not config.keys
    return ", to everybody on its network: --api-key asks for a key" if is_open else ""
