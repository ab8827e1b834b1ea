"""Chat templates: transformers' renders byte for byte, where templates come from, what messages may be."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from conftest import GOLDEN

from jaxinfer.sandbox.template_sandbox import SandboxLimits, TemplateSandbox
from jaxinfer.text.chat_template import ChatRenderer, ChatTemplates, as_conversations, read_chat_templates

CHAT = GOLDEN / "chat"
RENDERS = json.loads((CHAT / "renders.json").read_text(encoding="utf-8"))
USER = {"role": "user", "content": "hi"}
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ '>' if add_generation_prompt }}"
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def sandbox():
    sandbox = TemplateSandbox(SandboxLimits(seconds=30))  # a busy machine must not fail these tests
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def renderer(sandbox):
    return ChatRenderer(ChatTemplates(), sandbox)


def render(renderer: ChatRenderer, *messages: Any, **options: Any) -> str:
    return renderer.render(list(messages), **{"chat_template": PLAIN} | options)


def has_parts(record: dict[str, Any]) -> bool:
    messages = RENDERS["conversations"][record["conversation"]]["messages"]
    return any(isinstance(message.get("content"), list) for message in messages)


TEXT_ONLY = ("gemma.jinja", "llama3.jinja", "mistral.jinja")
"""Templates that take no parts; transformers lets them write Python's view of a list, or fail."""
OF_TEXT_ONLY = [record for record in RENDERS["renders"] if has_parts(record) and record["template"] in TEXT_ONLY]


def named(record: dict[str, Any]) -> str:
    return f"{record['template']}-{record['conversation']}"


@pytest.mark.parametrize("record", [record for record in RENDERS["renders"] if record not in OF_TEXT_ONLY], ids=named)
def test_render_golden_conversations_equal_transformers(record, sandbox) -> None:
    templates = ChatTemplates(special_tokens=RENDERS["special_tokens"])
    renderer = ChatRenderer(templates, sandbox, clock=lambda: datetime.fromisoformat(RENDERS["now"]))
    arguments = RENDERS["conversations"][record["conversation"]]
    template = (CHAT / record["template"]).read_text(encoding="utf-8")
    if "error" in record:
        with pytest.raises(ValueError) as raised:
            renderer.render(**arguments, chat_template=template)
        assert record["error"] in str(raised.value)
        assert "\n" not in str(raised.value)
    else:
        assert renderer.render(**arguments, chat_template=template) == record["text"]


@pytest.mark.parametrize("record", OF_TEXT_ONLY, ids=named)
def test_render_golden_conversations_in_parts_of_a_template_for_text_equal_those_in_strings(record, sandbox) -> None:
    templates = ChatTemplates(special_tokens=RENDERS["special_tokens"])
    renderer = ChatRenderer(templates, sandbox)
    arguments = {"chat_template": (CHAT / record["template"]).read_text(encoding="utf-8")}
    arguments |= RENDERS["conversations"][record["conversation"]]
    strings = [
        {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}
        for message in arguments["messages"]
    ]
    assert renderer.render(**arguments) == renderer.render(**arguments | {"messages": strings})


