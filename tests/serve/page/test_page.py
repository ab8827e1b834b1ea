"""The playground, driven in a real Chromium against a real server.

The tests are left out by default: `pytest -m browser tests/serve/page` runs them. They need the package playwright and,
for the audit, axe-playwright-python. The browser is the system's chromium, so that playwright need not download one.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.server import BackgroundServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not on PATH"),
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="needs the package playwright"),
]

KEY = "a-key-for-tests"
PROMPT = "In the beginning"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TIMEOUT = 30_000  # milliseconds; the first request of a kind compiles
ONE_BYTE_AT_A_TIME = """
    const real = window.fetch;
    window.fetch = async (...request) => {
      const answer = await real(...request);
      const cut = new TransformStream({
        transform(chunk, out) { for (const byte of chunk) out.enqueue(new Uint8Array([byte])); },
      });
      return new Response(answer.body.pipeThrough(cut), answer);
    };
"""


COUNTS_SHIFTS = """
    window.shifts = 0;
    new PerformanceObserver((list) => { window.shifts += list.getEntries().length; })
      .observe({ type: "layout-shift", buffered: true });
"""


def _number(kind: str, default: Any, **more: Any) -> dict[str, Any]:
    return {"type": kind, "default": default, "description": f"a {kind}"} | more


def _or_null(form: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [form, {"type": "null"}], "default": None, "description": "may be null"}


STRINGS = {"type": "array", "items": {"type": "string"}}
SCHEMA = {
    "n": _number("integer", 1, minimum=1, maximum=16384),
    "temperature": _number("number", 1.0, minimum=0),
    "top_p": _number("number", 1.0, exclusiveMinimum=0, maximum=1),
    "top_k": _number("integer", 0, minimum=-1),
    "seed": _or_null({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
    "max_tokens": {"type": ["integer", "null"], "default": 16, "minimum": 0, "description": "new tokens at most"},
    "stop": {"anyOf": [{"type": "string"}, STRINGS, {"type": "null"}], "default": None, "description": "ends the text"},
    "ignore_eos": {"type": "boolean", "default": False, "description": "goes on after the end token"},
    "logit_bias": _or_null({"type": "object", "additionalProperties": {"type": "number"}}),
    "logprobs": _or_null({"type": "integer"}),
    "kind": {"enum": ["a", "b"], "default": "a", "description": "one of some"},
}


@dataclass
class Tab:
    """A page that is open, with what it has asked for and complained of."""

    page: Any
    asked: list[dict[str, Any]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def generate(self, text: str | None = None) -> None:
        """Sends a text, and waits for the end of the answer."""
        self.start(text)
        self.page.locator("#status").filter(has_text=re.compile("^(Done|Stopped|Failed)")).wait_for()

    def start(self, text: str | None = None) -> None:
        if text is not None:
            self.page.fill("#input", text)
        self.page.click("#send")

    def set(self, **settings: Any) -> None:
        for name, value in settings.items():
            self.page.fill(f"#setting-{name}", str(value))

    def texts(self, place: str = "#results") -> list[str]:
        return self.page.locator(f"{place} .card > .text").evaluate_all("all => all.map((one) => one.textContent)")

    @property
    def status(self) -> str:
        return self.page.inner_text("#status")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo") as llm:
        yield llm


def _server(llm: LLM, **settings: Any) -> BackgroundServer:
    return BackgroundServer(llm, ServeConfig(port=0, warmup=False, access_log=False, **settings))


@pytest.fixture(scope="module")
def url(llm) -> Iterator[str]:
    with _server(llm, chat_template=TEMPLATE) as server:
        yield server.url


@pytest.fixture(scope="module")
def locked_url(llm) -> Iterator[str]:
    with _server(llm, api_key=[KEY]) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox of Chromium does not work for root, as which containers run.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser) -> Iterator[Callable[..., Tab]]:
    contexts, tabs = [], []

    def open_tab(url: str, *, mode: str | None = None, may_complain: bool = False, script: str = "", **options) -> Tab:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT)
        context.add_init_script(script)
        tab = Tab(page=context.new_page())
        if not may_complain:
            tabs.append(tab)
        tab.page.on("console", lambda told: tab.complaints.append(told.text) if told.type == "error" else None)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("request", lambda one: tab.asked.append(one.post_data_json) if one.method == "POST" else None)
        body = {"openapi": "3.1.0", "components": {"schemas": {"SamplingParams": {"properties": SCHEMA}}}}
        tab.page.route("**/openapi.json", lambda route: route.fulfill(json=body))
        tab.page.goto(f"{url}/")
        if mode is not None:
            tab.page.wait_for_selector("#setting-seed")
            tab.page.check(f"[name=mode][value={mode}]")
        return tab

    yield open_tab
    for context in contexts:
        context.close()
    assert [tab.complaints for tab in tabs if tab.complaints] == []


def _answer(tab: Tab, path: str, *events: Any) -> None:
    """Answers the page's requests in place of the server: with a comment, lines that end in CR LF, and these events."""
    body = ": hello\r\n\r\n" + "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events)
    tab.page.route(f"**{path}", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def _delta(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}


def _params(llm: LLM, **settings: Any) -> SamplingParams:
    """What a request gets that has these settings: the rest is the checkpoint's own."""
    return dataclasses.replace(llm.default_params, **settings)


def _bare(name: str) -> str:
    """A token's name without the blanks around it, which the page shows as ␣."""
    return name.strip(" ␣")


def _running(url: str) -> int:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return int(float(re.search(r"^jaxinfer_num_requests_running\S* (\S+)$", text, re.MULTILINE)[1]))


def test_completion_text_is_that_of_generate(llm, url, open_tab):
    tab = open_tab(url, mode="completion")
    tab.set(seed=5, max_tokens=40)
    tab.generate(PROMPT)
    wanted = llm.generate(PROMPT, _params(llm, seed=5, max_tokens=40)).outputs[0]
    assert tab.texts() == [wanted.text]
    assert tab.status.startswith(f"Done: {len(wanted.token_ids)} tokens")
    assert tab.page.locator("#results dd").all_inner_texts()[:2] == [wanted.finish_reason, str(len(wanted.token_ids))]
    assert tab.asked[0] == {
        "model": "demo",
        "prompt": PROMPT,
        "seed": 5,
        "max_tokens": 40,
        "stream": True,
        "logprobs": 5,
    }


def test_completion_read_byte_by_byte_is_the_same(llm, url, open_tab):
    tab = open_tab(url, mode="completion", script=ONE_BYTE_AT_A_TIME)
    tab.set(seed=5, max_tokens=12)
    tab.generate("“And” ümläuts")
    assert tab.texts() == [llm.generate("“And” ümläuts", _params(llm, seed=5, max_tokens=12)).outputs[0].text]


def test_completion_each_token_is_an_element_with_its_text(llm, url, open_tab):
    tab = open_tab(url, mode="completion")
    tab.set(seed=6, max_tokens=30)
    tab.generate(PROMPT)
    output = llm.generate(PROMPT, _params(llm, seed=6, max_tokens=30, logprobs=0)).outputs[0]
    assert tab.texts() == [output.text]
    pieces = tab.page.locator("#results .t").all_text_contents()
    names = [found[token].decoded_token for token, found in zip(output.token_ids, output.logprobs, strict=True)]
    assert [piece.strip() for piece in pieces] == [name.strip() for name in names]


def test_chat_answers_are_continued(llm, url, open_tab):
    tab = open_tab(url, mode="chat")
    tab.set(seed=1, max_tokens=8)
    tab.generate("Who made the light?")
    tab.generate("And then?")
    roles = tab.page.locator("#conversation h3:visible").all_inner_texts()
    assert [role.lower() for role in roles] == ["user", "assistant", "user", "assistant"]
    messages = tab.asked[1]["messages"]
    answer = llm.chat(messages[:1], _params(llm, seed=1, max_tokens=8), chat_template=TEMPLATE).outputs[0]
    assert messages[1] == {"role": "assistant", "content": answer.text}
    assert (tab.asked[1]["logprobs"], tab.asked[1]["top_logprobs"]) == (True, 5)


def test_chat_messages_are_edited_deleted_and_regenerated(url, open_tab):
    tab = open_tab(url, mode="chat")
    tab.set(max_tokens=4)
    tab.page.click("summary:has-text('System message')")
    tab.page.fill("#system", "be brief")
    tab.generate("one")
    tab.page.click("[aria-label='Edit message 1']")
    tab.page.fill("[aria-label='Message 1']", "two")
    tab.page.click("text=Save")
    tab.page.fill("#input", "not sent yet")
    tab.page.click("[aria-label='Regenerate message 2']")
    tab.page.wait_for_selector("[aria-label='Regenerate message 2']:enabled")
    assert tab.asked[1]["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]
    tab.page.click("[aria-label='Delete message 1']")
    assert tab.page.locator("#conversation .message").count() == 1
    tab.page.reload()
    tab.page.wait_for_selector("#setting-seed")
    assert tab.page.locator("#conversation .message").count() == 1
    assert tab.page.input_value("#system") == "be brief"


def test_chat_thoughts_and_calls_are_told_apart(url, open_tab):
    tab = open_tab(url, mode="chat")
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "noon"}'}}
    _answer(
        tab,
        "/v1/chat/completions",
        _delta(role="assistant", content=""),
        _delta(reasoning="let me see"),
        _delta(tool_calls=[call]),
        _delta("tool_calls"),
    )
    tab.start("Is it blue?")
    tab.page.wait_for_selector(".calls code")
    assert tab.page.inner_text(".calls code") == 'sky({"at": "noon"})'
    assert tab.page.text_content("[data-role=assistant] .reasoning") == "let me see"
    # The body of the stub ends without [DONE], which the page says.
    assert tab.page.text_content("#problem") == "The connection ended before the answer was complete."
    assert tab.page.inner_text("#input-label") == "Result of sky"
    tab.page.unroute("**/v1/chat/completions")
    tab.generate("yes")
    assert tab.asked[1]["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "yes"}


def test_chat_without_template_is_not_offered(url, open_tab):
    tab = open_tab(url, mode="chat")
    model = {"id": "demo", "max_model_len": 512, "has_chat_template": False}
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"data": [model]}))
    tab.page.reload()
    tab.page.wait_for_selector("#no-chat:visible")
    assert tab.page.is_disabled("[value=chat]")
    assert tab.page.is_checked("[value=completion]")


