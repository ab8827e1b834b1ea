"""Turns a prompt and its parameters into validated requests for the engine.

Owns: tokenising prompts; choosing seeds, end tokens, token limits and constraints; every check of parameters that needs
the model's vocabulary size or context length.
Does not know: devices, scheduling, how tokens become text again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.constraints.bad_words import BadWords
from jaxinfer.constraints.constraint import AllOf, TokenConstraint, TokenSet
from jaxinfer.constraints.structured import GrammarCompiler
from jaxinfer.constraints.structured_output import StructuredOutput
from jaxinfer.interventions import Hook, bound_hooks
from jaxinfer.logits_functions import logits_hooks
from jaxinfer.request import Capture, Request
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.sites import Sites, token_span
from jaxinfer.tokenizer.tokenizer import Tokenizer
from jaxinfer.tokenizer.vocabulary import token_bytes

Prompt = str | Sequence[int]
NUM_KEPT_WORDS = 64
"""How many lists of bad words stay cached, with the masks that were made for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A validated prompt, ready for the engine.

    Args:
      prompt: the prompt's text; None if the caller gave token ids.
      params: the caller's parameters. For a beam search, SamplingParams made from those settings that both kinds have
        (max_tokens, stop tokens and the like).
      requests: the engine's requests, one per sample. Their max_tokens is at least 1, even if params.max_tokens is 0.
      beam_search: the parameters of a beam search; None for sampling.
    """

    prompt: str | None
    params: SamplingParams
    requests: tuple[Request, ...]
    beam_search: BeamSearchParams | None = None


class Preparation:
    """Turns prompts into submissions; safe to use from several threads.

    Args:
      tokenizer: None takes prompts as token ids only.
      defaults: the checkpoint's end tokens.
      vocab_size: the model's; prompt ids must be below it.
      max_model_len: tokens of prompt and output together that a request may have.
      seed: for a request without a seed of its own, one is derived from this and the request's number.
      find_sites: returns the sites of the model; called only for requests that name some.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        defaults: GenerationDefaults,
        vocab_size: int,
        max_model_len: int,
        seed: int,
        find_sites: Callable[[], Sites],
    ):
        self._find_sites = find_sites
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seed = seed
        self._numbers = itertools.count()  # next() of it is atomic, so threads need no lock
        eos = defaults.eos_token_ids or (tokenizer.eos_token_ids if tokenizer else ())
        self.eos_token_ids = frozenset(eos)
        self._bad_words = lru_cache(NUM_KEPT_WORDS)(self._make_bad_words)

    def samples(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        output_token_ids: Sequence[int] = (),
        add_special_tokens: bool = True,
        ends_at: int | None = None,
    ) -> Submission:
        """Makes a submission for sampling; arguments and errors as TextGenerationController.prepare's.

        With output_token_ids, the samples go on after these tokens of an output.
        """
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, this LLM has none; pass tokenizer=... or stop_token_ids")
        token_ids = self.encode(prompt, add_special_tokens=add_special_tokens)[-(params.truncate_prompt_tokens or 0) :]
        number = next(self._numbers)
        room = (ends_at or self._max_model_len) - len(token_ids) - len(output_token_ids)
        limit = room if params.max_tokens is None else params.max_tokens
        seed = self._hash(f"{self._seed}:{number}") if params.seed is None else params.seed
        first = Request(
            request_id=str(number),
            prompt_token_ids=token_ids,
            output_token_ids=tuple(output_token_ids),
            max_tokens=max(limit, 1),
            stop_token_ids=self._stop_token_ids(params),
            temperature=params.temperature,
            top_k=params.top_k if params.top_k < self._vocab_size else 0,  # 0 also keeps all tokens and costs nothing
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            priority=params.priority,
            edits=params.edits,
            constraint=self._constraint(params),
            capture=self._capture(params, len(token_ids)),
            hooks=self._hooks(params, len(token_ids)),
            logits_hooks=logits_hooks(params.logits_processors or (), params.sampler, prompt_len=len(token_ids)),
        )
        self._check_edits(params, first)
        others = (
            dataclasses.replace(
                first,
                request_id=f"{number}.{index}",
                seed=self._hash(f"{seed}:{index}"),
                prompt_logprobs=None,
                capture=_of_the_output(first),
            )
            for index in range(1, params.n)
        )
        return Submission(prompt=_text(prompt), params=params, requests=(first, *others))

    def beam_search(self, prompt: Prompt, params: BeamSearchParams) -> Submission:
        """Makes a submission for beam search; errors as samples'."""
        ends = SamplingParams(
            temperature=0.0,
            max_tokens=params.max_tokens,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            skip_special_tokens=params.skip_special_tokens,
            priority=params.priority,
        )
        submission = self.samples(prompt, ends)
        return dataclasses.replace(submission, beam_search=params)

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Returns the token ids of a prompt, after checking that there is one and that all are in the vocabulary."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer, this LLM has none; pass token ids or tokenizer=...")
            encode = self._tokenizer.encode if add_special_tokens else self._tokenizer.encode_plain
            token_ids = tuple(encode(_require_unicode(prompt)))
        else:
            token_ids = _as_token_ids(prompt)
        if not token_ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(
                    f"prompt token {position} is {token_id}, expected an id in 0..{self._vocab_size - 1} (the model's "
                    f"vocabulary)"
                )
        return token_ids

    def _check_edits(self, params: SamplingParams, request: Request) -> None:
        """Raises ValueError for token ids outside the vocabulary and for masks that leave no token to sample."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            beyond = [token_id for token_id in getattr(params, name) or () if token_id >= self._vocab_size]
            if beyond:
                raise ValueError(
                    f"{name} has token {beyond[0]}, expected ids in 0..{self._vocab_size - 1} (the model's vocabulary)"
                )
        if not params.min_tokens:
            return
        if params.allowed_token_ids is None:
            allowed, name = range(self._vocab_size), "the vocabulary"
        else:
            allowed, name = params.allowed_token_ids, "allowed_token_ids"
        if request.stop_token_ids.issuperset(allowed):
            raise ValueError(
                f"min_tokens {params.min_tokens} holds back all of {name}, which are stop tokens; allow more"
            )

    def _capture(self, params: SamplingParams, prompt_len: int) -> Capture | None:
        if params.capture is None:
            return None
        sites = {site.name: site for pattern in params.capture for site in self._find_sites().find(pattern)}
        return Capture(sites=tuple(sites.values()), span=token_span(params.capture_tokens, prompt_len=prompt_len))

    def _hooks(self, params: SamplingParams, prompt_len: int) -> tuple[Hook, ...]:
        if not params.interventions:
            return ()
        return bound_hooks(params.interventions, self._find_sites(), prompt_len=prompt_len)

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        own = frozenset(params.stop_token_ids or ())
        return own if params.ignore_eos else own | self.eos_token_ids

    def _constraint(self, params: SamplingParams) -> TokenConstraint | None:
        """The constraint for bad_words and structured, whose mask changes with every token; None without them.

        allowed_token_ids alone is a fixed mask, which the device applies (LogitEdits).
        """
        constraints: list[TokenConstraint] = []
        if params.bad_words:
            self._require_tokenizer("bad_words")
            constraints.append(self._bad_words(tuple(params.bad_words)))
        if isinstance(params.structured, StructuredOutput):
            self._require_tokenizer("structured")
            constraints.append(self._grammars.compile(params.structured))
        if not constraints:
            return None
        # allowed_token_ids is added here too, so that the engine notices when all of them together leave no token.
        if params.allowed_token_ids is not None:
            inside = [token_id for token_id in params.allowed_token_ids if token_id < self._vocab_size]
            constraints.append(TokenSet(inside, self._vocab_size))
        return constraints[0] if len(constraints) == 1 else AllOf(constraints)

    def _require_tokenizer(self, name: str) -> None:
        if self._tokenizer is None:
            raise ValueError(f"{name} needs a tokenizer, this LLM has none; pass tokenizer=...")

    @cached_property
    def _token_bytes(self) -> tuple[bytes, ...]:
        return () if self._tokenizer is None else token_bytes(self._tokenizer)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        if self._tokenizer is None:
            raise ValueError("structured needs a tokenizer")
        return GrammarCompiler(self._tokenizer, vocab_size=self._vocab_size, eos_token_ids=self.eos_token_ids)

    def _make_bad_words(self, words: tuple[str, ...]) -> BadWords:
        return BadWords(words, self._token_bytes, self._vocab_size)

    @staticmethod
    def _hash(text: str) -> int:
        """A seed in 0 .. 2**63 - 1, the same for the same text."""
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _of_the_output(request: Request) -> Capture | None:
    """What another sample of a prompt captures: the output alone, since the first sample has captured the prompt."""
    capture = request.capture
    if capture is None:
        return None
    num_known = len(request.known_token_ids)
    span = dataclasses.replace(capture.span, start=max(capture.span.start, num_known))
    return dataclasses.replace(capture, span=span, num_shared=len(capture.span.within(0, num_known)))


def _text(prompt: Prompt) -> str | None:
    return prompt if isinstance(prompt, str) else None


def _require_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt must be text that UTF-8 can write, got a lone surrogate at {error.start}: "
            f"{text[error.start : error.start + 20]!r}"
        ) from error
    return text


def _as_token_ids(prompt: Any) -> tuple[int, ...]:
    if isinstance(prompt, (bytes, Mapping, set, frozenset)) or not hasattr(prompt, "__iter__"):
        raise TypeError(f"a prompt must be a string or a sequence of token ids, got {type(prompt).__name__}")
    token_ids = []
    for entry in prompt:
        if isinstance(entry, bool) or not hasattr(entry, "__index__"):
            raise TypeError(f"prompt token ids must be integers, got {entry!r} of type {type(entry).__name__}")
        token_ids.append(operator.index(entry))
    return tuple(token_ids)
