"""ServedModel: a model with the settings under which requests reach it.

Owns: its names, the chat template and the reply format that are used, and the limits on what one request may ask for.
Does not know: interfaces, HTTP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.api.llm import LLM
from jaxinfer.sampling_params import MAX_SAMPLES, SamplingParams
from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.interfaces.errors import RefusedError
from jaxinfer.serve.interfaces.logprobs import TokenNames
from jaxinfer.serve.replies.formats import FORMATS, ReplyFormat, find_format
from jaxinfer.serve.replies.thoughts import ThoughtMarkers
from jaxinfer.text.chat_template import DEFAULT
from jaxinfer.tokenizer.tokenizer import Tokenizer

TRUSTING = ServeConfig(
    max_prompts=MAX_SAMPLES,
    max_n=MAX_SAMPLES,
    max_stop=MAX_SAMPLES,
    max_stop_length=MAX_SAMPLES,
    max_grammar_bytes=256 << 10,
    allow_chat_template=True,
)
"""Settings for requests of the LLM's own user, such as a batch in a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model that requests can reach.

    Args:
      llm: the model.
      config: how it is served.
      names: by which requests call it; without any, a request may call it anything.
      reply_format: how it writes its replies.
      has_template: whether it can chat.
      hides_markers: whether the markers of its reply format are special tokens, which a text leaves out by default.
      token_names: how tokens are shown among log-probabilities.
      thought_markers: the tokens around its thoughts; None if they are no tokens of their own.
    """

    llm: LLM
    config: ServeConfig
    names: tuple[str, ...]
    reply_format: ReplyFormat
    has_template: bool
    hides_markers: bool
    token_names: TokenNames
    thought_markers: ThoughtMarkers | None = None

    @classmethod
    def of(cls, llm: LLM, config: ServeConfig = TRUSTING, *, names: Sequence[str] = ()) -> ServedModel:
        """Finds out what the settings leave open.

        Args:
          llm: the model.
          config: how it is served.
          names: used if config.served_model_name is None.

        Raises:
          ValueError: a file of the chat template cannot be read.
        """
        templates = {name: entry.source for name, entry in llm.chat_templates.templates.items()}
        chosen = config.chat_template
        sources = list(templates.values()) if chosen is None else [templates.get(chosen, chosen)]
        name = find_format("\n".join(sources)) if config.reply_format == "auto" else config.reply_format
        tokenizer = llm.tokenizer
        special = set() if tokenizer is None else {tokenizer.token_text(i) for i in tokenizer.special_token_ids}
        return cls(
            llm=llm,
            config=config,
            names=tuple(config.served_model_name or names),
            reply_format=FORMATS[name],
            has_template=tokenizer is not None and bool(sources),
            thought_markers=ThoughtMarkers.of(FORMATS[name], tokenizer),
            token_names=TokenNames(tokenizer),
            hides_markers=any(marker.strip() in special for marker in FORMATS[name].markers),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          ValueError: it has none.
        """
        if self.llm.tokenizer is None:
            raise ValueError("this server's model has no tokenizer; it takes and gives token ids only")
        return self.llm.tokenizer

    @property
    def tokenizer_info(self) -> dict[str, str | None]:
        """What clients need to know beside /tokenize: special tokens by their names, and the chat template.

        Source: vLLM's server, "tokenizer_info". Evaluation harnesses ask for it in place of a tokenizer of their own.
        """
        known, chosen = self.llm.chat_templates, self.config.chat_template
        template = known.templates.get(chosen or DEFAULT)
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
        source = chosen if template is None else template.source
        return names | dict(known.special_tokens) | {"chat_template": source}

    def answering_name(self, requested: Any) -> str | None:
        """The name that the answer to a request bears.

        Args:
          requested: the request's "model".

        Raises:
          RefusedError: no model is served under that name, or none is named.
        """
        if not self.names:
            return requested if isinstance(requested, str) else None
        if requested is None:
            raise RefusedError(
                f"model must be given; this server has {', '.join(self.names)}", status=400, param="model"
            )
        if requested not in self.names:
            raise RefusedError(
                f"model {requested!r:.200} does not exist; this server has {', '.join(self.names)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return requested

    def check_limits(self, params: SamplingParams, *, num_prompts: int = 1) -> None:
        """Refuses a request that asks for more than one may.

        Raises:
          ValueError: it does; the message names the field and the setting.
        """
        config = self.config
        grammar = params.structured
        asked: Mapping[str, tuple[int, int | None, str]] = {
            "prompt": (num_prompts, config.max_prompts, "max_prompts"),
            "n": (params.n, config.max_n, "max_n"),
            "max_tokens": (params.max_tokens or 0, config.max_output_tokens, "max_output_tokens"),
            "stop": (len(params.stop_strings), config.max_stop, "max_stop"),
            "bad_words": (len(params.bad_words or ()), config.max_stop, "max_stop"),
            "stop and bad_words": (
                _longest(params.stop_strings, params.bad_words),
                config.max_stop_length,
                "max_stop_length",
            ),
            "structured_outputs": (_num_bytes(grammar), config.max_grammar_bytes, "max_grammar_bytes"),
        }
        for name, (number, limit, setting) in asked.items():
            if limit is not None and number > limit:
                raise ValueError(f"{name} must be at most {limit} (the server's {setting}), got {number}")

    @property
    def default_params(self) -> SamplingParams:
        """The checkpoint's sampling settings, within the server's limit of tokens."""
        return self.limited(self.llm.default_params)

    def limited(self, params: SamplingParams) -> SamplingParams:
        """Parameters that a request did not choose itself, within the server's limit of tokens."""
        limit = self.config.max_output_tokens
        if limit is None or (params.max_tokens is not None and params.max_tokens <= limit):
            return params
        return dataclasses.replace(params, max_tokens=limit)


def _longest(*words: Sequence[str] | None) -> int:
    return max((len(word) for group in words for word in group or ()), default=0)


def _num_bytes(structured: Any) -> int:
    if structured is None:
        return 0
    parts = (structured.json, structured.regex, structured.lark, *(structured.choice or ()))
    return sum(len(part.encode()) for part in parts if part is not None)
