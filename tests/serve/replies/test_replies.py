"""Replies taken apart: recorded ones of five families against what canitoolcall expects of them, and our own edges."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
from canitoolcall.fixtures import load_fixtures

from jaxinfer.serve.replies.formats import FORMATS
from jaxinfer.serve.replies.parser import ReplyParser
from jaxinfer.serve.replies.parts import Content, Part, Reasoning, ToolCall

FAMILIES = {
    "qwen3-hermes": "hermes",
    "qwen3-xml": "qwen-xml",
    "llama": "llama",
    "mistral": "mistral",
    "gemma4": "gemma",
}
THOUGHT = "qwen3-xml/llamacpp-q35-call-inside-think"
"""A call among thoughts that do not end is a thought here, as a call that the model thinks of making."""
FIXTURES = {one.id: one for one in load_fixtures(families=list(FAMILIES)) if one.id != THOUGHT}


def chunks(text: str) -> Iterator[list[str]]:
    """Ways in which a text may arrive: at once, by characters, in pieces of many lengths."""
    yield [text]
    yield list(text)
    for seed, longest in enumerate((3, 8, 20, 60)):
        rng, pieces, start = random.Random(seed), [], 0
        while start < len(text):
            end = start + rng.randint(1, longest)
            pieces.append(text[start:end])
            start = end
        yield pieces


def parse(parser: ReplyParser, pieces: list[str], *, cut_off: bool = False) -> list[Part]:
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return [*parts, *parser.end(cut_off=cut_off)]


def summary(parts: list[Part]) -> tuple[str, str, list[tuple[str, object]]]:
    content, thoughts = ("".join(part.text for part in parts if type(part) is kind) for kind in (Content, Reasoning))
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ToolCall)]
    return content, thoughts, calls


@pytest.mark.parametrize("name", FIXTURES)
def test_recorded_reply_is_taken_apart_as_expected_however_it_arrives(name):
    fixture = FIXTURES[name]
    tools = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in fixture.tools}
    found = []
    for pieces in chunks(fixture.raw_output):
        parser = ReplyParser(FORMATS[FAMILIES[fixture.family]], prompt=fixture.generation_prompt or "", tools=tools)
        found.append(summary(parse(parser, pieces, cut_off="truncated" in fixture.tags)))
    assert found == [found[0]] * len(found)
    content, thoughts, calls = found[0]
    if fixture.expected is None:
        assert calls == []
        return
    assert calls == [(call.name, call.arguments) for call in fixture.expected.tool_calls]
    assert thoughts == (fixture.expected.reasoning_content or "")
    assert content.strip() == (fixture.expected.content or "").strip()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "text", ["", " ", "\n a < b [x] {y}\n", "a <tool", "[", "{", "<think", "[1] is a source", "a\n\n"]
)
def test_text_without_markers_is_content_to_the_letter(format, text):
    for pieces in chunks(text):
        parts = parse(ReplyParser(FORMATS[format], tools={"f": {}}), pieces)
        assert "".join(part.text for part in parts) == text
        assert all(isinstance(part, Content) for part in parts)


def test_content_is_given_out_as_soon_as_no_marker_can_begin_in_it():
    parser = ReplyParser(FORMATS["hermes"], tools={"f": {}})
    assert parser.feed("one two") == [Content("one two")]
    assert parser.feed(" <tool") == []
    assert parser.feed("box>") == [Content(" <toolbox>")]


def test_json_that_is_no_call_is_given_out_once_it_is_whole():
    parser = ReplyParser(FORMATS["llama"], tools={"f": {}})
    assert parser.feed('{"name": "g", "parameters": {') == []
    assert parser.feed("}}") == [Content('{"name": "g", "parameters": {}}')]
    assert parser.feed(" {") == [Content(" {")]


def test_calls_without_tools_are_content():
    text = '<think>a</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parts = parse(ReplyParser(FORMATS["hermes"]), [text])
    assert summary(parts) == (text.partition("\n\n")[2], "a", [])


def test_thoughts_that_the_prompt_began_go_on():
    parser = ReplyParser(FORMATS["think"], prompt="<|im_start|>assistant\n<think>\n")
    assert parser.feed("Well") == [Reasoning("Well")]
    assert parser.feed(".\n</think>\n\nYes") == [Reasoning("."), Content("Yes")]


def test_malformed_call_between_good_ones_is_content():
    good = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    text = f"{good}\n<tool_call>{{nothing}}</tool_call>\n{good}"
    for pieces in chunks(text):
        content, _, calls = summary(parse(ReplyParser(FORMATS["hermes"], tools={"f": {}}), pieces))
        assert calls == [("f", {"a": 1})] * 2
        assert content == "\n<tool_call>{nothing}</tool_call>"


@pytest.mark.parametrize(
    "arguments", ['{"a": NaN}', '{"a": 1, "a": 2}', "[1]", '"x"', "[" * 100_000, '{"a": ' * 100_000]
)
def test_arguments_that_are_no_json_object_make_no_call(arguments):
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert summary(parse(ReplyParser(FORMATS["hermes"], tools={"f": {}}), [text])) == (text, "", [])


@pytest.mark.parametrize(
    "text", ["[f(1)]", "[f(**a)]", "[f(a=g)]", "[f(a=1, a=2)]", "[f(a=b'')]", "[f(a=1e999)]", "[f("]
)
def test_python_that_is_no_call_is_content(text):
    assert summary(parse(ReplyParser(FORMATS["llama"], tools={"f": {}}), [text])) == (text, "", [])


def test_several_calls_of_llama_in_json():
    text = '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}'
    for pieces in chunks(text):
        assert summary(parse(ReplyParser(FORMATS["llama"], tools={"f": {}, "g": {}}), pieces))[2] == [
            ("f", {"a": 1}),
            ("g", {}),
        ]


SCHEMA = {
    "properties": {
        "a": {"type": "integer"},
        "b": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "level": {"enum": ["1", "2"]},
        "kind": {"$ref": "#/$defs/Kind"},
        "odd": {"type": None},
        "number": {"type": "number"},
    },
    "$defs": {"Kind": {"const": "true"}},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<parameter=a>\n7\n</parameter>\n<parameter=b>\n7\n</parameter>", {"a": 7, "b": "7"}),
        ("<parameter=a>\nmany\n</parameter>\n<parameter=b>\nNone\n</parameter>", {"a": "many", "b": None}),
        ("<parameter=a>\n7\n<parameter=b>\nx <parameter=a>\n</parameter>", {"a": 7, "b": "x <parameter=a>"}),
        ("<parameter=b>\n<parameter=c>\n</parameter>", {"b": "<parameter=c>"}),
        ("<parameter=unknown>\n[1]\n</parameter>", {"unknown": [1]}),
        ("<parameter=a>\n<parameter=b>\n5\n</parameter>", {"a": "", "b": "5"}),
        ("<parameter=level>\n1\n</parameter>\n<parameter=kind>\ntrue\n</parameter>", {"level": "1", "kind": "true"}),
        ("<parameter=odd>\n1\n</parameter>\n<parameter=number>\n1e999\n</parameter>", {"odd": 1, "number": "1e999"}),
    ],
)
def test_arguments_between_tags_have_the_types_of_the_schema(text, expected):
    reply = f"<tool_call>\n<function=f>\n{text}\n</function>\n</tool_call>"
    for pieces in chunks(reply):
        parts = parse(ReplyParser(FORMATS["qwen-xml"], tools={"f": SCHEMA}), pieces)
        assert summary(parts) == ("", "", [("f", expected)])


def test_argument_that_comes_twice_makes_no_call():
    twice = "<parameter=a>\n7\n</parameter>\n" * 2
    reply = f"<tool_call>\n<function=f>\n{twice}</function>\n</tool_call>"
    assert summary(parse(ReplyParser(FORMATS["qwen-xml"], tools={"f": SCHEMA}), [reply])) == (reply, "", [])


@pytest.mark.parametrize(
    "text", ["write <function=foo> like this", "a <function=f> too", "<tool_call>and more", "<function=f"]
)
def test_text_about_calls_between_tags_is_not_withheld(text):
    for pieces in chunks(text):
        parser = ReplyParser(FORMATS["qwen-xml"], tools={"f": {}})
        parts = [part for piece in pieces for part in parser.feed(piece)]
        held = "<function=f" if text.endswith("<function=f") else ""
        assert summary(parts)[0] == text.removesuffix(held)
        assert summary([*parts, *parser.end()]) == (text, "", [])


def test_call_of_an_unknown_tool_between_tags_is_given_out_as_in_other_formats():
    reply = "<tool_call>\n<function=other>\n</function>\n</tool_call>"
    assert summary(parse(ReplyParser(FORMATS["qwen-xml"], tools={"f": {}}), list(reply))) == ("", "", [("other", {})])


def test_arguments_that_nest_too_deeply_are_content():
    """Some depths can still be read, and no longer be written."""
    for depth in range(500, 1100, 5):
        reply = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * depth + "]" * depth + "}}</tool_call>"
        parts = parse(ReplyParser(FORMATS["hermes"], tools={"f": {}}), [reply])
        assert [type(part) for part in parts] == [ToolCall] or parts == [Content("<tool_call>"), Content(reply[11:])]
    assert depth > 1000