def write(directory: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


TWO = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config tools"}]


@pytest.mark.parametrize(
    ("files", "tools", "name", "expected"),
    [
        ({"chat_template.jinja": "file"}, None, None, "file"),
        ({"tokenizer_config.json": {"chat_template": "config"}}, None, None, "config"),
        ({"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "file"}, None, None, "file"),
        ({"tokenizer_config.json": {"chat_template": TWO}}, None, None, "config"),
        ({"tokenizer_config.json": {"chat_template": TWO}}, [TOOL], None, "config tools"),
        ({"tokenizer_config.json": {"chat_template": TWO}}, [], None, "config tools"),
        ({"tokenizer_config.json": {"chat_template": TWO}}, None, "tool_use", "config tools"),
        ({"tokenizer_config.json": {"chat_template": TWO}, "chat_template.jinja": "file"}, [TOOL], None, "file"),
        ({"additional_chat_templates/rag.jinja": "rag", "chat_template.jinja": "file"}, None, None, "file"),
        ({"additional_chat_templates/rag.jinja": "rag", "chat_template.jinja": "file"}, None, "rag", "rag"),
        ({"additional_chat_templates/tool_use.jinja": "tu", "chat_template.jinja": "file"}, [TOOL], None, "tu"),
        ({"chat_template.jinja": "file"}, None, "argument{{ 1 }}", "argument1"),
    ],
)
def test_template_sources_by_precedence(files, tools, name, expected, sandbox, tmp_path) -> None:
    renderer = ChatRenderer(read_chat_templates([write(tmp_path, files)]), sandbox)
    assert renderer.render([USER], tools=tools, chat_template=name) == expected


def test_template_of_the_first_directory_that_has_one(sandbox, tmp_path) -> None:
    first = write(tmp_path / "a", {"tokenizer_config.json": {"bos_token": "<a>"}})
    second = write(tmp_path / "b", {"tokenizer_config.json": {"bos_token": "<b>", "chat_template": "{{ bos_token }}"}})
    third = write(tmp_path / "c", {"chat_template.jinja": "c"})
    assert ChatRenderer(read_chat_templates([first, second, third]), sandbox).render([USER]) == "<b>"
    only = ChatRenderer(read_chat_templates([first]), sandbox)
    assert only.render([USER], chat_template="{{ bos_token }}") == "<a>"


def test_special_tokens_are_variables(sandbox, tmp_path) -> None:
    config = {
        "bos_token": {"content": "<b>", "lstrip": False},
        "eos_token": "<e>",
        "pad_token": None,
        "image_token": "<i>",
        "add_bos_token": True,
        "extra_special_tokens": {"boi_token": "<boi>"},
    }
    renderer = ChatRenderer(read_chat_templates([write(tmp_path, {"tokenizer_config.json": config})]), sandbox)
    names = ("bos_token", "eos_token", "pad_token", "image_token", "boi_token", "add_bos_token")
    template = "".join("{{ %s }}|" % name for name in names)  # noqa: UP031
    assert renderer.render([USER], chat_template=template) == "<b>|<e>||<i>|<boi>||"
    assert renderer.render([USER], chat_template=template, chat_template_kwargs={"eos_token": "!"}).startswith("<b>|!|")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no chat template in .*chat_template\.jinja.*tokenizer_config\.json; pass chat_template="),
        ({"additional_chat_templates/rag.jinja": ""}, r"no chat template 'default', only rag; pass chat_template="),
        ({"tokenizer_config.json": {"chat_template": 7}}, r"tokenizer_config\.json: chat_template must be a string"),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "x"}]}},
            r"tokenizer_config\.json: chat_template must be",
        ),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: expected a JSON object"),
        ({"tokenizer_config.json": {"bos_token": {"content": 3}}}, r"tokenizer_config\.json: a special token"),
        ({"chat_template.jinja": "a\n{% if %}"}, r"chat_template\.jinja, line 2: TemplateSyntaxError: "),
        ({"chat_template.jinja": "a\n{{ x.y.z }}"}, r"chat_template\.jinja, line 2: UndefinedError: 'x' is undefined"),
        ({"tokenizer_config.json": {"chat_template": "{{ raise_exception('no!') }}"}}, r"'default'\), line 1: no!"),
    ],
)
def test_template_missing_or_broken_names_the_place(files, message, sandbox, tmp_path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        ChatRenderer(read_chat_templates([write(tmp_path, files)]), sandbox).render([USER])
    assert "\n" not in str(raised.value)


def test_template_file_not_utf8_is_named(tmp_path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: expected a template in UTF-8"):
        read_chat_templates([tmp_path])


def test_no_directory_names_the_knob(renderer) -> None:
    with pytest.raises(ValueError, match=r"without a checkpoint directory.*pass chat_template="):
        renderer.render([USER])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"add_generation_prompt": 1}, TypeError, "add_generation_prompt must be True or False, got 1"),
        ({"continue_final_message": "yes"}, TypeError, "continue_final_message must be True or False, got 'yes'"),
        ({"continue_final_message": True}, ValueError, "pass add_generation_prompt=False"),
        ({"chat_template": 5}, TypeError, "chat_template must be .* got int"),
        ({"tools": TOOL}, TypeError, "expected a list .* got dict"),
        ({"tools": [print]}, TypeError, "tool 0 must be a JSON schema as a mapping, got builtin"),
        ({"chat_template_kwargs": [1]}, TypeError, "chat_template_kwargs must be a mapping, got list"),
        ({"chat_template_kwargs": {"messages": 1}}, ValueError, "messages is an argument of its own"),
        ({"chat_template_kwargs": {"x": {1}}}, TypeError, "chat_template_kwargs holds a set; expected JSON data"),
        ({"chat_template_kwargs": {"x": {1: 2}}}, TypeError, "names must be strings, got 1"),
    ],
)
def test_wrong_options_are_refused(options, error, message, renderer) -> None:
    with pytest.raises(error, match=message):
        render(renderer, USER, **options)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("hi", TypeError, 'message 1 must be a mapping with "role" and "content", got str'),
        (None, TypeError, "message 1 must be a mapping"),
        ({"content": "x"}, ValueError, 'message 1 has no "role"'),
        ({"role": None, "content": "x"}, ValueError, 'message 1 has no "role"'),
        ({"role": True, "content": "x"}, TypeError, 'message 1: "role" must be a string, got True'),
        ({"role": "user"}, ValueError, "message 1 .role 'user'. has no \"content\""),
        ({"role": "user", "content": None}, ValueError, 'has no "content"'),
        ({"role": "user", "content": True}, TypeError, 'message 1: "content" must be a string or a list'),
        ({"role": "user", "content": 5}, TypeError, 'message 1: "content" must be a string or a list'),
        ({"role": "user", "content": b"x"}, TypeError, "message 1 holds a bytes; expected JSON data"),
        ({"role": "user", "content": [{"type": "image", "image": object()}]}, TypeError, "message 1 holds a object"),
    ],
)
def test_malformed_message_is_named(entry, error, message, renderer) -> None:
    with pytest.raises(error, match=message):
        render(renderer, USER, entry)


