"""Turns the messages of a conversation into the text of a prompt, with the checkpoint's chat template.

Owns: reading the template files and the names of special tokens; checking messages and tools; the variables that a
template gets; joining a content given in parts, for templates that take strings only; prompts that end inside the last
message (continue_final_message).
Does not know: Jinja (template_sandbox.py renders), token ids, requests, models, jax.
"""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxinfer.sandbox.template_sandbox import TemplateSandbox, TemplateTraits
from jaxinfer.tokenizer.config_file import read_json_object, token_name

logger = logging.getLogger("jaxinfer")

DEFAULT, TOOL_USE = "default", "tool_use"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
CONFIG_FILE = "tokenizer_config.json"
_ARGUMENTS = ("messages", "tools", "add_generation_prompt")
_NUM_KEPT_TRAITS = 8
_NAMED_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """One chat template.

    Args:
      source: the template's text, in Jinja.
      origin: the file or argument it comes from, for error messages.
    """

    source: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplates:
    """The chat templates of a checkpoint, and the special tokens that they may use.

    Args:
      templates: the templates by name. "default" is used, or "tool_use" if there is one and tools are given.
      special_tokens: variable name (bos_token, eos_token and such) -> the token's text.
      directories: where templates were looked for; empty for an LLM whose weights were in memory.
    """

    templates: Mapping[str, ChatTemplate] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    directories: tuple[Path, ...] = ()

    def select(self, chat_template: str | None, *, has_tools: bool, knob: str = "chat_template=...") -> ChatTemplate:
        """Chooses the template to use.

        Args:
          chat_template: a template's text, or the name of one of these templates; None takes the checkpoint's choice.
          has_tools: whether the caller gave tools, even if the list is empty.
          knob: how the user can pass a template, for the error message.

        Raises:
          TypeError: chat_template is not a string.
          ValueError: chat_template is None and the checkpoint has no default, or it is neither a template nor the name
            of one; the message says what is missing.
        """
        if chat_template is None:
            name = TOOL_USE if has_tools and TOOL_USE in self.templates else DEFAULT
            if name in self.templates:
                return self.templates[name]
            raise ValueError(f"{self._missing()}; pass {knob}")
        if not isinstance(chat_template, str):
            raise TypeError(
                f"chat_template must be a template or the name of one, as a string, got {type(chat_template).__name__}"
            )
        if chat_template in self.templates:
            return self.templates[chat_template]
        if "{{" not in chat_template and "{%" not in chat_template:
            names = ", ".join(sorted(self.templates)) or "no templates"
            raise ValueError(
                f"chat_template must be a Jinja template, or the name of one of the checkpoint's, which has {names}; "
                f"got {chat_template!r:.100}, which shows no message"
            )
        return ChatTemplate(source=chat_template, origin="chat_template argument")

    def _missing(self) -> str:
        if not self.directories:
            return "an LLM without a checkpoint directory has no chat template of its own"
        places = " or ".join(map(str, self.directories))
        if self.templates:
            names = ", ".join(sorted(self.templates))
            return f"{places} has no chat template {DEFAULT!r}, only {names}"
        return f"no chat template in {places}: neither {TEMPLATE_FILE} nor chat_template in {CONFIG_FILE}"


def read_chat_templates(directories: Sequence[Path]) -> ChatTemplates:
    """Reads the chat templates of the first directory that has any.

    Templates are the files chat_template.jinja ("default") and additional_chat_templates/*.jinja (each named after its
    file). If there are none, they are the entry "chat_template" of tokenizer_config.json: a template, or a list of
    {"name": ..., "template": ...}. The special tokens come from the tokenizer_config.json of the same directory: every
    "..._token" and those in extra_special_tokens or model_specific_special_tokens that have a name.

    Args:
      directories: folders of a tokenizer or checkpoint, in order of precedence; empty for an LLM whose weights were in
        memory.

    Returns:
      The templates found. If no directory has a template: no templates, and the first directory's special tokens.

    Raises:
      ValueError: a file cannot be read; the message names it.

    Source: transformers 5, tokenization_utils_base.py (_from_pretrained and get_chat_template).
    """
    found = [_read_directory(directory) for directory in directories]
    default = found[0] if found else ChatTemplates()
    chosen = next((entry for entry in found if entry.templates), default)
    return replace(chosen, directories=tuple(directories))


