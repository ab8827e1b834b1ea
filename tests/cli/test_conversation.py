"""Conversations: what the model still sees when the context is full, how a reply ends, commands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxinfer.cli.conversation import HELP, Conversation
from jaxinfer.request import RequestTooLongError
from jaxinfer.sampling_params import SamplingParams

CONTEXT = 40


class Reply:
    """A stream of one output a character, the last of them finished."""

    def __init__(self, text: str, reason: str = "stop", interrupted: bool = False) -> None:
        self.text, self.reason, self.interrupted, self.closed = text, reason, interrupted, False

    def __iter__(self):
        for count, char in enumerate(self.text, start=1):
            reason = self.reason if count == len(self.text) else None
            yield SimpleNamespace(delta=char, token_ids=range(count), finish_reason=reason)
        if self.interrupted:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


class FakeLLM:
    """A model of which a prompt takes a token a character, and which gives prepared replies."""

    max_model_len = CONTEXT

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.prompts = list(replies), []

    def prepare_chat(self, messages, params, *, chat_template):
        text = "".join(message["content"] for message in messages)
        if "refused" in text:
            raise ValueError("the template says no")
        if len(text) >= CONTEXT:
            raise RequestTooLongError(f"prompt has {len(text)} tokens")
        return SimpleNamespace(requests=[SimpleNamespace(prompt_token_ids=text)])

    def stream_chat(self, messages, params, *, chat_template):
        self.prepare_chat(messages, params, chat_template=chat_template)
        self.prompts.append([message["content"] for message in messages])
        return self.replies.pop(0) if self.replies else Reply("ok")


def talk(llm: FakeLLM, *words: str, system: str | None = None, max_tokens: int | None = 8) -> bool:
    conversation = Conversation(llm, SamplingParams(max_tokens=max_tokens), system=system, chat_template=None)
    messages = iter([*words, None])
    return conversation.run(lambda: next(messages), is_terminal=True)


def test_run_keeps_turns_and_reset_forgets_them() -> None:
    llm = FakeLLM()
    assert talk(llm, "a", "", " ", "b", "/reset", "c", "/quit", "never", system="s")
    assert llm.prompts == [["s", "a"], ["s", "a", "ok", "b"], ["s", "c"]]


def test_run_full_context_forgets_the_oldest_turns_and_says_so(capsys) -> None:
    llm = FakeLLM()
    first, second, third = "1" * 12, "2" * 12, "3" * 12
    assert talk(llm, first, second, third, "4" * 25, system="sys")
    assert llm.prompts[1:] == [["sys", first, "ok", second], ["sys", second, "ok", third], ["sys", "4" * 25]]
    expected = [
        "the context of 40 tokens is full: the oldest turn is forgotten",
        "the context of 40 tokens is full: the oldest 2 turns are forgotten",
    ]
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize(("max_tokens", "num_seen"), [(8, 3), (None, 1), (99, 1)])
def test_run_leaves_room_for_a_reply_of_max_tokens_or_a_quarter(max_tokens, num_seen) -> None:
    llm = FakeLLM()
    talk(llm, "1" * 15, "2" * 15, max_tokens=max_tokens)  # 32 of 40 with the reply
    assert len(llm.prompts[1]) == num_seen


@pytest.mark.parametrize("bad", ["x" * CONTEXT, "refused"])
def test_run_message_that_cannot_be_answered_is_forgotten_alone(bad, capsys) -> None:
    llm = FakeLLM()
    assert not talk(llm, "a", bad, "b")
    assert llm.prompts == [["a"], ["a", "ok", "b"]]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxinfer: ") and line.endswith("; this message is forgotten")


@pytest.mark.parametrize(
    ("reply", "max_tokens", "expected"),
    [
        (Reply("whole"), 8, []),
        (Reply("12345678", "length"), 8, ["[cut at max_tokens 8; --max-tokens sets it]"]),
        (Reply("1234", "length"), 8, ["[cut at the end of the context, 40 tokens]"]),
        (Reply("1234", "length"), None, ["[cut at the end of the context, 40 tokens]"]),
    ],
)
def test_run_cut_reply_is_marked_beside_the_text(reply, max_tokens, expected, capsys) -> None:
    talk(FakeLLM(reply), "a", max_tokens=max_tokens)
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()) == (f"{reply.text}\n", expected)


def test_run_interrupt_ends_the_reply_and_not_the_conversation(capsys) -> None:
    llm = FakeLLM(Reply("so far", "", interrupted=True))
    assert talk(llm, "a", "b")
    assert llm.prompts[1] == ["a", "so far", "b"]
    assert capsys.readouterr().out == "so far\nok\n"


def test_run_interrupt_between_replies_says_how_to_leave(capsys) -> None:
    steps = iter([KeyboardInterrupt, "a", None])

    def read():
        step = next(steps)
        if step is KeyboardInterrupt:
            raise step
        return step

    conversation = Conversation(FakeLLM(), SamplingParams(), system=None, chat_template=None)
    assert conversation.run(read, is_terminal=True)
    assert HELP in capsys.readouterr().err
    steps = iter([KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        conversation.run(read, is_terminal=False)


def test_run_unknown_command_is_answered_and_a_path_or_space_is_not_one(capsys) -> None:
    llm = FakeLLM()
    assert not talk(llm, "/help me", "/etc/hosts", " /help", "/ is root")
    assert [prompt[-1] for prompt in llm.prompts] == ["/etc/hosts", "/help", "/ is root"]
    assert capsys.readouterr().err.startswith(f"no command /help: {HELP}")
