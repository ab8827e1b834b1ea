"""Compiles the engine's programs for an H100 on a machine without a GPU and prints what XLA made of them.

    JAX_PLATFORMS=cpu python tests/gpu_program/compile_programs.py --programs decode:1,decode:32,sample:32:full

It takes jax[cuda12] or jax[cuda13] but no driver. What it cannot show is time, and which kernels XLA would choose for
matrix products: without a device nothing is autotuned, and products get XLA's default tiles and splits.

Programs are written as decode:ROWS, prefill:DECODE_ROWSxPREFILL_ROWS (rows of 16 tokens) and sample:ROWS:VARIANT or
sample:ROWS:VARIANT:NUM_TOP. tapped:ROWS is decode:ROWS that adds a vector of each row's to a layer's residual stream
and captures it. chain:ROWS is eight greedy steps of decode:ROWS in one launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from program_report import array_shapes, find_collectives, num_launches, parse_thunks

from jaxinfer.communication.mesh import PIPE, TENSOR
from jaxinfer.communication.volume import collective_volumes
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.interventions import HookKind
from jaxinfer.layers.taps import LocalHook, TapPlan
from jaxinfer.models.registry import parse_model_config
from jaxinfer.research.interventions import add
from jaxinfer.wrappers.assembly import abstract_model, lay_out
from jaxinfer.wrappers.chains import CHAIN_LEN
from jaxinfer.wrappers.step_batch import SamplerVariant
from jaxinfer.wrappers.step_programs import StepPrograms
from jaxinfer.wrappers.step_shapes import StepShape, StepShapes
from jaxinfer.wrappers.xla_options import compiler_options

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "tests" / "golden" / "h100.gpu_target_config.pbtxt"
CAPABILITY = "9.0"
_NEW_FIELDS = (
    "mem_clock_ghz|reserved_shared_memory_per_block|max_blocks_per_multiprocessor|collective_memory_granularity"
)
"""Fields of the target that jax 0.10 does not know."""
_DEVICELESS = {"xla_gpu_deviceless_cub_mode": "DEVICELESS_CUB_DISABLED"}
"""Options without which XLA asks for a device."""


class Programs:
    """The programs of a model for a mesh of H100s.

    Args:
      fields: of the model's config.json.
      mesh: pipeline stages and tensor shards.
      config: the engine's settings; num_kv_pages must be set.
    """

    def __init__(self, fields: dict[str, Any], mesh: tuple[int, int], config: EngineConfig):
        num_devices = mesh[0] * mesh[1]
        target = TARGET.read_text()
        if jax.__version__.startswith("0.10."):
            target = re.sub(rf"^ *({_NEW_FIELDS}):.*\n", "", target, flags=re.MULTILINE)
        topology = topologies.get_topology_desc("h100", "cuda", target_config=target, topology=f"1x1x{num_devices}")
        devices = np.array(topology.devices).reshape(mesh)
        model_config = parse_model_config(fields)
        layout = lay_out(model_config, config, devices.flat[0].platform, CAPABILITY)
        self._shapes = StepShapes(config, max_model_len=layout.max_model_len, coarse=True)
        self._mesh = Mesh(devices, (PIPE, TENSOR), axis_types=(AxisType.Auto,) * 2)
        self._programs = StepPrograms(
            abstract_model(model_config, layout),
            shapes=self._shapes,
            cache_shape=layout.cache_shape(
                model_config, num_pages=(config.num_kv_pages or 0) + 1, page_size=config.page_size
            ),
            dtype=layout.dtype,
            mesh=self._mesh,
        )

    def report(self, name: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        """The figures of a program, by the name that the command line takes.

        Args:
          name: the program.
          folder: where XLA dumps what it does.
          options: XLA options beside the engine's own.
        """
        traced, own_options = self._traced(name)
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = traced.lower().compile(compiler_options={**_DEVICELESS, **own_options, **options, **dump})
        # The first file is written only where a pass changed something.
        files = [
            *Path(folder).glob("*thunk_sequence_after_thunk_passes.txt"),
            *Path(folder).glob("*thunk_sequence.txt"),
        ]
        thunks = parse_thunks(files[0].read_text())
        everything = [thunk for top in thunks for thunk in top.everything()]
        memory, text = compiled.memory_analysis(), compiled.as_text()
        return {
            "kernels": num_launches(thunks, min),
            "kernels_with_fallbacks": num_launches(thunks, max),
            "eager_kernels": sum(thunk.is_launch for thunk in thunks),
            "command_buffers": sum(thunk.kind == "CommandBuffer" for thunk in everything),
            "loops": sum(thunk.kind == "While" for thunk in everything),
            "conditionals": sum(thunk.kind == "Conditional" for thunk in everything),
            "temp_bytes": memory.temp_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "collectives": [dataclasses.asdict(entry) for entry in find_collectives(text)],
            "volumes": [
                dataclasses.asdict(entry) for entry in collective_volumes(traced.jaxpr.jaxpr, self._mesh.shape)
            ],
            "shapes": sorted(array_shapes(text)),
        }

    def _traced(self, name: str) -> tuple[jax.stages.Traced, dict[str, Any]]:
        kind, rows, *more = name.split(":")
        if kind == "sample":
            num_top = int(more[1]) if len(more) > 1 else None
            return self._programs.sample(int(rows), SamplerVariant[more[0].upper()], num_top), {}
        num_decode, _, num_prefill = rows.partition("x")
        shape = self._shape(int(num_decode), int(num_prefill or 0))
        options = compiler_options("gpu", shape.num_tokens)
        if kind == "chain":
            return self._programs.chain(shape, CHAIN_LEN, SamplerVariant.GREEDY), options
        if kind == "tapped":
            return self._programs.tapped(shape, self._plan()), options
        return self._programs.forward(shape), options

    def _plan(self) -> TapPlan:
        """One vector added to the residual stream of the first layer, which is captured."""
        site = "layers.0.residual"
        width = self._programs.sites()[site].shape[0]
        kind = HookKind.of(add, site, 0, {"vector": np.zeros(width, np.float32), "scale": np.ones((), np.float32)})
        return TapPlan(captured=frozenset({site}), hooks=(LocalHook(kind=kind, site=site),))

    def _shape(self, num_decode: int, num_prefill: int) -> StepShape:
        num_logits = num_decode + (num_prefill > 0)
        return self._shapes.shape(num_decode=num_decode, num_prefill=num_prefill, num_logits=num_logits)


def _option(entry: str) -> tuple[str, str | bool]:
    """An XLA option of the command line; a switch has to be a bool."""
    name, value = entry.split("=", 1)
    return name, {"true": True, "false": False}.get(value, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "bench-8b.json"), help="config.json of the model")
    parser.add_argument("--layers", type=int, help="layers instead of the model's own number")
    parser.add_argument("--mesh", default="1x1", help="pipeline stages x tensor shards")
    parser.add_argument("--programs", required=True, help="comma-separated")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=1152)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--num-kv-pages", type=int, default=2304)
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--sliding-window", type=int)
    parser.add_argument("--sink-tokens", type=int, default=0)
    parser.add_argument("--option", action="append", default=[], help="XLA option, name=value, beside the engine's own")
    parser.add_argument("--dump", help="folder for XLA's dumps, one folder for each program; default: none is kept")
    parser.add_argument("--json", help="file for the figures of all programs, by name")
    arguments = parser.parse_args()
    fields = json.loads(Path(arguments.config).read_text())
    if arguments.layers is not None:
        fields["num_hidden_layers"] = arguments.layers
    stages, shards = map(int, arguments.mesh.split("x"))
    config = EngineConfig(
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        num_kv_pages=arguments.num_kv_pages,
        quantization=arguments.quantization,
        sliding_window=arguments.sliding_window,
        sink_tokens=arguments.sink_tokens,
        pipeline_parallel_size=stages,
        tensor_parallel_size=shards,
    )
    programs = Programs(fields, (stages, shards), config)
    options = dict(_option(entry) for entry in arguments.option)
    figures = {}
    for name in arguments.programs.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = temporary if arguments.dump is None else str(Path(arguments.dump) / name.replace(":", "_"))
            start = time.perf_counter()
            found = programs.report(name, folder, options)
        figures[name] = found
        print(
            f"{name}: {found['kernels']} kernels, {found['kernels_with_fallbacks']} with fallbacks, "
            f"{found['eager_kernels']} eager, "
            f"{found['command_buffers']} command buffers, {found['loops']} loops, "
            f"{found['conditionals']} conditionals, temp {found['temp_bytes'] / 2**20:.1f} MiB, "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )
        for entry in found["collectives"]:
            print(f"  {entry['count']} x {entry['kind']} of {entry['arrays']}, {entry['num_bytes'] / 1024:.1f} KiB")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
