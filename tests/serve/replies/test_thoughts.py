"""The tokens of thoughts, counted."""

import pytest

from jaxinfer.serve.replies.formats import FORMATS, find_format
from jaxinfer.serve.replies.thoughts import ThoughtCount, ThoughtMarkers

OPEN, CLOSE = 1, 2


class MarkerTokenizer:
    """Has tokens for two markers; other texts are one token a character."""

    def encode_plain(self, text):
        return {"<think>": [OPEN], "</think>": [CLOSE]}.get(text, list(text.encode()))

    def token_text(self, token_id):
        return {OPEN: "<think>", CLOSE: "</think>"}[token_id]


@pytest.mark.parametrize(
    ("token_ids", "is_open", "expected"),
    [
        ([50, 51, CLOSE, 52], True, 2),
        ([50, 51], True, 2),
        ([OPEN, 50, 51, CLOSE, 52], False, 2),
        ([50, 51], False, 0),
        ([OPEN, 50, CLOSE, 51, OPEN, 52, CLOSE], False, 1),
        ([50, OPEN, 51, 52], False, 0),
        ([], True, 0),
    ],
)
def test_thoughts_are_what_is_between_the_markers(token_ids, is_open, expected):
    markers = ThoughtMarkers.of(FORMATS["hermes"], MarkerTokenizer())
    whole, pieces = ThoughtCount(markers, is_open=is_open), ThoughtCount(markers, is_open=is_open)
    whole.add(token_ids)
    for token_id in token_ids:
        pieces.add([token_id])
    assert whole.number == pieces.number == expected


@pytest.mark.parametrize("format", ["plain", "llama", "gemma"])
def test_without_markers_that_are_tokens_nothing_is_counted(format):
    assert ThoughtMarkers.of(FORMATS[format], MarkerTokenizer()) is None
    assert ThoughtMarkers.of(FORMATS["hermes"], None) is None


def test_template_that_shows_arguments_between_tags_is_not_taken_for_the_hermes_format():
    assert find_format("<tool_call>\n<function=f>\n<parameter=a>\n") == "qwen-xml"
    assert find_format('<tool_call>\n{"name": ..}') == "hermes"