class ChatRenderer:
    """Turns conversations into prompt text.

    Args:
      templates: the checkpoint's templates.
      sandbox: renders the templates, within its limits.
      clock: returns the present time, for templates that write the date.

    Example:
      >>> sandbox = TemplateSandbox()
      >>> renderer = ChatRenderer(ChatTemplates(), sandbox)
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
      >>> renderer.render([{"role": "user", "content": "hi"}], chat_template=template)
      '<user>hi<assistant>'
      >>> sandbox.close()
    """

    def __init__(
        self, templates: ChatTemplates, sandbox: TemplateSandbox, *, clock: Callable[[], datetime] = datetime.now
    ) -> None:
        self._templates = templates
        self._sandbox = sandbox
        self._clock = clock
        self._kept_traits = functools.lru_cache(_NUM_KEPT_TRAITS)(sandbox.traits)
        self._known_to_ignore: set[str] = set()

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Checks and renders one conversation; arguments as check's, errors as check's and those of its result."""
        return self.check(messages, **options)()

    def check(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Callable[[], str]:
        """Checks a conversation without running the template; the arguments are those of LLM.chat.

        Returns:
          A function that renders the conversation and returns the text. Any thread may call it; it waits for the
          sandbox's process. It raises ValueError if the template is broken, refuses the conversation or exceeds a
          limit.

        Raises:
          TypeError, ValueError: the conversation is malformed, or there is no template.
        """
        for name, value in (
            ("add_generation_prompt", add_generation_prompt),
            ("continue_final_message", continue_final_message),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "continue_final_message goes on with the last message and add_generation_prompt begins another; "
                "pass add_generation_prompt=False"
            )
        template = self._templates.select(chat_template, has_tools=tools is not None)
        marker = f"END-OF-FINAL-MESSAGE-{secrets.token_hex(8)} "
        checked = [_checked_message(message, f"message {i}") for i, message in enumerate(_as_list(messages))]
        if not checked:
            raise ValueError("the conversation has no messages; at least one is needed")
        final_text = _mark_end(checked[-1], marker) if continue_final_message else ""
        checked_tools = None if tools is None else [_checked_tool(tool, i) for i, tool in enumerate(_as_list(tools))]
        variables = {
            "documents": None,
            **self._templates.special_tokens,
            **_checked_variables(chat_template_kwargs),
            "messages": checked,
            "tools": checked_tools,
            "add_generation_prompt": add_generation_prompt,
        }
        now = self._clock()

        def render() -> str:
            self._say_if_ignored(template, checked_tools)
            given = variables | {"messages": self._as_the_template_takes_them(checked, template)}
            text = self._sandbox.render(template.source, given, origin=template.origin, now=now)
            return _cut_at(text, marker, final_text, template.origin) if continue_final_message else text

        return render

    def _say_if_ignored(self, template: ChatTemplate, tools: Sequence[Mapping[str, Any]] | None) -> None:
        if not tools or template.source in self._known_to_ignore or self._traits(template).uses_tools:
            return
        self._known_to_ignore.add(template.source)
        logger.warning(
            "%s does not use tools: the %d given are not in the prompt; take a template or a model that knows tools",
            template.origin,
            len(tools),
        )

    def _as_the_template_takes_them(
        self, messages: Sequence[dict[str, Any]], template: ChatTemplate
    ) -> Sequence[dict[str, Any]]:
        """The messages, with the text parts of each content joined if the template takes strings only."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        if self._traits(template).reads_parts:
            return messages
        return [_with_joined_parts(message, number, template.origin) for number, message in enumerate(messages)]

    def _traits(self, template: ChatTemplate) -> TemplateTraits:
        return self._kept_traits(template.source, origin=template.origin)


def as_conversations(messages: Any) -> tuple[list[Any], bool]:
    """Returns the conversations as a list, and whether the caller gave a single one rather than a list of them.

    Raises:
      TypeError: messages is neither a list of messages nor a list of conversations.

    Example:
      >>> as_conversations([{"role": "user", "content": "hi"}])
      ([[{'role': 'user', 'content': 'hi'}]], True)
      >>> as_conversations([])
      ([], False)
    """
    entries = _as_list(messages)
    if any(isinstance(entry, Mapping) for entry in entries):
        return [entries], True
    return [_as_list(entry) for entry in entries], False


def _read_directory(directory: Path) -> ChatTemplates:
    config_file = directory / CONFIG_FILE
    config = read_json_object(config_file) if config_file.exists() else {}
    return ChatTemplates(
        templates=_template_files(directory) or _config_templates(config.get("chat_template"), config_file),
        special_tokens=_special_tokens(config, config_file),
    )


