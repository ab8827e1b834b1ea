"""Taps: what happens at the sites of a model while its program is traced.

Owns: keeping the values of sites that are captured, and calling the interventions for the tokens that they change.
Does not know: requests, where in a layer a site is, how captured values reach the host.

A program without captures and interventions is traced with NO_TAPS, which leaves no trace in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.communication.collectives import gather_shards, tensor_shard
from jaxinfer.interventions import HookKind, HookTable
from jaxinfer.layers.residual import Norm
from jaxinfer.sites import split_layer


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalHook:
    """An intervention at a site of one stage.

    Args:
      kind: the intervention.
      site: the site's name with the number that its layer has within the stage.
    """

    kind: HookKind
    site: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TapPlan:
    """What a program does at its sites, compared by value.

    Args:
      captured: names of the captured sites, with the numbers that layers have within their stage; None for all.
      hooks: the interventions, in the order in which they are called at each site.
    """

    captured: frozenset[str] | None = frozenset()
    hooks: tuple[LocalHook, ...] = ()

    def covers(self, other: TapPlan) -> bool:
        """Whether a program with this plan can do what another plan says; hooks without rows change nothing."""
        keeps = self.captured is None or (other.captured is not None and other.captured <= self.captured)
        return keeps and set(other.hooks) <= set(self.hooks)

    def captures(self, site: str) -> bool:
        """Whether the values at a site are kept."""
        return self.captured is None or site in self.captured

    def touches(self, site: str) -> bool:
        """Whether anything happens at a site."""
        return self.captures(site) or any(hook.site == site for hook in self.hooks)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InterventionContext:
    """What an intervention may know of its token beside the value.

    Args:
      position: int32[], index of the token in its text.
      prompt_len: int32[], tokens of its prompt.
      layer: int32[], number of the layer; -1 outside layers.
    """

    position: Int[Array, ""]
    prompt_len: Int[Array, ""]
    layer: Int[Array, ""]


def call_intervention(
    kind: HookKind,
    x: Float[Array, "..."],
    position: Int[Array, ""],
    prompt_len: Int[Array, ""],
    parameters: Mapping[str, Array],
    *,
    constants: Mapping[str, Array],
) -> Any:
    """Calls an intervention for one token.

    Args:
      kind: the intervention and its site.
      x: the token's value.
      position, prompt_len: as in InterventionContext.
      parameters: the request's; of a per_token one the token's entry.
      constants: the intervention's.

    Returns:
      What its function returns, which is not checked here.
    """
    layer = split_layer(kind.site)[0]
    number = jnp.asarray(-1 if layer is None else layer, jnp.int32)
    context = InterventionContext(position=position, prompt_len=prompt_len, layer=number)
    return kind.intervention.function(x, context, **parameters, **constants)


class Taps:
    """The taps of a program, for one shard and the T tokens of the batch in its stage; made while it is traced.

    Args:
      plan: what happens.
      tables: one for each of plan.hooks.
      rows: int32[J, T], row of each token in the table of each hook; 0 if it is not changed.
      positions: int32[T], index of each token in its text.
    """

    def __init__(self, plan: TapPlan, tables: list[HookTable], rows: Int[Array, "J T"], positions: Int[Array, " T"]):
        self._plan = plan
        self._tables = tables
        self._rows = rows
        self._positions = positions
        self.captured: dict[str, Array] = {}
        """[T, ...] by site."""
        self.failed = jnp.zeros(positions.shape, jnp.int32)
        """int32[T], 1 + the number of the first hook whose result for a token was NaN or infinite; 0 for none. The
        number of hooks + 1 says that a token's residual stream is so (check_end), although no hook's result was."""

    def touches(self, site: str) -> bool:
        """Whether anything happens at a site."""
        return self._plan.touches(site)

    def tap(self, site: str, x: Float[Array, "T ..."], *, is_sharded: bool, copies: int) -> Float[Array, "T ..."]:
        """Captures and changes the value of all tokens at a site; arguments as SiteTaps.__call__'s."""
        whole = _gathered(x, copies) if is_sharded else x
        with jax.named_scope(f"tap {site}"):
            for number, hook in enumerate(self._plan.hooks):
                if hook.site == site:
                    whole = self._changed(number, hook.kind, whole)
        if self._plan.captures(site):
            self.captured[site] = whole
        if not any(hook.site == site for hook in self._plan.hooks):
            return x
        return _own_part(whole, x.shape[1], copies) if is_sharded else whole

    def check_end(self, x: Float[Array, "T D"]) -> None:
        """Looks for tokens whose residual stream has become NaN or infinite behind the last layer."""
        is_bad = ~jnp.isfinite(x).all(axis=1)
        self.failed = jnp.where((self.failed == 0) & is_bad, len(self._plan.hooks) + 1, self.failed)

    def _changed(self, number: int, kind: HookKind, x: Float[Array, "T ..."]) -> Float[Array, "T ..."]:
        """x after an intervention; where its result is not finite, x stays, so that nothing else is poisoned."""
        table, rows = self._tables[number], self._rows[number]
        start = table.start[rows]
        applies = (rows > 0) & (self._positions >= start) & (self._positions < table.stop[rows])
        parameters = {
            name: _of_tokens(values, rows, self._positions - start if name in kind.intervention.per_token else None)
            for name, values in table.parameters.items()
        }
        call = functools.partial(call_intervention, kind, constants=table.constants)
        changed = jax.vmap(call)(x, self._positions, table.prompt_len[rows], parameters).astype(x.dtype)
        features = tuple(range(1, x.ndim))
        is_bad = applies & ~jnp.isfinite(changed).all(axis=features) & jnp.isfinite(x).all(axis=features)
        self.failed = jnp.where((self.failed == 0) & is_bad, number + 1, self.failed)
        keeps = applies & ~is_bad
        return jnp.where(keeps.reshape(-1, *[1] * (x.ndim - 1)), changed, x)


