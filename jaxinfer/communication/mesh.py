"""The device mesh: pipeline stages times tensor shards.

Owns: the axis names and the construction of the mesh.
Does not know: models, batches.
"""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfer.config.engine_config import EngineConfig

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
    return jax.make_mesh(
        (pipeline_parallel_size, tensor_parallel_size),
        (PIPE, TENSOR),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=_devices(pipeline_parallel_size, tensor_parallel_size, replica),
    )


def processes_of_replicas(config: EngineConfig) -> list[tuple[int, ...]]:
    """For each replica of a model, the processes whose devices are in its mesh, ascending.

    Raises:
      ValueError: there are fewer devices than the replicas need.
    """
    found = []
    for replica in reversed(range(config.data_parallel_size)):  # the last one first: its error names all that is needed
        devices = _devices(config.pipeline_parallel_size, config.tensor_parallel_size, replica)
        found.append(tuple(sorted({device.process_index for device in devices})))
    return found[::-1]


def _devices(num_stages: int, num_shards: int, replica: int) -> list[jax.Device]:
    size = num_stages * num_shards
    needed = (replica + 1) * size
    devices = jax.devices()
    if needed > len(devices):
        what = f"a mesh of {num_stages} pipeline x {num_shards} tensor"
        sizes = "pipeline_parallel_size or tensor_parallel_size"
        if replica:
            what, sizes = f"{replica + 1} replicas of {what}", f"data_parallel_size, {sizes}"
        simulate = f", or set XLA_FLAGS=--xla_force_host_platform_device_count={needed} to simulate them"
        raise ValueError(
            f"{what} {'need' if replica else 'needs'} {needed} devices, "
            f"found {len(devices)} ({devices[0].platform}); lower {sizes}"
            f"{simulate if devices[0].platform == 'cpu' else ''}"
        )
    return devices[needed - size : needed]


def abstract_mesh(pipeline_parallel_size: int, tensor_parallel_size: int) -> AbstractMesh:
    """A mesh of the same shape without devices, for tracing programs on machines that have fewer."""
    sizes = (pipeline_parallel_size, tensor_parallel_size)
    return AbstractMesh(sizes, (PIPE, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))