def test_chat_without_message_says_so(url, open_tab):
    tab = open_tab(url, mode="chat")
    tab.start()
    assert tab.status == "There is no message to answer yet."
    assert tab.asked == []


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_n_samples_are_side_by_side(url, open_tab, mode):
    tab = open_tab(url, mode=mode, viewport={"width": 1400, "height": 900})
    tab.set(n=3, max_tokens=12, seed=3)
    tab.generate(PROMPT)
    place = "#results" if mode == "completion" else "#conversation"
    boxes = tab.page.locator(f"{place} .card").evaluate_all("all => all.map((one) => one.getBoundingClientRect().y)")
    assert len(set(tab.texts(place))) == len(boxes) == 3
    assert len(set(boxes)) == 1
    assert tab.page.locator(f"{place} .card dd:first-of-type").first.inner_text() in ("length", "stop")
    if mode == "chat":
        tab.page.locator("text=Continue with this").nth(2).click()
        tab.generate("more")
        assert tab.asked[1]["messages"][1]["content"] == tab.texts(place)[2]


def test_settings_moved_by_slider_reach_the_request(url, open_tab):
    tab = open_tab(url, mode="completion")
    slider = tab.page.locator("[aria-label='temperature, slider']")
    slider.focus()
    for _ in range(10):
        slider.press("ArrowLeft")
    tab.page.fill("#setting-stop", "the\n\\n")
    tab.page.click("text=More settings")
    tab.page.check("#setting-ignore_eos")
    tab.page.fill("#setting-logit_bias", '{"5": 1}')
    tab.generate()
    assert tab.page.input_value("#setting-temperature") == "0.9"
    sent = {"temperature": 0.9, "stop": ["the", "\n"], "ignore_eos": True, "logit_bias": {"5": 1}}
    assert {name: tab.asked[0][name] for name in SCHEMA if name in tab.asked[0] and name != "logprobs"} == sent
    tab.page.click("#reset")
    tab.generate()
    assert set(tab.asked[1]) == {"model", "prompt", "stream", "logprobs"}


