"""Lowering for a GPU on a machine without one."""

import warnings

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
MESH = AbstractMesh((1, 1), ("pipe", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=H100)
"""The mesh that a shard_map inside a function must name."""
TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def lowered_for_gpu(function, *arguments) -> str:
    """The program's text; Pallas' Triton lowering has run on every kernel in it."""
    with jax.sharding.use_abstract_mesh(MESH), warnings.catch_warnings():
        # From jax 0.11 on, Pallas through Triton warns that it is to be removed.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[TRITON])(*arguments)
    return exported.mlir_module()


def count_kernels(text: str) -> int:
    """Triton kernels in a program; equal ones that share a function count once."""
    return text.count("stablehlo.custom_call @__gpu$xla.gpu.triton")
