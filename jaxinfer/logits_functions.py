"""Logits processors and samplers of the user's, with parameters of their own for each request.

Owns: making them of functions, and binding them to the parameters of a request.
Does not know: jax, how they are put into the sampler's program (sampling/user_functions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxinfer.interventions import Hook, HookKind
from jaxinfer.request_functions import RequestFunction, function_parameters
from jaxinfer.sites import LOGITS, TokenSpan

SAMPLER = "sampler"
"""Stands for the place of a sampler, as the name of a site does for that of an intervention."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class LogitsFunction(RequestFunction):
    """A function of a row of logits; made by `logits_processor` or `sampler`, put to use by `using`.

    Args:
      function, constants: as RequestFunction's; the function returns logits, or a sampler's scores. No parameter has an
        entry for each token.
      role: what its result is taken for.
    """

    role: Literal["processor", "sampler"]

    def using(self, **parameters: Any) -> BoundLogitsFunction:
        """The function with the parameters of a request, for SamplingParams.

        Args:
          **parameters: numbers or arrays, which may differ between requests without anything being compiled anew as
            long as shapes and dtypes are the same.

        Raises:
          TypeError: an unknown or missing parameter, or one that is not made of numbers.
          ValueError: a parameter is NaN or infinite.
        """
        return BoundLogitsFunction(function=self, parameters=self.parameter_arrays(parameters))

    def __str__(self) -> str:
        kind = "logits processor" if self.role == "processor" else "sampler"
        return f"{kind} {self.name}"


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class BoundLogitsFunction:
    """A logits processor or sampler with the parameters of a request; made by LogitsFunction.using."""

    function: LogitsFunction
    parameters: Mapping[str, np.ndarray]


def logits_processor(function: Callable[..., Any]) -> LogitsFunction:
    """Makes a logits processor of a pure function (logits, context, *, parameters) -> logits; a decorator.

    The function sees one row: float32 logits of the tokens that this device holds, after masks, biases and penalties
    and before temperature and filters. Tokens that are masked stay masked. `context` has

      token_ids       int32[V], the ids of these tokens; V is the same on all devices
      position        int32[], position that the next token will have; prompt_len: int32[], tokens of the prompt
      output_counts   int32[V], how often the output has each of these tokens
      gumbel          float32[V], the request's sampling noise at this position
      max(x), sum(x), logsumexp(x)   over the whole vocabulary, of an array [V]
      top_k(x, k)     the k largest values of the whole vocabulary and their ids, largest first
      gather(x, ids)  the values of an array [V] at ids of the whole vocabulary

    Raises:
      TypeError: the function takes other arguments than these.

    Example:
      >>> @logits_processor
      ... def prefer(logits, context, *, token, by):
      ...     return logits + by * (context.token_ids == token)
      >>> str(prefer), prefer.using(token=7, by=2.0).parameters["by"].item()
      ('logits processor prefer', 2.0)
    """
    function_parameters(function)
    return LogitsFunction(function=function, role="processor")


def sampler(function: Callable[..., Any]) -> LogitsFunction:
    """Makes a sampler of a pure function (logits, context, *, parameters) -> scores; a decorator.

    Arguments are those of a logits processor; the logits have gone through the request's processors, but through no
    temperature or filter, which such a request does not use. The token with the highest score in the whole vocabulary
    is taken, the lowest id on ties. `logits / temperature + context.gumbel` samples from the softmax, reproducibly.

    Raises:
      TypeError: the function takes other arguments than these.
    """
    function_parameters(function)
    return LogitsFunction(function=function, role="sampler")


def logits_hooks(
    processors: Sequence[BoundLogitsFunction], own_sampler: BoundLogitsFunction | None, *, prompt_len: int
) -> tuple[Hook, ...]:
    """The hooks of a request's processors, in their order, and of its sampler."""
    bound = [(entry, LOGITS) for entry in processors] + ([] if own_sampler is None else [(own_sampler, SAMPLER)])
    hooks = []
    for ordinal, (entry, site) in enumerate(bound):
        kind = HookKind.of(entry.function, site, ordinal, entry.parameters)
        hooks.append(Hook(kind=kind, span=TokenSpan(0), parameters=entry.parameters, prompt_len=prompt_len))
    return tuple(hooks)
