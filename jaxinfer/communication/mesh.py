"""The device mesh: pipeline stages times tensor shards.

Owns: the axis names and the construction of the mesh.
Does not know: models, batches.
"""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

PIPE = "pipe"
TENSOR = "tensor"


def make_mesh(*, pipeline_parallel_size: int = 1, tensor_parallel_size: int = 1) -> Mesh:
    """The mesh ("pipe", "tensor") over the first devices of the default backend.

    Args:
      pipeline_parallel_size: stages.
      tensor_parallel_size: shards of each stage.

    Returns:
      A mesh whose axes have the type Auto; every step runs in a shard_map that is manual over both axes.

    Raises:
      ValueError: there are fewer devices than the mesh needs.
    """
    needed = pipeline_parallel_size * tensor_parallel_size
    devices = jax.devices()
    if needed > len(devices):
        simulate = f", or set XLA_FLAGS=--xla_force_host_platform_device_count={needed} to simulate them"
        raise ValueError(
            f"a mesh of {pipeline_parallel_size} pipeline x {tensor_parallel_size} tensor needs {needed} devices, "
            f"found {len(devices)} ({devices[0].platform}); lower pipeline_parallel_size or tensor_parallel_size"
            f"{simulate if devices[0].platform == 'cpu' else ''}"
        )
    return jax.make_mesh(
        (pipeline_parallel_size, tensor_parallel_size),
        (PIPE, TENSOR),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[:needed],
    )


def abstract_mesh(pipeline_parallel_size: int, tensor_parallel_size: int) -> AbstractMesh:
    """A mesh of the same shape without devices, for tracing programs on machines that have fewer."""
    sizes = (pipeline_parallel_size, tensor_parallel_size)
    return AbstractMesh(sizes, (PIPE, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))
