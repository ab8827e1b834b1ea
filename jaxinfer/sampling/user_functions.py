"""The user's logits processors and samplers, called for the rows of the requests that have them.

Owns: what such a function may know of its row, and the checks of what it returns.
Does not know: requests, how parameters reach the device.

All functions run inside a shard_map over ("pipe", "tensor"); each device holds one slice of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxinfer.communication.collectives import max_over_vocabulary, sum_over_vocabulary, vocabulary_shard
from jaxinfer.interventions import HookKind, HookTable
from jaxinfer.logits_functions import SAMPLER
from jaxinfer.sampling.noise import gumbel_noise
from jaxinfer.sampling.sampling import argmax_over_vocabulary, local_token_ids
from jaxinfer.sampling.top_values import gathered, top_values


class LogitsContext:
    """What a function of logits may know of its row beside the logits; logits_processor describes it.

    Args:
      size: tokens of this device's slice of the vocabulary.
      position, prompt_len, output_counts, seed: of the row.
      backend: name of the kernel backend.
    """

    def __init__(
        self,
        size: int,
        *,
        position: Int[Array, ""],
        prompt_len: Int[Array, ""],
        output_counts: Int[Array, " V"],
        seed: UInt32[Array, " 2"],
        backend: str,
    ):
        self.token_ids = local_token_ids(size)
        self.position = position
        self.prompt_len = prompt_len
        self.output_counts = output_counts
        self._seed = seed
        self._backend = backend

    @property
    def gumbel(self) -> Float[Array, " V"]:
        """The request's sampling noise for these tokens at this position."""
        return gumbel_noise(self._seed[None], self.position[None], self.token_ids)[0]

    def max(self, x: Float[Array, " V"]) -> Float[Array, ""]:
        """The largest value of the whole vocabulary."""
        return max_over_vocabulary(jnp.max(x))

    def sum(self, x: Float[Array, " V"]) -> Float[Array, ""]:
        """The sum over the whole vocabulary."""
        return sum_over_vocabulary(jnp.sum(x))

    def logsumexp(self, x: Float[Array, " V"]) -> Float[Array, ""]:
        """The logarithm of the sum of exponentials over the whole vocabulary."""
        most = jnp.maximum(self.max(x), -1e30)  # finite, so that a row of -inf gives -inf
        return most + jnp.log(self.sum(jnp.exp(x - most)))

    def top_k(self, x: Float[Array, " V"], k: int) -> tuple[Float[Array, " K"], Int[Array, " K"]]:
        """The k largest values of the whole vocabulary and their token ids, largest first."""
        of_slice = top_values(x[None], min(k, x.shape[0]), backend=self._backend)
        values, ids = gathered(*of_slice, backend=self._backend)
        return values[0, :k], ids[0, :k]

    def gather(self, x: Float[Array, " V"], token_ids: Int[Array, "..."]) -> Float[Array, "..."]:
        """The values at token ids of the whole vocabulary, whichever device holds them."""
        local = token_ids - vocabulary_shard() * x.shape[0]
        owned = (local >= 0) & (local < x.shape[0])
        return sum_over_vocabulary(jnp.where(owned, x[jnp.where(owned, local, 0)], 0.0))


def call_logits_function(
    kind: HookKind,
    logits: Float[Array, " V"],
    position: Int[Array, ""],
    prompt_len: Int[Array, ""],
    output_counts: Int[Array, " V"],
    seed: UInt32[Array, " 2"],
    parameters: Mapping[str, Array],
    *,
    constants: Mapping[str, Array],
    backend: str,
) -> Any:
    """Calls a processor or sampler for one row; returns what it returns, which is not checked here."""
    context = LogitsContext(
        logits.shape[0],
        position=position,
        prompt_len=prompt_len,
        output_counts=output_counts,
        seed=seed,
        backend=backend,
    )
    return kind.intervention.function(logits, context, **parameters, **constants)


class LogitsHooks:
    """The user's functions for the M rows of a step, while the program is traced.

    Args:
      kinds: the functions, in the order in which they are called.
      tables: the parameters of each.
      rows: int32[J, M], row of each logit row in the table of each function; 0 if it does not have the function.
      position, output_counts, seed: of each row.
      backend: name of the kernel backend.
    """

    def __init__(
        self,
        kinds: Sequence[HookKind],
        tables: Sequence[HookTable],
        rows: Int[Array, "J M"],
        *,
        position: Int[Array, " M"],
        output_counts: Int[Array, "M V"],
        seed: UInt32[Array, "M 2"],
        backend: str,
    ):
        self._entries = list(zip(range(1, len(kinds) + 1), kinds, tables, rows, strict=True))
        self._of_rows = (position, output_counts, seed)
        self._backend = backend
        self.failed = jnp.zeros(position.shape, jnp.int32)
        """int32[M], the number, from 1, of the first function whose result for a row cannot be used; 0 for none."""

    def processed(self, logits: Float[Array, "M V"]) -> Float[Array, "M V"]:
        """The logits after all processors; tokens that were masked stay so."""
        for number, kind, table, rows in self._entries:
            if _role(kind) == "processor":
                found = self._called(kind, table, rows, logits)
                found = jnp.where(logits == -jnp.inf, -jnp.inf, found)
                keeps = self._usable(number, rows, found)
                logits = jnp.where(keeps[:, None], found, logits)
        return logits

    def sampled(self, logits: Float[Array, "M V"], tokens: Int[Array, " M"]) -> Int[Array, " M"]:
        """The tokens, those of rows with a sampler of their own taken by it."""
        for number, kind, table, rows in self._entries:
            if _role(kind) == "sampler":
                scores = self._called(kind, table, rows, logits)
                scores = jnp.where(logits == -jnp.inf, -jnp.inf, scores)
                keeps = self._usable(number, rows, scores)
                chosen = argmax_over_vocabulary(scores, local_token_ids(logits.shape[1]))
                tokens = jnp.where(keeps, chosen, tokens)
        return tokens

    def _called(
        self, kind: HookKind, table: HookTable, rows: Int[Array, " M"], logits: Float[Array, "M V"]
    ) -> Float[Array, "M V"]:
        position, output_counts, seed = self._of_rows
        parameters = {name: values[rows] for name, values in table.parameters.items()}
        call = functools.partial(call_logits_function, kind, constants=table.constants, backend=self._backend)
        found = jax.vmap(call)(logits, position, table.prompt_len[rows], output_counts, seed, parameters)
        return found.astype(jnp.float32)

    def _usable(self, number: int, rows: Int[Array, " M"], found: Float[Array, "M V"]) -> Array:
        """Which rows take a function's result: those that have it, unless it is NaN, infinite, or leaves no token."""
        bad = sum_over_vocabulary((jnp.isnan(found) | (found == jnp.inf)).any(axis=1).astype(jnp.int32)) > 0
        bad |= max_over_vocabulary(jnp.where(jnp.isnan(found), -jnp.inf, found).max(axis=1)) == -jnp.inf
        self.failed = jnp.where((self.failed == 0) & (rows > 0) & bad, number, self.failed)
        return (rows > 0) & ~bad


def _role(kind: HookKind) -> str:
    return "sampler" if kind.site == SAMPLER else "processor"
