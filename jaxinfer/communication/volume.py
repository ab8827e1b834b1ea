"""How much a program sends between devices, computed from its trace without running it.

Owns: finding the collectives in a jaxpr, and the arithmetic of their bytes.
Does not know: what the program computes.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Jaxpr

_AXES = {"psum": "axes", "pmax": "axes", "pmin": "axes", "all_gather": "axis_name", "ppermute": "axis_name"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveVolume:
    """All uses of one collective in one program.

    Args:
      name: the function's name in communication/collectives.py.
      axes: mesh axes it runs over.
      num_devices: devices that take part in each use.
      count: how many times it is used.
      payload_bytes: size of one device's operands, summed over the uses.
      sent_bytes: bytes that one device sends, summed over the uses. With ring algorithms over n devices that is
        2 (n - 1) / n of the payload for a sum, maximum or minimum, n - 1 times the payload for a gather, and the
        payload for a permutation.
      widest: the most numbers per row (along all axes but the first) of any operand.
    """

    name: str
    axes: tuple[str, ...]
    num_devices: int
    count: int
    payload_bytes: int
    sent_bytes: int
    widest: int


def collective_volumes(jaxpr: Jaxpr, mesh_shape: Mapping[str, int]) -> list[CollectiveVolume]:
    """The collectives of one run of a traced program, in the order of their first use.

    Of the branches of a conditional, the one that sends least is counted, since the others handle rare cases, such as
    rows that a sampler has to redo.

    Args:
      jaxpr: the traced program, for one device or with a shard_map.
      mesh_shape: size of every mesh axis.

    Raises:
      ValueError: a collective is in a loop whose number of rounds cannot be read off the trace.
    """
    found = collections.defaultdict(list)
    for name, primitive, axes, aval in _collectives(jaxpr):
        found[name, primitive, axes].append(aval)
    return [
        _volume(name, primitive, axes, math.prod(mesh_shape[axis] for axis in axes), avals)
        for (name, primitive, axes), avals in found.items()
    ]


def _volume(name: str, primitive: str, axes: tuple[str, ...], size: int, avals: list[Any]) -> CollectiveVolume:
    payload = sum(aval.size * aval.dtype.itemsize for aval in avals)
    sent = {"all_gather": payload * (size - 1), "ppermute": payload}.get(primitive, 2 * payload * (size - 1) // size)
    return CollectiveVolume(
        name=name,
        axes=axes,
        num_devices=size,
        count=len(avals),
        payload_bytes=payload,
        sent_bytes=sent,
        widest=max(math.prod(aval.shape[1:]) for aval in avals),
    )


def _collectives(jaxpr: Jaxpr) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    """(name, primitive, axes, operand) of every collective, once for each time that it runs."""
    for equation in jaxpr.eqns:
        primitive, params = equation.primitive.name, equation.params
        if primitive in _AXES:
            name = str(equation.source_info.name_stack).rsplit("/", 1)[-1]
            axes = params[_AXES[primitive]]
            for operand in equation.invars:
                yield name, primitive, axes if isinstance(axes, tuple) else (axes,), operand.aval
        elif primitive == "cond":
            branches = [list(_collectives(branch.jaxpr)) for branch in params["branches"]]
            yield from min(branches, key=lambda uses: sum(aval.size for *_, aval in uses))
        else:
            uses = [use for inner in _inner_jaxprs(params) for use in _collectives(inner)]
            if uses and primitive == "while":
                raise ValueError(f"{uses[0][0]} runs in a loop of unknown length")
            yield from uses * params.get("length", 1)


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(entry, "jaxpr", entry)
            if isinstance(inner, Jaxpr):
                yield inner
