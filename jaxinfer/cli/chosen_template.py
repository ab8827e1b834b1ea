"""Which chat template a flag names.

Owns: telling files from the names of a model's templates; the errors about neither.
Does not know: what templates say.
"""

from __future__ import annotations

from pathlib import Path

from jaxinfer.text.chat_template import ChatTemplates


def chosen_template(given: str | None, found: ChatTemplates, *, flag: str) -> str | None:
    """The argument chat_template of LLM.chat for a flag.

    Args:
      given: what the flag says: a template's name or a file; None for the model's default template.
      found: the model's templates.
      flag: names the flag in errors.

    Raises:
      ValueError: it is neither, or the file is not text.
    """
    if given is None or given in found.templates:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        names = ", ".join(sorted(found.templates)) or "none"
        raise ValueError(
            f"{flag} must be a file or the name of one of the model's templates ({names}), got {given}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {given} is not UTF-8 text: {error}") from error
