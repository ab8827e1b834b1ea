"""The device mesh: pipeline stages times tensor shards.

Owns: the axis names and the construction of the mesh.
Does not know: models, batches.
"""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

PIPE = "pipe"
TENSOR = "tensor"


def make_mesh(*, pipeline_parallel_size: int = 1, tensor_parallel_size: int = 1, replica: int = 0) -> Mesh:
    """The mesh ("pipe", "tensor") over devices of the default backend: the first ones, or those of a later replica.

    Args:
      pipeline_parallel_size: stages.
      tensor_parallel_size: shards of each stage.
      replica: how many meshes of this size to leave free in front of this one, for other replicas of the model.

    Returns:
      A mesh whose axes have the type Auto; every step runs in a shard_map that is manual over both axes.

    Raises:
      ValueError: there are fewer devices than the mesh needs.
    """
    size = pipeline_parallel_size * tensor_parallel_size
    needed = (replica + 1) * size
    devices = jax.devices()
    if needed > len(devices):
        what = f"a mesh of {pipeline_parallel_size} pipeline x {tensor_parallel_size} tensor"
        sizes = "pipeline_parallel_size or tensor_parallel_size"
        if replica:
            what, sizes = f"{replica + 1} replicas of {what}", f"data_parallel_size, {sizes}"
        simulate = f", or set XLA_FLAGS=--xla_force_host_platform_device_count={needed} to simulate them"
        raise ValueError(
            f"{what} {'need' if replica else 'needs'} {needed} devices, "
            f"found {len(devices)} ({devices[0].platform}); lower {sizes}"
            f"{simulate if devices[0].platform == 'cpu' else ''}"
        )
    return jax.make_mesh(
        (pipeline_parallel_size, tensor_parallel_size),
        (PIPE, TENSOR),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[needed - size : needed],
    )


def abstract_mesh(pipeline_parallel_size: int, tensor_parallel_size: int) -> AbstractMesh:
    """A mesh of the same shape without devices, for tracing programs on machines that have fewer."""
    sizes = (pipeline_parallel_size, tensor_parallel_size)
    return AbstractMesh(sizes, (PIPE, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))