def test_settings_that_are_no_json_are_not_sent(url, open_tab):
    tab = open_tab(url, mode="completion")
    tab.page.click("text=More settings")
    tab.page.fill("#setting-logit_bias", "{")
    tab.start()
    assert tab.page.locator("#setting-logit_bias").evaluate("(one) => one.validationMessage").startswith("logit_bias")
    assert tab.asked == []


def test_tokens_show_alternatives_to_pointer_and_keyboard(llm, url, open_tab):
    tab = open_tab(url, mode="completion")
    tab.set(seed=5, max_tokens=10)
    tab.generate(PROMPT)
    tokens, tip = tab.page.locator("#results .t"), tab.page.locator("#tip")
    tokens.nth(3).hover()
    output = llm.generate(PROMPT, _params(llm, seed=5, max_tokens=10, logprobs=5)).outputs[0]
    best = sorted(output.logprobs[3].values(), key=lambda one: one.rank)
    assert [_bare(name) for name in tip.locator("li code").all_inner_texts()] == [
        _bare(one.decoded_token) for one in best
    ]
    tab.page.mouse.move(0, 0)
    tip.wait_for(state="hidden")

    assert tab.page.locator("#results [tabindex]").count() == 1
    tokens.first.focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowRight")
    assert tokens.nth(2).evaluate("(one) => one === document.activeElement")
    assert tokens.nth(2).get_attribute("aria-describedby") == "tip"
    assert _bare(tip.locator("p code").inner_text()) == _bare(output.logprobs[2][output.token_ids[2]].decoded_token)
    tab.page.keyboard.press("End")
    assert tokens.last.evaluate("(one) => one === document.activeElement")
    assert tab.page.locator("#results [tabindex]").count() == 1
    tab.page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_tip_stays_when_the_focus_scrolls_the_text(url, open_tab):
    tab = open_tab(url, mode="completion", viewport={"width": 400, "height": 600})
    tab.set(seed=5, max_tokens=300)
    tab.page.click("text=More settings")
    tab.page.check("#setting-ignore_eos")
    tab.generate(PROMPT)
    tab.page.locator("#results .t").first.focus()
    tab.page.keyboard.press("End")
    tab.page.wait_for_timeout(300)
    box, tip = (tab.page.locator(place).bounding_box() for place in ("#results .t >> nth=-1", "#tip"))
    assert 0 < box["y"] < 600
    assert min(abs(tip["y"] - box["y"] - box["height"]), abs(box["y"] - tip["y"] - tip["height"])) < 10


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_aborts_the_request(url, open_tab, by):
    tab = open_tab(url, mode="completion")
    tab.set(n=8, max_tokens=500)
    tab.page.press("#input", "Control+Enter")
    tab.page.wait_for_selector("#results .t")
    if by == "button":
        tab.page.click("#stop")
    else:
        tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector("#send:enabled")
    assert tab.status.startswith("Stopped")
    assert "stopped" in tab.page.locator("#results dd").all_inner_texts()
    for _ in range(100):
        if _running(url) == 0:
            return
        tab.page.wait_for_timeout(50)
    raise AssertionError("the server goes on generating")


