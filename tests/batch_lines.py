"""Lines of requests for tests of batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def requests(count: int, *, max_tokens: int = 4) -> Iterator[dict[str, Any]]:
    """Lines of requests of both kinds, with and without seeds."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for number in range(count):
        body = {"model": "any", "temperature": 1.0, "max_tokens": 1 + number % max_tokens}
        if number % 4 == 0:
            messages = [{"role": "user", "content": f"hello {number % 9}"}]
            body |= {"messages": messages, "chat_template": template, "n": 2}
        else:
            body |= {"prompt": [number % 200, 1 + number % 7], "seed": number if number % 3 else None}
        url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        yield {"custom_id": f"request {number}", "method": "POST", "url": url, "body": body}


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