def _template_files(directory: Path) -> dict[str, ChatTemplate]:
    files = {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (directory / TEMPLATE_FILE).exists():
        files[DEFAULT] = directory / TEMPLATE_FILE
    return {name: ChatTemplate(source=_read_text(path), origin=str(path)) for name, path in files.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a template in UTF-8: {error}") from error


def _config_templates(entry: Any, file: Path) -> dict[str, ChatTemplate]:
    entries = [] if entry is None else [{"name": DEFAULT, "template": entry}] if isinstance(entry, str) else entry
    if not isinstance(entries, list) or not all(_is_named_template(item) for item in entries):
        raise ValueError(f'{file}: chat_template must be a string or a list of {{"name", "template"}}, got {entry!r}')
    return {
        item["name"]: ChatTemplate(source=item["template"], origin=f"{file} (chat_template {item['name']!r})")
        for item in entries
    }


def _is_named_template(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)


def _special_tokens(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    # The type is checked because names such as add_bos_token also end in "_token" but are flags.
    entries = {name: e for name, e in config.items() if name.endswith("_token") and isinstance(e, (str, dict))}
    for group in (config.get(name) for name in _NAMED_TOKENS):
        entries |= group if isinstance(group, dict) else {}
    names = {name: token_name(entry, file) for name, entry in entries.items()}
    return {name: text for name, text in names.items() if text is not None}


def _as_list(entries: Any) -> list[Any]:
    if isinstance(entries, (str, bytes, Mapping)) or not hasattr(entries, "__iter__"):
        raise TypeError(
            f'expected a list (of messages like {{"role": "user", "content": "..."}}, of conversations, or of tools), '
            f"got {type(entries).__name__}"
        )
    return list(entries)


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    """A checked copy of a message that consists of plain data, without the entries that are None."""
    if not isinstance(message, Mapping):
        raise TypeError(f'{where} must be a mapping with "role" and "content", got {type(message).__name__}')
    plain = {name: value for name, value in _plain(message, where).items() if value is not None}
    if "role" not in plain:
        raise ValueError(f'{where} has no "role", like "user", "assistant" or "system"')
    if not isinstance(plain["role"], str):
        raise TypeError(f'{where}: "role" must be a string, got {plain["role"]!r}')
    if "content" not in plain and "tool_calls" not in plain:
        raise ValueError(f'{where} (role {plain["role"]!r}) has no "content"')
    if not isinstance(plain.get("content", ""), (str, list, dict)):
        raise TypeError(
            f'{where}: "content" must be a string or a list of parts like {{"type": "text", "text": "..."}}, '
            f"got {plain['content']!r}"
        )
    return plain


def _checked_tool(tool: Any, number: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise TypeError(f"tool {number} must be a JSON schema as a mapping, got {type(tool).__name__}")
    return _plain(tool, f"tool {number}")


def _checked_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(variables, Mapping | None):
        raise TypeError(f"chat_template_kwargs must be a mapping, got {type(variables).__name__}")
    plain = _plain(variables or {}, "chat_template_kwargs")
    for name in _ARGUMENTS:
        if name in plain:
            raise ValueError(f"{name} is an argument of its own, chat_template_kwargs may not hold it")
    return plain


def _plain(value: Any, where: str) -> Any:
    """A copy that consists of dict, list, str, int, float, bool and None only, the types that a template may get."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{where}: names must be strings, got {name!r}")
        return {name: _plain(entry, where) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where) for entry in value]
    raise TypeError(
        f"{where} holds a {type(value).__name__}; expected JSON data (strings, numbers, True, False, None, lists and "
        "mappings of such)"
    )


def _mark_end(message: dict[str, Any], marker: str) -> str:
    """Appends the marker to the message's text, or to its last text part; returns that text without the marker."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + marker
        return content
    parts = content if isinstance(content, list) else []
    texts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts:
        raise ValueError("continue_final_message: the last message has no text to go on with")
    text = texts[-1]["text"]
    texts[-1]["text"] = text + marker
    return text


def _with_joined_parts(message: dict[str, Any], number: int, origin: str) -> dict[str, Any]:
    """The message with its content as a string; the texts of a content in parts are joined.

    Nothing is put between the texts, as in templates that loop over parts.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(
                f'{origin} takes text only, message {number} has the part {part!r:.200}; expected parts like {{"type": '
                f'"text", "text": "..."}}'
            )
    return message | {"content": "".join(part["text"] for part in content)}


def _cut_at(text: str, marker: str, final_text: str, origin: str) -> str:
    """Cuts the rendered text off where the final message's own text ends, which is where the marker begins.

    The marker ends in a space, which shows whether the template strips messages. If the space is still there, the
    template keeps spaces, and so are the message's own kept. If it is gone, the template would have stripped the
    message's trailing spaces too, so they are stripped here.
    """
    end = text.rfind(marker.strip())
    if end < 0 or final_text.strip() not in text:
        raise ValueError(f"{origin}: continue_final_message: the template does not render the last message as it is")
    return text[:end] if text.startswith(marker, end) else text[:end].rstrip()
