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

from jaxinfer.config.sizes import size_text
from jaxinfer.interventions import Hook, HookKind, HookTable
from jaxinfer.layers.taps import call_intervention
from jaxinfer.sites import LOGITS, PROBS, Site
from jaxinfer.wrappers.programs import ProgramCache, ProgramKey
from jaxinfer.wrappers.step_programs import StepPrograms

_NO_END = np.iinfo(np.int32).max
MAX_TABLES = 32
"""Tables that are kept although no request needs them."""
MAX_CHECKED = 1024


class HookTables:
    """The tables of a model.

    Args:
      programs: the compiled programs, of which "place" writes a row.
      step_programs: makes the tables.
      max_bytes: limit of the tables of one request's hooks, and of the tables that are kept though nobody needs them.
    """

    def __init__(self, programs: ProgramCache, step_programs: StepPrograms, *, max_bytes: int):
        self._programs = programs
        self._step_programs = step_programs
        self._max_bytes = max_bytes
        self._tables: dict[HookKind, HookTable] = {}  # without constants; the one used last is the last
        self._constants: dict[int, tuple[np.ndarray, jax.Array]] = {}  # by id of the host's array
        self._checked: dict[HookKind, None] = {}

    def check(self, kind: HookKind, site: Site | None) -> None:
        """Refuses an intervention that cannot be part of a program; any thread may ask.

        Args:
          kind: the hook.
          site: the one that it names; None for a function of logits.

        Raises:
          ValueError: the function raises when it is traced, XLA cannot compile it, its result has another shape than
            the site's values, or the values at the site cannot be changed.
        """
        if kind in self._checked:
            return
        if site is not None and (kind.site == LOGITS or kind.site.endswith(PROBS)):
            other = "attention.heads" if kind.site.endswith(PROBS) else "final_norm"
            raise ValueError(f"{kind}: values at this site can be captured, not changed; use {other}")
        if site is None:
            what = str(kind.intervention)
            lowered = _lowered(what, lambda: self._step_programs.lower_function(kind))
        else:
            what = f"{kind}, for x of shape {site.dims},"
            lowered = _lowered(what, lambda: _lower(kind, site))
            found = lowered.out_info
            if not hasattr(found, "shape"):
                raise ValueError(f"{kind} must return one array, got {type(found).__name__}")
            if found.shape[1:] != site.dims:
                raise ValueError(f"{kind} must return a value of x's shape {site.dims}, got {found.shape[1:]}")
        try:
            lowered.compile()
        except Exception as error:  # whatever XLA raises
            raise ValueError(f"{what} cannot be compiled: {_reason(error)}") from error
        if len(self._checked) > MAX_CHECKED:
            self._checked = {}
        self._checked[kind] = None

    def check_size(self, kinds: Collection[HookKind]) -> None:
        """Refuses the hooks of a request whose tables would take too much memory on the devices.

        Raises:
          ValueError: they exceed the limit.
        """
        num_bytes = self._num_bytes(kinds)
        if num_bytes > self._max_bytes:
            raise ValueError(
                f"{next(iter(kinds))}{f' and {len(kinds) - 1} more' if len(kinds) > 1 else ''}: the parameters take "
                f"{size_text(num_bytes)} for {self._step_programs.num_table_rows - 1} requests, the limit is "
                f"{size_text(self._max_bytes)}; make what all requests share a constant (with_constants), lower "
                f"max_num_seqs or raise max_research_bytes"
            )

    def place(self, placed: Iterable[tuple[int, Hook]]) -> None:
        """Uploads the parameters of hooks, each to a row of its kind's table."""
        for row, hook in placed:
            program = self._programs.get("place", hook.kind)
            stop = _NO_END if hook.span.stop is None else min(hook.span.stop, _NO_END)
            numbers = np.array([row, min(hook.span.start, _NO_END), stop, hook.prompt_len], np.int32)
            self._tables[hook.kind] = program(self._table(hook.kind), numbers, dict(hook.parameters))

    def of(self, kinds: Iterable[HookKind]) -> list[HookTable]:
        """The tables of some kinds, with their constants."""
        found = []
        for kind in kinds:
            self._tables[kind] = self._table(kind)
            constants = {name: self._on_device(array) for name, array in kind.intervention.constants.items()}
            found.append(self._tables[kind]._replace(constants=constants))
        return found

    def drop_unused(self, live: Collection[HookKind]) -> Sequence[HookKind]:
        """Drops the tables used least recently, of those that no request needs, if they are many or large.

        Args:
          live: the kinds that requests need.

        Returns:
          The kinds that were dropped, with their programs.
        """
        unused = [kind for kind in self._tables if kind not in live]
        dropped = []
        while unused and (len(unused) > MAX_TABLES or self._num_bytes(unused) > self._max_bytes):
            dropped.append(unused.pop(0))
            self._drop(dropped[-1])
        return dropped

    def close(self) -> None:
        """Frees the tables; what was placed has to be placed anew."""
        for array in jax.tree.leaves((list(self._tables.values()), [entry for _, entry in self._constants.values()])):
            array.delete()
        self._tables.clear()
        self._constants.clear()

    def _table(self, kind: HookKind) -> HookTable:
        """Takes out the table of a kind, or makes one."""
        return self._tables.pop(kind, None) or self._step_programs.allocate_table(kind)

    def _on_device(self, array: np.ndarray) -> jax.Array:
        """A constant on the devices, which all tables share."""
        if id(array) not in self._constants:
            self._constants[id(array)] = array, self._step_programs.replicated(array)
        return self._constants[id(array)][1]

    def _num_bytes(self, kinds: Collection[HookKind]) -> int:
        rows = self._step_programs.num_table_rows
        tables = sum(
            rows * math.prod(dims) * np.dtype(dtype).itemsize for kind in kinds for _, dims, dtype in kind.signature
        )
        constants = {id(x): x.nbytes for kind in kinds for x in kind.intervention.constants.values()}
        return tables + sum(constants.values())

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
        used = {id(x) for other in self._tables for x in other.intervention.constants.values()}
        self._constants = {key: entry for key, entry in self._constants.items() if key in used}


def _lower(kind: HookKind, site: Site) -> jax.stages.Lowered:
    """An intervention at a site for two tokens, lowered as in a program."""
    per_token = kind.intervention.per_token
    integers = jax.ShapeDtypeStruct((2,), jnp.int32)
    parameters = {
        name: jax.ShapeDtypeStruct((2, *(dims[1:] if name in per_token else dims)), dtype)
        for name, dims, dtype in kind.signature
    }
    constants = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in kind.intervention.constants.items()}
    x = jax.ShapeDtypeStruct((2, *site.dims), site.dtype)

    def call(x: Any, positions: Any, prompt_lens: Any, parameters: Any, constants: Any) -> Any:
        of_token = functools.partial(call_intervention, kind, constants=constants)
        return jax.vmap(of_token)(x, positions, prompt_lens, parameters)

    return jax.jit(call).lower(x, integers, integers, parameters, constants)


def _lowered(what: str, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Lowered:
    """A program with a function of the user's, lowered.

    Raises:
      ValueError: the function raises something; the message says what.
    """
    try:
        return lower()
    except Exception as error:  # whatever the user's function raises
        if isinstance(error, ValueError) and str(error).startswith(what):
            raise
        raise ValueError(
            f"{what} cannot be traced: {_reason(error)}; it must be a pure function of arrays, without branches on "
            f"their values"
        ) from error


def _reason(error: Exception) -> str:
    (reason, *_) = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {reason}"
