"""OpenAI's completions: POST /v1/completions.

Owns: the fields of these requests, the bodies of answers and the chunks of streams.
Does not know: conversations.

Source: OpenAI's API reference, "Completions", and vLLM's further fields, as in chat.py. The choices of prompt p have
the indices p * n .. p * n + n - 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

from jaxinfer.outputs import RequestDelta, RequestOutput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.interfaces.answered import Answered, Completed, TokenCount
from jaxinfer.serve.interfaces.body import Fields
from jaxinfer.serve.interfaces.errors import openai_error
from jaxinfer.serve.interfaces.exchange import DONE, Event, Interface, Label
from jaxinfer.serve.interfaces.logprobs import prompt_logprobs, text_logprobs
from jaxinfer.serve.interfaces.openai_parts import (
    CommonBody,
    Manner,
    MegatronBody,
    OpenAIStream,
    asked_model,
    usage,
)
from jaxinfer.serve.served_model import ServedModel
from jaxinfer.text.preparation import Prompt, Submission

TEXT = "/v1/completions"


class TextBody(TypedDict, total=False):
    """Fields of a completion, beside those of SamplingParams.

    Args:
      prompt: a text, a list of token ids, or a list of either.
      echo: whether the answer's texts begin with the prompt; with logprobs, those of the prompt come, too.
      best_of: nothing but n.
      suffix: nothing but an empty text.
      add_special_tokens: whether the tokenizer's special tokens come before a text.
    """

    prompt: Required[str | list[Any]]
    echo: bool | None
    best_of: int | None
    suffix: str | None
    add_special_tokens: bool | None


BODIES = (TextBody, CommonBody)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """A request to continue texts.

    Args:
      prompts: texts, or token ids.
      params: how to sample. With echo and log-probabilities, those of the prompt are among them.
      echo: whether the answer's texts begin with the prompt.
      add_special_tokens: whether the tokenizer's special tokens come before a text.
      manner: how it is answered.
      shows_prompt_logprobs: whether the answer has vLLM's "prompt_logprobs".
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    manner: Manner
    echo: bool = False
    add_special_tokens: bool = True
    shows_prompt_logprobs: bool = False

    @classmethod
    def read(cls, body: Mapping[str, Any], defaults: SamplingParams, *, as_megatron: bool = False) -> TextRequest:
        """Reads a body; arguments and errors as ChatRequest.read's. Without a limit the answer has 16 tokens."""
        fields = Fields(body, *BODIES, *([MegatronBody] if as_megatron else []))
        manner = Manner.take(fields, as_megatron=as_megatron)
        prompts, echo = _prompts(fields.take("prompt")), fields.take_bool("echo")
        fields.take_only("suffix", "")
        best_of = fields.take("best_of")
        add_special_tokens = fields.take_bool("add_BOS" if "add_BOS" in body else "add_special_tokens", True)
        params = fields.take_params(defaults)
        if best_of not in (None, params.n) or isinstance(best_of, bool):
            raise ValueError(f"best_of must be n, which is {params.n}, got {best_of!r:.80}; nothing else is supported")
        shows_prompt_logprobs = params.prompt_logprobs is not None
        if echo and params.logprobs is not None and params.prompt_logprobs is None:
            params = dataclasses.replace(params, prompt_logprobs=params.logprobs)
        return cls(
            prompts=prompts,
            params=params,
            manner=manner,
            echo=echo,
            add_special_tokens=add_special_tokens,
            shows_prompt_logprobs=shows_prompt_logprobs,
        )

    def prepared(self, served: ServedModel, label: Label, *, model: str | None) -> TextExchange:
        """Makes it ready to run.

        Raises:
          TypeError, ValueError, ImportError: a prompt or the parameters are wrong, or more than the server allows.
        """
        params = served.limited(self.params) if self.params.max_tokens is None else self.params
        served.check_limits(params, num_prompts=len(self.prompts))
        if params.logprobs is not None:
            served.token_names.load()
        submissions = tuple(
            served.llm.prepare(
                prompt, params, add_special_tokens=self.add_special_tokens, ends_with_pages=params.max_tokens is None
            )
            for prompt in self.prompts
        )
        return TextExchange(request=self, submissions=submissions, served=served, label=label, model=model)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextExchange:
    """A request that can be run; see Exchange.

    Args:
      request: what was asked.
      submissions: one per prompt.
      served: the model.
      label: of the answer.
      model: the name that the answer bears.
    """

    request: TextRequest
    submissions: Sequence[Submission]
    served: ServedModel
    label: Label
    model: str | None

    @property
    def wants_stream(self) -> bool:
        """See Exchange."""
        return self.request.manner.wants_stream

    def answer(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See Exchange."""
        choices = [
            self.choice(number, output, completion, Told())
            for number, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return self.head() | {"choices": choices, "usage": usage(TokenCount.of(outputs))}

    def stream(self) -> TextStream:
        """See Exchange."""
        return TextStream(self)

    def head(self) -> dict[str, Any]:
        """The fields with which answers and chunks begin."""
        return {
            "id": f"cmpl-{self.label.name}",
            "object": "text_completion",
            "created": self.label.created,
            "model": self.model,
        }

    def choice(self, number: int, answer: Answered, completion: Completed, told: Told) -> dict[str, Any]:
        """A choice of an answer or chunk.

        Args:
          number: of the prompt.
          answer, completion: what was generated, or what is new of it.
          told: what earlier chunks have shown, which is brought up to date.
        """
        request = self.request
        is_first, told.has_begun = not told.has_begun, True
        echoed = self._prompt_text(answer) if request.echo and is_first else ""
        choice = {
            "index": number * request.params.n + completion.index,
            "text": echoed + (completion.text or ""),
            "logprobs": self._logprobs(answer, completion, told, echoed, is_first),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **request.manner.ids.of_choice(answer, completion, is_first=is_first),
        }
        if request.shows_prompt_logprobs and is_first:
            choice["prompt_logprobs"] = prompt_logprobs(answer.prompt_logprobs)
        return choice

    def _prompt_text(self, answer: Answered) -> str:
        tokenizer = self.served.llm.tokenizer
        if answer.prompt is not None or tokenizer is None:
            return answer.prompt or ""
        return tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=self.request.params.skip_special_tokens)

    def _logprobs(
        self, answer: Answered, completion: Completed, told: Told, echoed: str, is_first: bool
    ) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        token_ids, found = [*completion.token_ids], [*completion.logprobs]
        if is_first and self.request.echo and answer.prompt_logprobs is not None:
            token_ids, found = [*answer.prompt_token_ids, *token_ids], [*answer.prompt_logprobs, *found]
        else:
            told.num_characters += len(echoed)
        shown = text_logprobs(
            self.served.token_names,
            token_ids,
            found,
            num_top=self.request.params.logprobs or 0,
            offset=told.num_characters,
            as_ids=self.request.manner.ids.as_ids,
        )
        told.num_characters += sum(map(len, shown["tokens"]))
        return shown


@dataclass(slots=True)
class Told:
    """What earlier chunks of a choice have shown.

    Args:
      num_characters: characters of all tokens, which is where the next one begins.
      has_begun: whether there was a chunk.
    """

    num_characters: int = 0
    has_begun: bool = False


class TextStream(OpenAIStream):
    """The chunks of a request; see Stream.

    Args:
      exchange: the request.
    """

    def __init__(self, exchange: TextExchange):
        self._exchange = exchange
        self._head = exchange.head()
        num = exchange.request.params.n
        self._told = [[Told() for _ in range(num)] for _ in exchange.submissions]
        self._count = TokenCount()
        self._of_prompt = [TokenCount() for _ in exchange.submissions]

    def opening(self) -> Iterator[Event]:
        """See Stream."""
        yield from ()

    def progress(self, number: int, delta: RequestDelta) -> Iterator[Event]:
        """See Stream."""
        self._count.add(number, delta)
        self._of_prompt[number].add(number, delta)
        for completion in delta.outputs:
            choice = self._exchange.choice(number, delta, completion, self._told[number][completion.index])
            more = self._exchange.request.manner.usage_of_chunk(self._of_prompt[number])
            yield Event({**self._head, "choices": [choice], **more})

    def closing(self) -> Iterator[Event]:
        """See Stream."""
        yield from self._exchange.request.manner.usage_chunks(self._head, self._count)
        yield Event(DONE)


def _prompts(prompt: Any) -> list[Prompt]:
    """The prompts of a body: one text or many, one list of token ids or many.

    Raises:
      TypeError, ValueError: it is something else.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"prompt must be a text, a list of token ids, or a list of either, got {prompt!r:.80}")
    if isinstance(prompt[0], (str, list)):
        kind = type(prompt[0])
        if not all(isinstance(entry, kind) for entry in prompt):
            raise TypeError("prompt must have entries of one kind, texts or lists of token ids, got both")
        return prompt
    return [prompt]


def text_interface(path: str, *, as_megatron: bool = False) -> Interface:
    """The interface at an address; as_megatron adds Megatron's fields to answers."""

    bodies = (*BODIES, MegatronBody) if as_megatron else BODIES

    def read(served: ServedModel, body: Mapping[str, Any], label: Label) -> TextExchange:
        model = asked_model(served, body, as_megatron=as_megatron)
        request = TextRequest.read(body, served.default_params, as_megatron=as_megatron)
        return request.prepared(served, label, model=model)

    return Interface(path=path, bodies=bodies, read=read, error=openai_error)