def test_empty_conversation_is_refused(renderer) -> None:
    with pytest.raises(ValueError, match="at least one"):
        render(renderer)


def test_any_mapping_and_sequence_is_a_message(renderer) -> None:
    frozen = MappingProxyType({"role": "user", "content": ({"type": "text", "text": "a"},), "name": None})
    template = "{{ messages[0].content[0].text }}{{ 'name' in messages[0] }}"
    assert renderer.render((frozen,), chat_template=template) == "aFalse"


def test_tool_calls_need_no_content(renderer) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert render(renderer, USER, message, chat_template="{{ messages[1] | tojson }}") == json.dumps(
        {"role": "assistant", "tool_calls": message["tool_calls"]}
    )


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(messages[0]) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ messages[0].pop('content') }}",
        "{{ messages[0].content.append(1) }}",
        "{{ messages[0]['setdefault']('x', 1) }}",
        "{{ messages | map(attribute='clear') | first }}{% for m in messages %}{{ m.clear() }}{% endfor %}",
        "{% set messages[0].content = 'x' %}",
        "{{ messages.sort() }}",
    ],
)
def test_template_cannot_change_the_messages(attack, renderer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    before = copy.deepcopy(messages)
    with pytest.raises(ValueError, match="chat_template argument"):
        renderer.render(messages, chat_template=attack)
    assert messages == before


def test_innocent_template_works_on_its_own_copies(renderer) -> None:
    template = (
        "{% set messages = messages[1:] + [messages[0]] %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set m = dict(m, content=m.content|upper) %}"
        "{{ ns.n }}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = copy.deepcopy(messages)
    assert renderer.render(messages, chat_template=template) == "1B2A"
    assert messages == before


PARTS = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
ADDING = "{% for m in messages %}{{ '[' + m.role + ']' + m['content'] }}{% endfor %}"
READERS = {
    "a loop": "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}",
    "a loop over a name": (
        "{% for m in messages %}{% set c = m['content'] %}{% if c is not string %}{% for p in c %}{{ p.text }}|"
        "{% endfor %}{% endif %}{% endfor %}"
    ),
    "a loop in a macro": (
        "{% macro show(content, n) %}{% for p in content %}{{ p['text'] }}|{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content, 1) }}{% endfor %}"
    ),
    "a loop over a choice": (
        "{% for m in messages %}{% for p in (m.get('content') or [])[:9] %}{{ p.text }}|{% endfor %}{% endfor %}"
    ),
    "a filter": "{% for m in messages %}{{ m.content | map(attribute='text') | join('|') }}|{% endfor %}",
    "the number of a part": "{{ messages[0]['content'][0]['text'] }}|{{ messages[0].content[1].text }}|",
}
STRINGS = {
    "addition": ADDING,
    "a test": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
    "a method": "{{ messages[0].content.strip() }}{{ messages[0].content.split('</think>')[-1] }}",
    "a loop over lines": "{% for line in messages[0].content.split('\n') %}{{ line }}{% endfor %}",
    "a character": "{{ messages[0].content[0] }}{% for c in messages[0].content.upper() %}{{ c }}{% endfor %}",
}


@pytest.mark.parametrize("template", READERS.values(), ids=READERS)
def test_parts_reach_a_template_that_reads_them(template, renderer) -> None:
    assert render(renderer, PARTS, chat_template=template) == "one |two|"


@pytest.mark.parametrize("template", STRINGS.values(), ids=STRINGS)
def test_parts_are_one_string_to_a_template_that_takes_strings(template, renderer) -> None:
    before = copy.deepcopy(PARTS)
    expected = render(renderer, {"role": "user", "content": "one two"}, chat_template=template)
    assert render(renderer, PARTS, chat_template=template) == expected
    assert before == PARTS


def test_parts_continued_as_the_final_message_end_within_it(renderer) -> None:
    final = {"role": "assistant", "content": [{"type": "text", "text": "so "}, {"type": "text", "text": "far"}]}
    assert render(renderer, USER, final, chat_template=ADDING, **FINAL) == "[user]hi[assistant]so far"


@pytest.mark.parametrize("part", [{"type": "image", "url": "x"}, "text", {"type": "text"}, {"text": 3}])
def test_parts_that_are_no_text_are_refused_by_a_template_for_text(part, renderer) -> None:
    expected = r"chat_template argument takes text only, message 1 has the part .*; expected parts like"
    with pytest.raises(ValueError, match=expected):
        render(renderer, USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}, chat_template=ADDING)


def test_tools_that_a_template_ignores_are_said_once(sandbox, caplog) -> None:
    renderer = ChatRenderer(ChatTemplates(), sandbox)
    for template in (PLAIN, PLAIN, "{% set tools = [] %}" + PLAIN):
        assert render(renderer, USER, tools=[TOOL, TOOL], chat_template=template) == "user:hi;>"
    assert len(caplog.records) == 2
    expected = "chat_template argument does not use tools: the 2 given are not in the prompt"
    assert caplog.records[0].getMessage().startswith(expected)


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools | length }}",
        "{% if tools is defined %}{% endif %}",
        "{% if not tools is defined %}{% set tools = none %}{% endif %}",
        "{% macro f() %}{{ tools }}{% endmacro %}",
        "{% for m in messages %}{% if tools %}{% endif %}{% endfor %}",
    ],
)
def test_tools_that_a_template_uses_are_no_news(template, renderer, caplog) -> None:
    render(renderer, USER, tools=[TOOL], chat_template=template)
    render(renderer, USER, tools=[], chat_template=PLAIN)
    assert not caplog.records


