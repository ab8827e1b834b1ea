"""How each kind of array is sharded over the mesh.

Owns: a PartitionSpec for each kind of array, and the padding of the vocabulary.
Does not know: which model uses them.
"""

from __future__ import annotations

from jax.sharding import PartitionSpec

from jaxinfer.communication.mesh import PIPE, TENSOR

REPLICATED = PartitionSpec()
PER_STAGE = PartitionSpec(PIPE)
"""[pp, ...]: one entry per stage, equal on all its shards (norms, biases added after a psum)."""
COLUMN_PARALLEL = PartitionSpec(PIPE, TENSOR)
"""[pp, out, ...]: the output features are split over the shards."""
ROW_PARALLEL = PartitionSpec(PIPE, None, TENSOR)
"""[pp, out, in]: the input features are split over the shards."""
VOCABULARY_PARALLEL = PartitionSpec((PIPE, TENSOR))
"""[V, ...]: rows of the vocabulary are split over the whole mesh."""
VOCABULARY_COLUMNS = PartitionSpec(None, (PIPE, TENSOR))
"""[.., V]: columns of the vocabulary are split over the whole mesh."""
KV_PAGES = PartitionSpec(PIPE, TENSOR)
"""[pp * P, K, C, H]: every stage has P pages, whose kv heads are split over its shards."""


def padded_vocabulary(vocab_size: int, num_shards: int) -> int:
    """vocab_size rounded up to a multiple of num_shards, so that all shards have equally many rows."""
    return -(-vocab_size // num_shards) * num_shards