def test_errors_of_the_server_are_shown(url, open_tab):
    tab = open_tab(url, mode="completion", may_complain=True)
    tab.generate("too long " * 1000)
    assert "the limit is 511" in tab.page.inner_text("#problem")
    assert tab.status.startswith("Failed")


def test_errors_within_a_stream_are_shown_and_text_is_no_html(url, open_tab):
    tab = open_tab(url, mode="completion")
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    choice = {"index": 0, "text": evil, "logprobs": None, "finish_reason": None}
    _answer(tab, "/v1/completions", {"choices": [choice]}, {"error": {"message": "the engine has stopped"}})
    tab.generate()
    assert tab.texts() == [evil]
    assert tab.page.locator("#results img").count() == 0
    assert tab.page.inner_text("#problem") == "the engine has stopped"


def test_settings_that_cannot_be_fetched_are_told(url, open_tab):
    tab = open_tab(url, may_complain=True)
    tab.page.route("**/openapi.json", lambda route: route.fulfill(status=500, json={"error": {"message": "no idea"}}))
    tab.page.reload()
    tab.page.wait_for_selector("#settings-note:has-text('no idea')")
    tab.page.check("[value=completion]")
    tab.generate()
    assert tab.status.startswith("Done")


def test_locked_page_opens_with_the_key(locked_url, open_tab):
    tab = open_tab(locked_url, may_complain=True)
    tab.page.fill("#key", "wrong")
    tab.page.click("text=Open")
    tab.page.wait_for_selector("#problem:has-text('not right')")
    tab.page.fill("#key", KEY)
    tab.page.click("text=Open")
    tab.page.wait_for_selector("#setting-seed")
    tab.page.check("[value=completion]")
    tab.generate()
    assert tab.status.startswith("Done")
    tab.page.reload()
    tab.page.wait_for_selector("#setting-seed")
    assert all("401" in complaint for complaint in tab.complaints)


def test_key_that_has_changed_is_asked_for(locked_url, open_tab):
    tab = open_tab(locked_url, may_complain=True)
    tab.page.fill("#key", KEY)
    tab.page.click("text=Open")
    tab.page.wait_for_selector("#setting-seed")
    tab.page.check("[value=completion]")
    tab.page.evaluate("sessionStorage.setItem('jaxinfer-key', 'old')")
    tab.generate()
    assert "a key must be sent" in tab.page.inner_text("#problem")
    tab.page.fill("#key", KEY)
    tab.page.click("text=Use this key")
    tab.generate()
    assert tab.status.startswith("Done")


