"""Conversation: the loop of `jaxinfer chat` over messages, commands such as /reset, and replies printed as they come.

Owns: dropping the oldest turns when the context is full, printing and cutting replies, the commands.
Does not know: chat templates, how messages are read from a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxinfer.api.llm import LLM
from jaxinfer.api.output_stream import OutputStream
from jaxinfer.cli.terminal import remark
from jaxinfer.outputs import RequestOutput
from jaxinfer.request import RequestTooLongError
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text.preparation import Submission

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C ends a reply"
_COMMAND = re.compile(r"/\w+")
_SHARE_OF_REPLY = 4
"""A reply should have 1 / _SHARE_OF_REPLY of the context, or max_tokens if that is less: the oldest turns are dropped
until so much is free."""


class Conversation:
    """A conversation with a model.

    Args:
      llm: the model.
      params: the sampling parameters of every reply.
      system: the system message, which is never dropped; None for none.
      chat_template: as LLM.chat's.
    """

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None, chat_template: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._chat_template = chat_template
        self._turns: list[tuple[str, str]] = []

    def run(self, read: Callable[[], str | None], *, is_terminal: bool) -> bool:
        """Answers messages until the input ends or a message is /quit.

        Args:
          read: returns the next message, or None at the end of the input.
          is_terminal: whether a person types the messages; if so, Ctrl-C between replies prints the help.

        Returns:
          Whether every message had a reply.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed between replies and is_terminal is False.
        """
        all_answered = True
        while True:
            try:
                message = read()
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                remark(f"\n{HELP}")
                continue
            if message is None or message.strip() == "/quit":
                return all_answered
            if message.strip():
                all_answered &= self.take(message)

    def take(self, message: str) -> bool:
        """Answers one message, or runs it if it is a command; returns False if that failed."""
        word = message.split()[0]
        if not (message.startswith("/") and _COMMAND.fullmatch(word)):
            return self._answer(message.strip())
        if word == "/reset":
            self._turns.clear()
            return True
        remark(f"no command {word}: {HELP}; to say it to the model, put a space before it")
        return False

    def _answer(self, text: str) -> bool:
        try:
            messages = self._fitting(text)
            reply = self._print_reply(self._llm.stream_chat(messages, self._params, chat_template=self._chat_template))
        except ValueError as error:
            remark(f"jaxinfer: {' '.join(str(error).split())}; this message is forgotten")
            return False
        except KeyboardInterrupt:
            remark("\nthis message is forgotten")
            return False
        self._turns.append((text, reply))
        return True

    def _fitting(self, text: str) -> list[dict[str, str]]:
        """Returns the messages to send: the conversation and the new message, without the turns that do not fit.

        The oldest turns are dropped for good, with a remark, until prompt and reply fit the context.

        Raises:
          ValueError: the message does not fit even without any turns, or the template refuses it; no turn is dropped.
        """
        num_forgotten = 0
        while not self._fits(messages := self._messages(num_forgotten, text), alone=num_forgotten == len(self._turns)):
            num_forgotten += 1
        if num_forgotten:
            self._turns = self._turns[num_forgotten:]
            turns = "turn is" if num_forgotten == 1 else f"{num_forgotten} turns are"
            remark(f"the context of {self._llm.max_model_len} tokens is full: the oldest {turns} forgotten")
        return messages

    def _messages(self, num_forgotten: int, text: str) -> list[dict[str, str]]:
        messages = list(self._system)
        for asked, replied in self._turns[num_forgotten:]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
        return [*messages, {"role": "user", "content": text}]

    def _fits(self, messages: list[dict[str, str]], *, alone: bool) -> bool:
        """Whether the messages fit the context and leave enough room for a reply.

        Args:
          messages: the conversation.
          alone: whether no turns are left that could be dropped; then any room for a reply is enough.

        Raises:
          ValueError: the messages do not fit and alone is True, or the template refuses them.
        """
        try:
            submission = self._llm.prepare_chat(messages, self._params, chat_template=self._chat_template)
        except RequestTooLongError:
            if alone:
                raise
            return False
        return alone or self._has_room(submission)

    def _has_room(self, submission: Submission) -> bool:
        wanted = self._llm.max_model_len // _SHARE_OF_REPLY
        if self._params.max_tokens is not None:
            wanted = min(wanted, self._params.max_tokens)
        return len(submission.requests[0].prompt_token_ids) + wanted <= self._llm.max_model_len

    def _print_reply(self, stream: OutputStream) -> str:
        """Prints a reply as it comes and returns it, cut where Ctrl-C ended it."""
        text, output = "", None
        try:
            for output in stream:
                delta = output.delta or ""
                text += delta
                print(delta, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
        print(flush=True)
        if output is not None and output.finish_reason == "length":
            remark(self._why_cut(output))
        return text

    def _why_cut(self, output: RequestOutput) -> str:
        limit = self._params.max_tokens
        if limit is not None and len(output.token_ids) >= limit:
            return f"[cut at max_tokens {limit}; --max-tokens sets it]"
        return f"[cut at the end of the context, {self._llm.max_model_len} tokens]"
