"""ServeConfig: the settings of the server.

Owns: the fields and their checks.
Does not know: how they are put into effect.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.config.keywords import names_nearest_field
from jaxinfer.config.validation import require_bool, require_choice, require_float, require_int
from jaxinfer.serve.replies.formats import FORMATS

KEY_VARIABLE = "JAXINFER_API_KEY"


@names_nearest_field
@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """How a model is served over HTTP.

    Args:
      host: address to listen on; 0.0.0.0 is every network of this machine.
      port: to listen on, 0 .. 65535; 0 lets the system choose one.
      served_model_name: names by which requests may call the model; None is the model's own. The first is the one that
        answers bear.
      api_key: keys, one of which a request must bring (as "Authorization: Bearer KEY" or "x-api-key: KEY") on every
        route but /health; None asks for none. The variable JAXINFER_API_KEY may hold some, too, separated by white
        space; a list of processes does not show it, as it shows flags.
      cors_origins: origins of web pages that may use the server, such as http://localhost:3000, or *; None is this
        server's own page only.
      root_path: the path under which a proxy shows the server, such as /llm.
      ssl_certfile, ssl_keyfile: files in PEM format; with them the server speaks HTTPS.
      chat_template: a template in Jinja, or the name of one of the checkpoint's; None takes the checkpoint's own.
      reply_format: how the model writes thoughts and calls of tools: auto (found in the chat template), plain, think,
        hermes, qwen-xml, llama, mistral, gemma or functiongemma.
      warmup: whether to compile the programs that requests need at the start. /ready says when that is done.
      access_log: whether to write a line of JSON to standard error about every request, those of probes excepted.
      drain_timeout: seconds that running requests have to end when the server is told to stop.
      keep_alive: seconds after which a stream that has no news sends a comment, so that no proxy gives it up.
      stall_timeout: seconds that a client may take to send its request, or leave an answer unread.
      allowed_hosts: names by which clients may call a server that only this machine can reach, beside its addresses and
        localhost. Where no key is asked for, others are refused: a web page could give itself a name that leads here.
      trusted_proxies: addresses of proxies whose word on the client's address (X-Forwarded-For) is taken.
      max_connections: open at a time; further ones are closed at once.
      max_body_bytes: bytes of a request's body.
      max_prompts: prompts of one request.
      max_n: samples of one prompt.
      max_output_tokens: new tokens of one sample; None is what the model's context leaves.
      max_stop: stop strings of one request, and bad words.
      max_stop_length: characters of one of them.
      max_grammar_bytes: bytes of a JSON schema, regular expression or grammar.
      max_waiting: samples that may wait for their turn, beside those that run. What comes then is refused with the
        status 503 and "Retry-After".
      max_per_client: requests that one client may have running at a time; None is any number. A client is an API key,
        or an address if none are asked for. What comes then is refused with the status 429.
      allow_chat_template: whether a request may bring a chat template of its own. Templates run in a sandbox with
        limits of time and memory, one after the other.

    Raises:
      TypeError, ValueError: a field is outside its range; the message names field, value and range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: Sequence[str] | None = None
    api_key: Sequence[str] | None = field(default=None, repr=False)
    cors_origins: Sequence[str] | None = None
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    chat_template: str | None = None
    reply_format: str = "auto"
    warmup: bool = True
    access_log: bool = True
    drain_timeout: float = 30.0
    keep_alive: float = 15.0
    stall_timeout: float = 120.0
    allowed_hosts: Sequence[str] | None = None
    trusted_proxies: Sequence[str] | None = None
    max_connections: int = 8192
    max_body_bytes: int = 16 << 20
    max_prompts: int = 256
    max_n: int = 128
    max_output_tokens: int | None = None
    max_stop: int = 64
    max_stop_length: int = 256
    max_grammar_bytes: int = 64 << 10
    max_waiting: int = 1024
    max_per_client: int | None = None
    allow_chat_template: bool = False

    def __post_init__(self) -> None:
        lowest = {
            "max_stop_length": 1,
            "max_connections": 1,
            "max_body_bytes": 1,
            "max_prompts": 1,
            "max_n": 1,
            "max_stop": 0,
            "max_grammar_bytes": 1,
        }
        for name, low in (lowest | {"max_waiting": 0}).items():
            self._keep(name, require_int(name, getattr(self, name), low))
        self._keep("port", require_int("port", self.port, 0, 65535))
        for name in ("max_output_tokens", "max_per_client"):
            if getattr(self, name) is not None:
                self._keep(name, require_int(name, getattr(self, name), 1))
        for name in ("keep_alive", "stall_timeout"):
            self._keep(name, require_float(name, getattr(self, name), "> 0", 0, math.inf, open_low=True))
        self._keep("drain_timeout", require_float("drain_timeout", self.drain_timeout, ">= 0", 0, math.inf))
        require_choice("reply_format", self.reply_format, ("auto", *FORMATS))
        for name in ("warmup", "access_log", "allow_chat_template"):
            require_bool(name, getattr(self, name))
        for name in ("served_model_name", "api_key", "cors_origins", "allowed_hosts", "trusted_proxies"):
            if getattr(self, name) is not None:
                self._keep(name, _require_texts(name, getattr(self, name)))
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile are given together, got one of them")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path must be empty or a path such as /llm, got {self.root_path!r}")

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, those of the environment included, which white space separates."""
        return (*(self.api_key or ()), *os.environ.get(KEY_VARIABLE, "").split())

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _require_texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text or a sequence of texts, got {type(value).__name__}")
    if not texts or not all(texts):
        raise ValueError(f"{name} must be a sequence of at least one text, none of them empty")
    return tuple(texts)
