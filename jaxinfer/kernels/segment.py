"""Segment: tokens of a step that attend in rows of equal length.

Owns: what a kernel has to know of such tokens.
Does not know: how they attend, nor which requests they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segment:
    """Part of a step's tokens, as R rows of Q queries each. The queries of a row are its last q_len positions.

    A decoding sequence is a row with one query. A prompt is cut into rows: 40 tokens in rows of 16 queries give rows
    of 16, 16 and 8 live queries, whose kv_len is 16, 32 and 40.

    Args:
      page_table: int32[R, W], the KV pages of each row, in the order of the text.
      kv_len: int32[R], positions of each row that hold keys after this step's keys are written.
      q_len: int32[R], live queries of each row; its other Q - q_len queries are padding.
      sequence_id: int32[R], the number of the sequence that each row belongs to. Neighbouring rows with the same
        number are pieces of one prompt.
      num_queries: Q.
    """

    page_table: Int[Array, "R W"]
    kv_len: Int[Array, " R"]
    q_len: Int[Array, " R"]
    sequence_id: Int[Array, " R"]
    num_queries: int = field(metadata={"static": True})

    @property
    def num_tokens(self) -> int:
        """R * Q, padding included."""
        return self.kv_len.shape[0] * self.num_queries
