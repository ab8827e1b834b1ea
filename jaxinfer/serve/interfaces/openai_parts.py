"""What both of OpenAI's completions have in common.

Owns: the head of an answer, its count of tokens, the ids that may come with it.
Does not know: messages, prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict

from jaxinfer.serve.interfaces.answered import Answered, Completed, TokenCount
from jaxinfer.serve.interfaces.body import Fields, StreamOptions
from jaxinfer.serve.interfaces.errors import ErrorFacts, openai_error
from jaxinfer.serve.interfaces.exchange import Event
from jaxinfer.serve.served_model import ServedModel


class CommonBody(TypedDict, total=False):
    """Fields of both completions, beside those of SamplingParams.

    Args:
      model: the model's name.
      stream: whether the answer comes as a stream of server-sent events.
      stream_options: include_usage for a last chunk with the numbers of tokens, continuous_usage_stats for them in
        every chunk.
      response_format: {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ..}}.
      structured_outputs: one of json, regex, choice and grammar.
      return_token_ids: whether choices have the ids of prompt and output.
      return_tokens_as_token_ids: whether log-probabilities show tokens by their ids.
    """

    model: Required[str]
    stream: bool | None
    stream_options: dict[str, Any] | None
    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    return_token_ids: bool | None
    return_tokens_as_token_ids: bool | None


class MegatronBody(TypedDict, total=False):
    """Fields that only Megatron's server takes. All but the first change nothing in what is generated.

    Args:
      add_BOS: whether the tokenizer's special tokens come before a text.
      skip_prompt_log_probs, prevent_retokenization, return_tokenized_data, return_raw_text: ignored.
      streaming_interval: ignored.
    """

    add_BOS: bool | None
    skip_prompt_log_probs: bool | None
    prevent_retokenization: bool | None
    return_tokenized_data: bool | None
    return_raw_text: bool | None
    streaming_interval: int | None


_MEGATRONS_OFF = {"seed": -1, "top_p": 0}
"""Values by which Megatron's clients ask for no seed and no filter."""
IGNORED_OF_MEGATRON = set(MegatronBody.__annotations__) - {"add_BOS"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ids:
    """Which token ids an answer brings along.

    Args:
      with_ids: those of prompt and output, as vLLM's API has them.
      as_ids: ids in place of texts among log-probabilities.
      as_megatron: those of prompt and output, as Megatron's API has them.
    """

    with_ids: bool = False
    as_ids: bool = False
    as_megatron: bool = False

    @classmethod
    def take(cls, fields: Fields, *, as_megatron: bool = False) -> Ids:
        """Reads the fields of ids."""
        return cls(
            with_ids=fields.take_bool("return_token_ids"),
            as_ids=fields.take_bool("return_tokens_as_token_ids"),
            as_megatron=as_megatron,
        )

    def of_choice(self, answer: Answered, completion: Completed, *, is_first: bool = True) -> dict[str, Any]:
        """The fields of a choice.

        Args:
          answer: to which it belongs.
          completion: the choice's text, or what is new of it.
          is_first: whether nothing was told of the choice before; the prompt's tokens come first.
        """
        if not (self.with_ids or self.as_megatron):
            return {}
        fields: dict[str, Any] = {"prompt_token_ids": answer.prompt_token_ids} if is_first else {}
        if self.with_ids:
            fields["token_ids"] = completion.token_ids
        if self.as_megatron:
            chosen = zip(completion.token_ids, completion.logprobs or (), strict=False)
            fields["generation_token_ids"] = completion.token_ids
            fields["generation_log_probs"] = [found[token_id].logprob for token_id, found in chosen]
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How a completion is answered.

    Args:
      wants_stream: whether the answer comes as a stream.
      options: what the stream brings beside the text.
      ids: which token ids the answer brings.
    """

    wants_stream: bool = False
    options: StreamOptions = field(default_factory=StreamOptions)
    ids: Ids = field(default_factory=Ids)

    @classmethod
    def take(cls, fields: Fields, *, as_megatron: bool) -> Manner:
        """Reads CommonBody's fields, and drops those of MegatronBody that change nothing.

        Raises:
          TypeError, ValueError: one of them is wrong.
        """
        fields.take("model")
        for name in IGNORED_OF_MEGATRON:
            fields.take(name)
        if as_megatron:
            fields.drop(_MEGATRONS_OFF)
        stream = fields.take_bool("stream")
        options = StreamOptions.take(fields, stream=stream)
        return cls(wants_stream=stream, options=options, ids=Ids.take(fields, as_megatron=as_megatron))

    def usage_of_chunk(self, count: TokenCount) -> dict[str, Any]:
        """The field "usage" of a chunk that is not the last; none if it was not asked for."""
        if self.options.continuous_usage_stats and count.num_prompt:
            return {"usage": usage(count)}
        return {"usage": None} if self.options.include_usage else {}

    def usage_chunks(self, head: Mapping[str, Any], count: TokenCount) -> Iterator[Event]:
        """The last chunk of a stream, with the numbers of tokens, if it was asked for."""
        if self.options.include_usage:
            yield Event({**head, "choices": [], "usage": usage(count)})


def asked_model(served: ServedModel, body: Mapping[str, Any], *, as_megatron: bool) -> str | None:
    """The name that the answer bears; Megatron's clients name no model.

    Raises:
      RefusedError: no model is served under the name.
    """
    default = served.names[0] if as_megatron and served.names else None
    return served.answering_name(body.get("model", default))


class OpenAIStream:
    """How a stream of completions fails."""

    def failure(self, facts: ErrorFacts) -> Iterator[Event]:
        """See Stream. OpenAI's clients raise what they find under "error"."""
        yield Event(openai_error(facts))


def usage(count: TokenCount) -> dict[str, Any]:
    """The tokens of an answer, those of thoughts if they can be counted."""
    thoughts = count.num_thoughts
    details = {} if thoughts is None else {"completion_tokens_details": {"reasoning_tokens": thoughts}}
    return {
        "prompt_tokens": count.num_prompt,
        "completion_tokens": count.num_new,
        "total_tokens": count.num_prompt + count.num_new,
        "prompt_tokens_details": {"cached_tokens": count.num_cached},
        **details,
    }