def test_engine_numbers_move(url, open_tab):
    tab = open_tab(url, mode="completion")
    tab.set(n=4, max_tokens=300)
    tab.start(PROMPT)
    running = tab.page.locator(".tile .number").first
    running.filter(has_text=re.compile("^[1-9]")).wait_for()
    tab.page.click("#stop")
    assert tab.page.locator(".tile").count() == 6
    running.filter(has_text=re.compile("^0")).wait_for()


def test_page_does_not_move_while_text_comes(url, open_tab):
    tab = open_tab(url, mode="completion", script=COUNTS_SHIFTS, viewport={"width": 1000, "height": 1400})
    tab.set(n=2, max_tokens=60)
    tab.start(PROMPT)
    tab.page.wait_for_selector("#results .t")
    looks = "[document.documentElement.scrollHeight, window.shifts]"
    before = tab.page.evaluate(looks)
    tab.page.wait_for_selector("#send:enabled")
    tab.page.wait_for_timeout(100)
    assert tab.page.evaluate(looks) == before


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_copied_requests_give_the_same_answer(url, open_tab, mode):
    tab = open_tab(url, mode=mode, permissions=["clipboard-read", "clipboard-write"])
    tab.set(seed=9, max_tokens=12)
    tab.page.fill("#setting-top_k", "20")
    tab.page.fill("#input", "it's a \"test\" \\ of\n'quotes'")
    copied = []
    for button in ("#copy-curl", "#copy-python"):
        tab.page.evaluate("document.getElementById('status').textContent = ''")
        tab.page.click(button)
        tab.page.wait_for_selector("#status:has-text('Copied')")
        copied.append(tab.page.evaluate("navigator.clipboard.readText()"))
    tab.generate()
    (text,) = tab.texts("#results" if mode == "completion" else "#conversation")
    answer = json.loads(subprocess.run(["bash", "-c", copied[0]], capture_output=True, check=True).stdout)
    choice = answer["choices"][0]
    assert (choice["text"] if mode == "completion" else choice["message"]["content"]) == text
    assert shlex.split(copied[0])[0] == "curl"
    pytest.importorskip("openai")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    ran = subprocess.run([sys.executable, "-c", copied[1]], capture_output=True, check=True, env=environment, text=True)
    assert ran.stdout == f"{text}\n"


def test_page_below_a_path_asks_there(browser, url, open_tab):
    tab = open_tab(url, may_complain=True)
    page, asked = tab.page, []
    page.on("request", lambda one: asked.append(one.url))
    content = page.content()
    for address in (f"{url}/llm", f"{url}/llm/"):
        asked.clear()
        page.route(address, lambda route: route.fulfill(body=content, content_type="text/html"))
        page.goto(address)
        page.wait_for_selector("#engine-problem:visible")
        assert {one for one in asked if not one.startswith((f"{url}/llm", "data:"))} == set()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_theme_follows_the_system_until_one_is_chosen(url, open_tab, theme):
    tab = open_tab(url, color_scheme=theme)
    other = {"light": "dark", "dark": "light"}[theme]
    background = "getComputedStyle(document.body).backgroundColor"
    first = tab.page.evaluate(background)
    is_dark = sum(map(int, re.findall(r"\d+", first)[:3])) < 384
    assert is_dark == (theme == "dark")
    tab.page.select_option("#theme", other)
    assert tab.page.evaluate(background) != first
    tab.page.reload()
    assert tab.page.evaluate(background) != first


@pytest.mark.parametrize("mode", ["completion", "chat"])
@pytest.mark.parametrize("width", [320, 360, 640, 1280])
def test_screen_of_any_width_does_not_scroll_sideways(url, open_tab, width, mode):
    tab = open_tab(url, mode=mode, viewport={"width": width, "height": 700})
    tab.set(n=3, max_tokens=12)
    tab.generate("long" * 40)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_audit_finds_nothing_serious(url, open_tab, mode, theme):
    pytest.importorskip("axe_playwright_python", reason="needs the package axe-playwright-python")
    tab = open_tab(url, mode=mode, color_scheme=theme)
    tab.set(n=2, max_tokens=12, temperature=1.9)
    tab.generate(PROMPT)
    tab.page.click("text=More settings")
    tab.page.locator(".card .t").nth(2).focus()
    tab.page.add_script_tag(content=files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found = tab.page.evaluate("axe.run().then((result) => result.violations)")
    assert [(one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in found] == []
