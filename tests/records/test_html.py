"""The HTML of an output: what is shown, what is escaped, what the colour says."""

import re
from html.parser import HTMLParser

import pytest
from conftest import load_golden

from jaxinfer import LLM, SamplingParams
from jaxinfer.records.html import OutputView, TokenView, render


class Reader(HTMLParser):
    """Text, attributes and balance of a piece of HTML."""

    def __init__(self, markup):
        super().__init__()
        self.text, self.open, self.spans = "", [], []
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "span":
            self.spans.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_render_escapes_text_everywhere():
    evil = '"><script>alert(1)</script>&amp;'
    token = TokenView(text=evil, logprob=-1.0, alternatives=((evil + "x", -2.0),))
    reader = Reader(render(evil, [OutputView(tokens=(token, TokenView(text=evil)), caption=evil)]))
    assert reader.text.count(evil) == 4
    assert evil + "x" in reader.spans[1]["title"]
    assert "script" not in re.findall(r"<(\w+)", render(evil, []))


@pytest.mark.parametrize(("logprob", "opacity"), [(0.0, "0.00"), (-100.0, "0.85"), (-0.6931472, "0.43")])
def test_render_unlikely_tokens_are_stronger(logprob, opacity):
    markup = render("", [OutputView(tokens=(TokenView(text="a", logprob=logprob),), caption="")])
    assert f"rgba(255, 120, 0, {opacity})" in markup


def test_render_line_breaks_are_visible_and_kept():
    markup = render("", [OutputView(tokens=(TokenView(text="a\nb", logprob=0.0),), caption="")])
    assert "a\u21b5\nb" in Reader(markup).text
    assert Reader(markup).spans[1]["title"] == "a\u21b5b  100.0 %"


def test_repr_html_shows_every_token_with_its_alternatives():
    with LLM(load_golden("gqa").path, max_num_seqs=1, page_size=8, num_kv_pages=16, max_model_len=64) as llm:
        output = llm.generate(
            "hello", SamplingParams(temperature=2.0, seed=1, max_tokens=5, logprobs=3, ignore_eos=True)
        )
        plain = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    reader = Reader(output._repr_html_())
    assert len(reader.spans) == 1 + 5
    for token_id, found, span in zip(output.token_ids, output.logprobs, reader.spans[1:], strict=True):
        rows = span["title"].split("\n")
        assert f"{100 * 2.718281828 ** found[token_id].logprob:.1f} %" in rows[0]
        assert 3 <= len(rows) <= 4
    assert "5 tokens, length, seed 1" in reader.text
    assert plain.text in Reader(plain._repr_html_()).text
    assert "[1, 2]" in Reader(plain._repr_html_()).text
