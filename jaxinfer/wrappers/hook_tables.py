"""The parameters of interventions on the devices, in a table for each kind of hook.

Owns: the tables, uploads to their rows, which tables are dropped, and the checks of interventions.
Does not know: which step needs which table, requests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.interventions import Hook, HookKind, HookTable
from jaxinfer.layers.taps import call_intervention
from jaxinfer.sites import LOGITS, PROBS, Site
from jaxinfer.wrappers.programs import ProgramCache, ProgramKey
from jaxinfer.wrappers.step_programs import StepPrograms

_NO_END = np.iinfo(np.int32).max
MAX_TABLES = 32
"""Tables that are kept although no request needs them."""


class HookTables:
    """The tables of a model.

    Args:
      programs: the compiled programs, of which "place" writes a row.
      step_programs: makes the tables.
      max_bytes: limit of one table.
    """

    def __init__(self, programs: ProgramCache, step_programs: StepPrograms, *, max_bytes: int):
        self._programs = programs
        self._step_programs = step_programs
        self._max_bytes = max_bytes
        self._tables: dict[HookKind, HookTable] = {}  # the one used last is the last
        self._checked: dict[HookKind, None] = {}

    def check(self, kind: HookKind, site: Site | None) -> None:
        """Refuses an intervention that cannot be part of a program; any thread may ask.

        Args:
          kind: the hook.
          site: the one that it names; None for a function of logits.

        Raises:
          ValueError: the function raises when it is traced, its result has another shape than the site's values, its
            parameters take too much memory, or the values at the site cannot be changed.
        """
        if kind in self._checked:
            return
        if site is not None and (kind.site == LOGITS or kind.site.endswith(PROBS)):
            other = "attention.heads" if kind.site.endswith(PROBS) else "final_norm"
            raise ValueError(f"{kind}: values at this site can be captured, not changed; use {other}")
        num_rows = self._step_programs.num_table_rows
        row_bytes = sum(math.prod(dims) * np.dtype(dtype).itemsize for _, dims, dtype in kind.signature)
        if row_bytes * num_rows > self._max_bytes:
            raise ValueError(
                f"{kind}: its parameters take {row_bytes * num_rows / 2**30:.2f} GiB for {num_rows - 1} requests, the "
                f"limit is {self._max_bytes / 2**30:.2f} GiB; make what all requests share a constant "
                f"(with_constants), lower max_num_seqs or raise max_research_bytes"
            )
        if site is None:
            _traced(str(kind.intervention), lambda: self._step_programs.trace_function(kind))
        else:
            found = _result(kind, site)
            if found.shape != site.dims:
                raise ValueError(f"{kind} must return a value of x's shape {site.dims}, got {found.shape}")
        self._checked[kind] = None

    def place(self, placed: Iterable[tuple[int, Hook]]) -> None:
        """Uploads the parameters of hooks, each to a row of its kind's table."""
        for row, hook in placed:
            kind = hook.kind
            program = self._programs.get("place", kind)
            table = self._tables.pop(kind, None) or self._step_programs.allocate_table(kind)
            stop = _NO_END if hook.span.stop is None else hook.span.stop
            numbers = np.array([row, hook.span.start, stop, hook.prompt_len], np.int32)
            self._tables[kind] = program(table, numbers, dict(hook.parameters))

    def of(self, kinds: Iterable[HookKind]) -> list[HookTable]:
        """The tables of some kinds, which must have been placed."""
        kinds = list(kinds)
        for kind in kinds:
            self._tables[kind] = self._tables.pop(kind)
        return [self._tables[kind] for kind in kinds]

    def drop_unused(self, live: Collection[HookKind]) -> Sequence[HookKind]:
        """Drops the tables used least recently beyond MAX_TABLES of those that no request needs, and their programs.

        Args:
          live: the kinds that requests need.

        Returns:
          The kinds that were dropped.
        """
        unused = [kind for kind in self._tables if kind not in live]
        dropped = unused[: max(0, len(unused) - MAX_TABLES)]
        for kind in dropped:
            self._drop(kind)
        return dropped

    def _drop(self, kind: HookKind) -> None:
        """Forgets a table and the programs of its kind, which nothing in flight needs."""

        def is_of_kind(key: ProgramKey) -> bool:
            name, *arguments = key
            if name == "place":
                return arguments[0] == kind
            if name == "sample_by":
                return kind in arguments[2]
            return name == "tapped" and any(hook.kind == kind for hook in arguments[1].hooks)

        del self._tables[kind]
        self._checked.pop(kind, None)
        self._programs.forget(is_of_kind)

    def close(self) -> None:
        """Frees the tables."""
        for table in self._tables.values():
            jax.tree.map(lambda array: array.delete(), table)
        self._tables.clear()


def _result(kind: HookKind, site: Site) -> jax.ShapeDtypeStruct:
    """What an intervention returns for a token, found by tracing it.

    Raises:
      ValueError: it raises an exception.
    """
    per_token = kind.intervention.per_token
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    parameters = {
        name: jax.ShapeDtypeStruct(dims[1:] if name in per_token else dims, dtype)
        for name, dims, dtype in kind.signature
    }
    constants = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in kind.intervention.constants.items()}
    x = jax.ShapeDtypeStruct(site.dims, site.dtype)
    call = functools.partial(call_intervention, kind)
    what = f"{kind}, for x of shape {site.dims},"
    found = _traced(what, lambda: jax.eval_shape(call, x, integer, integer, parameters, constants=constants))
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise ValueError(f"{kind} must return one array, got {type(found).__name__}")
    return found


def _traced(what: str, trace: Callable[[], Any]) -> Any:
    """The result of tracing a function of the user's.

    Raises:
      ValueError: the function raises something; the message says what.
    """
    try:
        return trace()
    except Exception as error:  # whatever the user's function raises
        if isinstance(error, ValueError) and str(error).startswith(what):
            raise
        (reason, *_) = str(error).splitlines() or [""]
        raise ValueError(
            f"{what} cannot be traced: {type(error).__name__}: {reason}; it must be a pure function of arrays, without "
            f"branches on their values"
        ) from error