FINAL = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.mark.parametrize(
    ("content", "template", "expected"),
    [
        ("two  ", PLAIN, "user:hi;assistant:two  "),
        ("", PLAIN, "user:hi;assistant:"),
        ("hi", PLAIN, "user:hi;assistant:hi"),
        (" two  ", PLAIN.replace("m.content", "m.content|trim"), "user:hi;assistant:two"),
    ],
)
def test_continue_final_message_ends_within_it(content, template, expected, renderer) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    assert render(renderer, *messages, chat_template=template, **FINAL) == expected
    assert messages[1]["content"] == content


@pytest.mark.parametrize(
    ("message", "template", "error"),
    [
        ({"role": "assistant", "content": [{"type": "image"}]}, PLAIN, "no text to go on with"),
        ({"role": "assistant", "tool_calls": []}, PLAIN, "no text to go on with"),
        ({"role": "assistant", "content": "two"}, "{{ messages[0].content }}", "does not render the last message"),
        (
            {"role": "assistant", "content": "two"},
            "{{ messages[1].content|upper }}",
            "does not render the last message",
        ),
    ],
)
def test_continue_final_message_without_its_text_is_refused(message, template, error, renderer) -> None:
    with pytest.raises(ValueError, match=error):
        render(renderer, USER, message, chat_template=template, **FINAL)


def test_as_conversations_tells_one_from_many() -> None:
    assert as_conversations([USER]) == ([[USER]], True)
    assert as_conversations((USER, USER)) == ([[USER, USER]], True)
    assert as_conversations([[USER], (USER, USER)]) == ([[USER], [USER, USER]], False)
    assert as_conversations([]) == ([], False)
    assert as_conversations([[]]) == ([[]], False)
    assert as_conversations([[USER], USER]) == ([[[USER], USER]], True)  # refused as a message
    for wrong in ("hi", USER, 5, None, ["hi"], [5]):
        with pytest.raises(TypeError, match="expected a list"):
            as_conversations(wrong)