class SiteTaps:
    """The taps of one layer, or of what is outside the layers; models call it at their sites.

    Args:
      taps: the taps of the program; None for none.
      prefix: what the names of the sites begin with, such as "layers.3.".
    """

    def __init__(self, taps: Taps | None = None, prefix: str = ""):
        self._taps = taps
        self._prefix = prefix

    @property
    def are_active(self) -> bool:
        """Whether anything happens at any site."""
        return self._taps is not None

    def layer(self, index: int) -> SiteTaps:
        """The taps of a layer, by its number within the stage."""
        return self if self._taps is None else SiteTaps(self._taps, f"layers.{index}.")

    def touches(self, *sites: str) -> bool:
        """Whether anything happens at any of these sites, so that the value must be computed by itself there."""
        return self._taps is not None and any(self._taps.touches(self._prefix + site) for site in sites)

    def __call__(
        self, site: str, x: Float[Array, "T ..."], *, is_sharded: bool = False, copies: int = 1
    ) -> Float[Array, "T ..."]:
        """The value of all tokens at a site, after the interventions there.

        Args:
          site: the site's name within the layer, such as "mlp.output".
          x: the value before. Equal on all tensor shards, or this shard's part of it.
          is_sharded: whether each shard has a part of x, along axis 1.
          copies: how many neighbouring shards hold the same part.
        """
        if self._taps is None or not self._taps.touches(self._prefix + site):
            return x
        return self._taps.tap(self._prefix + site, x, is_sharded=is_sharded, copies=copies)


NO_TAPS = SiteTaps()


def block_input(
    taps: SiteTaps, site: str, x: Float[Array, "T D"], norm: Norm | None
) -> tuple[Float[Array, "T D"], Norm | None]:
    """The input of a block at its site, and the norm that the block still has to apply; a site sees normed values."""
    if not taps.touches(site):
        return x, norm
    return taps(site, x if norm is None else norm(x)), None


def block_output(taps: SiteTaps, site: str) -> Callable[[Array], Array] | None:
    """What RowParallelLinear has to do to a block's output; None for nothing."""
    return functools.partial(taps, site) if taps.touches(site) else None


def _of_tokens(values: Array, rows: Int[Array, " T"], offsets: Int[Array, " T"] | None) -> Array:
    """Each token's parameters; offsets is each token's index in a per_token parameter, None for other ones."""
    if offsets is None:
        return values[rows]
    return values[rows, jnp.clip(offsets, 0, values.shape[1] - 1)]


def _gathered(x: Float[Array, "T P ..."], copies: int) -> Float[Array, "T W ..."]:
    """The whole of what the shards hold parts of along axis 1."""
    parts = gather_shards(x)
    if copies == 1:
        return parts
    by_shard = parts.reshape(x.shape[0], -1, copies, *x.shape[1:])
    return by_shard[:, :, 0].reshape(x.shape[0], -1, *x.shape[2:])


def _own_part(whole: Float[Array, "T W ..."], size: int, copies: int) -> Float[Array, "T P ..."]:
    """This shard's part of a whole value."""
    return lax.dynamic_slice_in_dim(whole, tensor_shard() // copies * size, size, axis=1)
