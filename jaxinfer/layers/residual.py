"""The residual stream between blocks, and the norms that blocks apply to it.

Owns: the addition of a block's output, which may wait for the norm that follows, so that one kernel does both.
Does not know: what the blocks compute.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float

from jaxinfer.kernels.pallas_gemv import RowNorm
from jaxinfer.kernels.pallas_norm import add_norm


@runtime_checkable
class Norm(Protocol):
    """A norm that a block applies to its input or to its output: RMSNorm or LayerNorm of layers/norm.py."""

    @property
    def row_norm(self) -> RowNorm | None:
        """The norm's weight and numbers for a kernel that norms rows itself; None where no kernel can."""
        ...

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Normalises the last axis."""
        ...


class PendingSum(NamedTuple):
    """A residual stream to which the last block's output is still to be added.

    Args:
      x: the stream before.
      y: the block's output.
    """

    x: Float[Array, "T D"]
    y: Float[Array, "T D"]


Stream: TypeAlias = Array | PendingSum
"""A residual stream, [T, D]."""


def added(x: Float[Array, "T D"], y: Float[Array, "T D"], *, backend: str) -> Stream:
    """x + y; with the "pallas" backend, the addition of several rows waits for the norm of the next block."""
    return PendingSum(x, y) if backend == "pallas" and x.shape[0] > 1 else x + y


def total(stream: Stream) -> Float[Array, "T D"]:
    """The stream with everything added."""
    return stream.x + stream.y if isinstance(stream, PendingSum) else stream


def settled(stream: Stream, norm: Norm | None) -> tuple[Float[Array, "T D"], Float[Array, "T D"], Norm | None]:
    """Does the addition that a stream waits for, and the norm after it in the same kernel where there is one.

    Returns:
      The stream; the input of the next block; and the norm that the block still has to apply to that input.
    """
    row_norm = None if norm is None else norm.row_norm
    if not isinstance(stream, PendingSum) or row_norm is None:
        x = total(stream)
        return x, x, norm
    return *add_norm(stream.x, stream.y, row_norm), None
