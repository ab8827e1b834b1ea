"""Interventions: functions that change a value at a site of the model, with parameters of their own for each request.

Owns: making an intervention of a function, binding it to a site and to parameters, what tells its programs apart.
Does not know: jax, how the function is put into a program (layers/taps.py), the built-in ones (research/).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np

from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.sites import Sites, Tokens, TokenSpan, require_tokens, token_span


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Intervention:
    """A function that changes a token's value at a site; made by `intervention`, put to use by `at`.

    Args:
      function: (x, context, **parameters) -> x, traceable by JAX.
      per_token: names of the parameters that have an entry for each token of the window, of which the function gets the
        one of its token.
      constants: arrays that are the same for all requests, passed like parameters.
    """

    function: Callable[..., Any]
    per_token: tuple[str, ...] = ()
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))

    def with_constants(self, **arrays: Any) -> Intervention:
        """The intervention with some parameters set for all requests, such as the weights of a sparse autoencoder.

        Bind it once and keep the result: every result is an intervention with programs of its own.

        Raises:
          TypeError, ValueError: as at.
        """
        self._require_known(arrays)
        return replace(self, constants={**self.constants, **parameter_arrays(str(self), arrays)})

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
        self._require_known(parameters)
        known = function_parameters(self.function)
        missing = [name for name, needed in known.items() if needed and name not in {*parameters, *self.constants}]
        if missing:
            raise TypeError(f"{self} needs {', '.join(missing)}")
        return BoundIntervention(
            intervention=self,
            site=site,
            tokens=require_tokens("tokens", tokens),
            parameters=parameter_arrays(str(self), parameters),
        )

    def __str__(self) -> str:
        return f"intervention {self.name}"

    def _require_known(self, given: Mapping[str, Any]) -> None:
        known = function_parameters(self.function)
        for name in given:
            if name not in known:
                raise unknown_keyword(name, known)
            if name in self.constants:
                raise TypeError(f"{name} of {self} is a constant already")


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


@runtime_checkable
class SiteFunction(Protocol):
    """What HookKind needs of an intervention, or of a processor of logits."""

    @property
    def function(self) -> Callable[..., Any]:
        """The user's function."""
        ...

    @property
    def per_token(self) -> tuple[str, ...]:
        """Names of the parameters that have an entry for each token."""
        ...

    @property
    def constants(self) -> Mapping[str, np.ndarray]:
        """Parameters that are the same for all requests."""
        ...


@dataclass(frozen=True, slots=True)
class HookKind:
    """What the requests that share a program have in common of an intervention at one site.

    Args:
      intervention: what is done; a processor of logits is one, too.
      site: a site's name.
      ordinal: how many interventions of its request come before it at this site.
      signature: (name, dims, dtype) of the parameters of a request.
    """

    intervention: SiteFunction
    site: str
    ordinal: int
    signature: tuple[tuple[str, tuple[int, ...], str], ...]

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
        signature = tuple((name, array.shape, array.dtype.name) for name, array in sorted(entry.parameters.items()))
        for site in sites.find(entry.site):
            ordinal = sum(hook.kind.site == site.name for hook in hooks)
            kind = HookKind(entry.intervention, site.name, ordinal, signature)
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


def function_parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """The parameters of a function (x, context, *, parameters) by name, and whether they have no default.

    Raises:
      TypeError: the function takes other arguments.
    """
    entries = list(inspect.signature(function).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if [entry.kind in positional for entry in entries[:2]] != [True, True] or any(
        entry.kind is not inspect.Parameter.KEYWORD_ONLY for entry in entries[2:]
    ):
        raise TypeError(
            f"expected a function (x, context, *, parameters), got {function!r} with {inspect.signature(function)}; "
            "put a * in front of the parameters"
        )
    return {entry.name: entry.default is inspect.Parameter.empty for entry in entries[2:]}


def parameter_arrays(owner: str, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Numbers and arrays as numpy arrays of 32 bits; owner is whose they are, for error messages.

    Raises:
      TypeError: a value is not made of numbers.
      ValueError: a value is NaN or infinite.
    """
    arrays = {}
    for name, value in given.items():
        array = np.asarray(value)
        if array.dtype.kind == "V" and hasattr(value, "astype"):  # bfloat16
            array = np.asarray(value.astype(np.float32))
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name} of {owner} must be numbers, got dtype {array.dtype}")
        if array.dtype.kind in "iu" and array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
            raise ValueError(f"{name} of {owner} must be in -2**31..2**31 - 1, got {array.min()}..{array.max()}")
        wanted = {"f": np.float32, "i": np.int32, "u": np.int32, "b": np.bool_}[array.dtype.kind]
        with np.errstate(over="ignore"):
            arrays[name] = array.astype(wanted)
        if array.dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} of {owner} must be finite in float32, got NaN, infinity or a larger number")
    return arrays
