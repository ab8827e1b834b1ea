"""Interventions: functions that change a value at a site of the model, with parameters of their own for each request.

Owns: making an intervention of a function, binding it to a site, what tells its programs apart.
Does not know: jax, how the function is put into a program (layers/taps.py), the built-in ones (research/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np

from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.request_functions import RequestFunction, function_parameters
from jaxinfer.sites import Sites, Tokens, TokenSpan, require_tokens, token_span


class Intervention(RequestFunction):
    """A function that changes a token's value at a site; made by `intervention`, put to use by `at`."""

    def at(self, site: str, /, *, tokens: Tokens = "all", **parameters: Any) -> BoundIntervention:
        """The intervention at a site, for SamplingParams(interventions=[...]).

        Args:
          site: a name or pattern from llm.sites(), such as "layers.3.residual" or "layers.*.mlp.output".
          tokens: the tokens that it changes: "all", "prompt", "last" (the prompt's last one), "generated", or a slice
            of positions in prompt and output; negative numbers count from the end of the prompt.
          **parameters: of the function: numbers or arrays, which may differ between requests without anything being
            compiled anew as long as shapes and dtypes are the same. A per_token parameter has a leading axis of tokens,
            the first of which is the first token that is changed; tokens beyond it are left alone.

        Raises:
          TypeError: an unknown or missing parameter, or one that is not made of numbers.
          ValueError: a parameter is NaN or infinite, or tokens is none of those above.
        """
        if not isinstance(site, str):
            raise TypeError(f"site must be a name or pattern from llm.sites(), got {site!r}")
        return BoundIntervention(
            intervention=self,
            site=site,
            tokens=require_tokens("tokens", tokens),
            parameters=self.parameter_arrays(parameters),
        )

    def __str__(self) -> str:
        return f"intervention {self.name}"


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class BoundIntervention:
    """An intervention at a site, with the parameters of a request; made by Intervention.at.

    Args:
      intervention: what is done.
      site: a site's name, or a pattern.
      tokens: which tokens are changed.
      parameters: by name.
    """

    intervention: Intervention
    site: str
    tokens: Tokens
    parameters: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class HookKind:
    """What the requests that share a program have in common of an intervention at one site.

    Args:
      intervention: what is done; a processor of logits is one, too.
      site: a site's name.
      ordinal: how many interventions of its request come before it at this site.
      signature: (name, dims, dtype) of the parameters of a request.
    """

    intervention: RequestFunction
    site: str
    ordinal: int
    signature: tuple[tuple[str, tuple[int, ...], str], ...]

    @classmethod
    def of(
        cls, intervention: RequestFunction, site: str, ordinal: int, parameters: Mapping[str, np.ndarray]
    ) -> HookKind:
        """The kind of an intervention with such parameters."""
        signature = tuple((name, array.shape, array.dtype.name) for name, array in sorted(parameters.items()))
        return cls(intervention, site, ordinal, signature)

    def __str__(self) -> str:
        return f"{self.intervention} at {self.site}"


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Hook:
    """An intervention of one request at one site.

    Args:
      kind: what it has in common with those of other requests.
      span: the positions that it changes.
      parameters: by name.
      prompt_len: tokens of the request's prompt.
    """

    kind: HookKind
    span: TokenSpan
    parameters: Mapping[str, np.ndarray]
    prompt_len: int


class HookTable(NamedTuple):
    """The parameters of one kind of hook on the devices: a row for each request that may use it; row 0 is nobody's.

    Args:
      start, stop: int32[N], the positions of each row that are changed.
      prompt_len: int32[N], tokens of each row's prompt.
      parameters: by name, [N, ...]; per_token ones are [N, L, ...] with entries from position `start` on.
      constants: by name, the same for all rows.
    """

    start: Any
    stop: Any
    prompt_len: Any
    parameters: dict[str, Any]
    constants: dict[str, Any]


def bound_hooks(bound: Sequence[BoundIntervention], sites: Sites, *, prompt_len: int) -> tuple[Hook, ...]:
    """The hooks of a request, one for each site that its interventions name.

    Raises:
      ValueError: there is no such site, or a per_token parameter has no axis of tokens.
    """
    hooks: list[Hook] = []
    for entry in bound:
        span = _cut_to_parameters(entry, token_span(entry.tokens, prompt_len=prompt_len))
        for site in sites.find(entry.site):
            ordinal = sum(hook.kind.site == site.name for hook in hooks)
            kind = HookKind.of(entry.intervention, site.name, ordinal, entry.parameters)
            hooks.append(Hook(kind=kind, span=span, parameters=entry.parameters, prompt_len=prompt_len))
    return tuple(hooks)


def _cut_to_parameters(bound: BoundIntervention, span: TokenSpan) -> TokenSpan:
    """The span as far as the per_token parameters have entries."""
    given = {name: bound.parameters[name] for name in bound.intervention.per_token if name in bound.parameters}
    for name, array in given.items():
        if not array.ndim or not len(array):
            raise ValueError(f"{name} of {bound.intervention} must have an axis of tokens with at least one, got none")
    lengths = {name: len(array) for name, array in given.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"parameters of {bound.intervention} must have equally many tokens, got {lengths}")
    if not lengths:
        return span
    end = span.start + next(iter(lengths.values()))
    return TokenSpan(span.start, end if span.stop is None else min(span.stop, end))


@overload
def intervention(function: Callable[..., Any], /) -> Intervention: ...


@overload
def intervention(*, per_token: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Intervention]: ...


def intervention(function: Callable[..., Any] | None = None, /, *, per_token: Sequence[str] = ()) -> Any:
    """Makes an intervention of a pure function (x, context, *, parameters) -> x; a decorator.

    The function sees one token: x is its value at the site, of the shape that llm.sites() tells, whatever the mesh;
    context.position its position in the text, context.prompt_len the length of the prompt, context.layer the number of
    the layer (-1 outside layers). It must be traceable by JAX, and what it returns has x's shape. It is compiled into
    the step of all requests that use it, and applied to their tokens alone.

    Args:
      function: the function; parameters are its keyword-only arguments.
      per_token: names of parameters that have an entry for each token.

    Raises:
      TypeError: the function takes other arguments than these.

    Example:
      >>> @intervention
      ... def steer(x, context, *, vector, scale=1.0):
      ...     return x + scale * vector
      >>> steer.at("layers.1.residual", vector=np.ones(4), scale=2.0).site
      'layers.1.residual'
    """
    if function is None:
        return lambda decorated: _make(decorated, per_token)
    return _make(function, per_token)


def _make(function: Callable[..., Any], per_token: Sequence[str]) -> Intervention:
    known = function_parameters(function)
    if "tokens" in known:
        raise TypeError("a parameter of an intervention cannot be called tokens, which chooses the tokens it changes")
    for name in per_token:
        if name not in known:
            raise unknown_keyword(name, known)
    return Intervention(function=function, per_token=tuple(per_token))
