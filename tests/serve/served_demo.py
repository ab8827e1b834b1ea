"""The bundled model behind a server, made to say what a test wants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from shared_programs import take_few_programs

from jaxinfer import LLM
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.server import BackgroundServer

TEMPLATE = "{#- <think> <tool_call> -#}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""A chat template that is taken for one of the Hermes format, and that shows no tools, which take many tokens."""
ENGINE = {"max_num_seqs": 8, "num_kv_pages": 128, "page_size": 16, "max_num_batched_tokens": 64}
SETTINGS = {"port": 0, "warmup": False, "chat_template": TEMPLATE}


@contextlib.contextmanager
def served_demo(**settings: Any) -> Iterator[tuple[LLM, BackgroundServer]]:
    """The model and a server on a port of its own."""
    config = ServeConfig(**SETTINGS | settings)
    with pytest.MonkeyPatch.context() as patch:
        take_few_programs(patch.setattr)
        with LLM("demo", **ENGINE) as llm, BackgroundServer(llm, config) as server:
            yield llm, server


def saying(text: str) -> dict[str, Any]:
    """The field of a request that makes the model say a text."""
    return {"structured_outputs": {"choice": [text]}}
