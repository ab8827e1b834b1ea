"""Sizes of vocabularies, random logits, and functions on a mesh."""

import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxinfer.communication.collectives import VOCABULARY
from jaxinfer.communication.mesh import make_mesh

SMALL = 48
"""Ids of the distribution tests: every one is seen often."""
MEDIUM = 400
"""More than the candidates hold."""
GROUPED = 20_000
"""More than NUM_CANDIDATES groups: candidates are found in two stages."""
BIG = 131_072
BACKENDS = ("xla", "pallas")
"""On the CPU the kernels of "pallas" are interpreted."""
P_VALUE = 1e-4
"""Seeds are fixed, so a test that passes once always passes; the level says how much it may have been luck."""


@functools.cache
def on_mesh(function, *, mesh=None, **options):
    """The function of (logits, ...) with these options, jitted over a mesh, by default one of a single device."""
    function, mesh = functools.partial(function, **options), make_mesh() if mesh is None else mesh

    def call(logits, *rest):
        specs = (P(None, VOCABULARY), *(P() for _ in rest))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(logits, *rest)

    return jax.jit(call)


def random_logits(rng, num_rows, vocab_size):
    """Peaked, ordinary and flat rows; every other one rounded to eighths so that values tie."""
    logits = rng.normal(size=(num_rows, vocab_size)) * rng.choice([0.05, 1.0, 6.0], (num_rows, 1))
    logits[::2] = np.round(logits[::2] * 8) / 8
    return logits.astype(np.float32)
