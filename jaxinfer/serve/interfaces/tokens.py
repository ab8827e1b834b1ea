"""Texts to token ids and back: POST /tokenize and /detokenize.

Owns: the fields of these requests and answers.
Does not know: tokenizers.

Source: vLLM's OpenAI-compatible server, "Tokenizer API".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Required, TypedDict

from jaxinfer.sampling_params import SamplingParams
from jaxinfer.serve.interfaces.body import Fields
from jaxinfer.serve.interfaces.chat import TEMPLATE_FIELDS
from jaxinfer.serve.interfaces.errors import openai_error
from jaxinfer.serve.interfaces.exchange import Lookup
from jaxinfer.serve.interfaces.turn import ToolUse, Turn
from jaxinfer.serve.served_model import ServedModel


class TokenizeBody(TypedDict, total=False):
    """Fields of /tokenize.

    Args:
      model: the model's name.
      prompt: a text; or else
      messages, tools, chat_template, chat_template_kwargs, add_generation_prompt, continue_final_message: a
        conversation, as in chat completions.
      add_special_tokens: whether the tokenizer's special tokens come before the text.
      return_token_strs: whether the answer has the text of each token.
    """

    model: str | None
    prompt: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    return_token_strs: bool | None


class DetokenizeBody(TypedDict, total=False):
    """Fields of /detokenize.

    Args:
      model: the model's name.
      tokens: the token ids.
    """

    model: str | None
    tokens: Required[list[int]]


def tokenize(served: ServedModel, body: Mapping[str, Any]) -> dict[str, Any]:
    """The token ids of a prompt or of a conversation; without a model's name, the server's is meant.

    Raises:
      TypeError, ValueError, RefusedError: a field is missing or wrong.
    """
    fields = _fields(served, body, TokenizeBody)
    tokenizer = served.tokenizer
    prompt, messages = fields.take("prompt"), fields.take_list("messages")
    if (prompt is None) == (not messages):
        raise ValueError("prompt or messages must be given, one of them")
    if messages:
        template = {name: value for name in TEMPLATE_FIELDS if (value := fields.take(name)) is not None}
        tool_use = ToolUse(tools=fields.take_list("tools"))
        turn = Turn(messages=messages, params=SamplingParams(), tool_use=tool_use, template=template)
        prompt = turn.render(served)
    elif not isinstance(prompt, str):
        raise TypeError(f"prompt must be a text, got {prompt!r:.80}")
    adds = fields.take_bool("add_special_tokens", default=not messages)
    token_ids = tokenizer.encode(prompt) if adds else tokenizer.encode_plain(prompt)
    shown = [tokenizer.token_text(i) for i in token_ids] if fields.take_bool("return_token_strs") else None
    return {
        "count": len(token_ids),
        "max_model_len": served.llm.max_model_len,
        "tokens": token_ids,
        "token_strs": shown,
    }


def detokenize(served: ServedModel, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of token ids, special tokens included.

    Raises:
      TypeError, ValueError, RefusedError: a field is missing or wrong.
    """
    token_ids = _fields(served, body, DetokenizeBody).take_list("tokens")
    tokenizer, limit = served.tokenizer, served.llm.model_config.vocab_size
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limit:
            raise ValueError(f"tokens must be ids in 0..{limit - 1} (the model's vocabulary), got {token_id!r:.80}")
    return {"prompt": tokenizer.decode(token_ids, skip_special_tokens=False)}


def _fields(served: ServedModel, body: Mapping[str, Any], own: type) -> Fields:
    if body.get("model") is not None:
        served.answering_name(body["model"])
    return Fields(body, own, sampling=False)


LOOKUPS = (
    Lookup(path="/tokenize", bodies=(TokenizeBody,), answer=tokenize, error=openai_error),
    Lookup(path="/detokenize", bodies=(DetokenizeBody,), answer=detokenize, error=openai_error),
)
