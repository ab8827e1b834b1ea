"""What the programs of every layout send, keep in place and compile."""

from __future__ import annotations

import re
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from jax.sharding import NamedSharding
from mesh_tools import LAYOUTS, MODELS, layout_name, on_mesh, run
from wrapper_tools import make_random_wrapper

from jaxinfer.checkpoint.directory import read_json
from jaxinfer.communication.mesh import abstract_mesh
from jaxinfer.communication.sharding import KV_PAGES
from jaxinfer.communication.volume import CollectiveVolume, collective_volumes
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.models.registry import parse_model_config
from jaxinfer.sampling.sampling import NUM_CANDIDATES
from jaxinfer.wrappers.assembly import abstract_model, lay_out
from jaxinfer.wrappers.sample_step import SCORE_BLOCK
from jaxinfer.wrappers.step_batch import SamplerVariant
from jaxinfer.wrappers.step_programs import StepPrograms
from jaxinfer.wrappers.step_shapes import StepShapes


def abstract_programs(model: str, layout: tuple[int, int]) -> tuple[StepPrograms, StepShapes]:
    stages, shards = layout
    config = EngineConfig(
        pipeline_parallel_size=stages, tensor_parallel_size=shards, max_model_len=96, max_num_seqs=4 * stages
    )
    model_config = parse_model_config(read_json(load_golden(f"mesh/{model}").path / "config.json"))
    placed = lay_out(model_config, config, "cpu")
    shapes = StepShapes(config, max_model_len=96)
    programs = StepPrograms(
        abstract_model(model_config, placed),
        shapes=shapes,
        cache_shape=placed.cache_shape(model_config, num_pages=8, page_size=16),
        dtype=jnp.dtype("float32"),
        mesh=abstract_mesh(stages, shards),
    )
    return programs, shapes


def volumes_of(programs: StepPrograms, shapes: StepShapes, *, num_prefill: int = 0) -> dict[str, CollectiveVolume]:
    shape = shapes.shape(num_decode=shapes.max_decode, num_prefill=num_prefill, num_logits=0)
    jaxpr = programs.forward(shape).jaxpr.jaxpr
    return {volume.name: volume for volume in collective_volumes(jaxpr, programs._mesh.shape)}


@pytest.mark.parametrize(
    ("model", "layout", "num_prefill"),
    [("llama", layout, 0) for layout in LAYOUTS] + [(model, (2, 4), 1) for model in MODELS],
)
def test_forward_sends_two_sums_a_layer_and_activations_once(model, layout, num_prefill):
    """4 decode rows a stage, a prefill row of 16 tokens, 8 logit rows, 64 float32 features; five layers, or four."""
    programs, shapes = abstract_programs(model, layout)
    found = volumes_of(programs, shapes, num_prefill=num_prefill)
    stages, shards = layout
    activations = 4 * 64 * (4 + 16 * num_prefill)
    layers = -(-(5 if model in ("llama", "gemma3") else 4) // stages)
    expected = {}
    if stages * shards > 1:
        expected["sum_over_vocabulary"] = (1, activations)
    if shards > 1:
        expected["sum_over_tensor"] = (2 * layers, 2 * layers * activations)
    if stages > 1:
        expected |= {"send_to_next_stage": (1, activations), "share_from_last_stage": (1, 8 * 4 * 64)}
    assert {name: (volume.count, volume.payload_bytes) for name, volume in found.items()} == expected


def test_volumes_count_what_rings_send():
    """One stage of four shards: a sum sends 2 * 3 / 4 of its payload, a gather of 8 rows of pairs 3 times."""
    programs, shapes = abstract_programs("llama", (1, 4))
    shape = shapes.shape(num_decode=4, num_prefill=0, num_logits=0)
    found = {volume.name: volume for volume in programs.volumes(shape, SamplerVariant.CANDIDATES)}
    assert found["sum_over_tensor"].sent_bytes == 10 * 4 * 64 * 4 * 2 * 3 // 4
    assert found["gather_candidates"].sent_bytes == 3 * 8 * 2 * min(NUM_CANDIDATES, 76) * 4
    assert found["gather_candidates"].num_devices == 4


COLLECTIVE = re.compile(r"= (.*) (all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter)(-start)?\(")


def extents(text: str) -> list[list[int]]:
    """Dimensions of everything that a compiled program's collectives return."""
    shapes = [shape for match in COLLECTIVE.finditer(text) for shape in re.findall(r"\w\d+\[([\d,]*)\]", match[1])]
    return [[int(extent) for extent in shape.split(",") if extent] for shape in shapes]


@pytest.mark.parametrize("layout", [(2, 4), pytest.param((1, 2), marks=pytest.mark.matrix)], ids=layout_name)
def test_compiled_programs_never_send_a_row_of_logits(layout):
    """A slice of the vocabulary is far larger than anything that travels."""
    stages, shards = layout
    wrapper = make_random_wrapper(
        {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 16384, "head_dim": 4, "num_attention_heads": 4},
        pipeline_parallel_size=stages,
        tensor_parallel_size=shards,
        max_num_seqs=2 * stages,
        max_model_len=32,
        num_kv_pages=8,
        max_num_batched_tokens=16,
    )
    shape = wrapper.shapes.shape(num_decode=2, num_prefill=1, num_logits=0)
    widest = 2 * NUM_CANDIDATES * stages * shards  # values and ids of every slice
    assert widest < 16384 // (stages * shards)
    wanted = [("forward", shape)] + [("sample", shape.num_logits, variant, True) for variant in SamplerVariant]
    for entry in wanted:
        found = extents(wrapper.compiled(*entry).as_text())
        assert found, entry
        assert max(prod(dims) // max(dims[0], 1) for dims in found if dims) <= widest, entry
    wrapper.close()


@pytest.mark.matrix  # on one device CI compiles all programs, too (tests/api/test_generate.py)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_after_warm_up_nothing_compiles_and_pages_stay_in_place(layout):
    with on_mesh("llama", layout, max_num_seqs=layout[0], num_kv_pages=2000) as llm:
        llm.warmup()
        before = llm.stats().num_compilations
        run(llm, "llama")
        run(llm, "llama")
        assert llm.stats().num_compilations == before
        wrapper = llm._loaded.wrapper
        pages = wrapper.caches[0].keys
        local = NamedSharding(pages.sharding.mesh, KV_PAGES).shard_shape(pages.shape)
        pool = "f32[" + ",".join(map(str, local)) + "]"
        for shape in wrapper.shapes.all_shapes():
            compiled = wrapper.compiled("forward", shape)
            memory = compiled.memory_analysis()
            assert memory.alias_size_in_bytes >= 2 * len(wrapper.caches) * np.prod(local) * 4, shape
            assert memory.temp_size_in_bytes < np.prod(local) * 4, shape
            assert not re.search(re.escape(pool) + r"\S* copy\(", compiled.as_text()), shape


def test_score_program_holds_few_rows_of_logits_at_a_time():
    """4096 tokens of a vocabulary of 16384 would be 256 MiB of logits."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 16384}
    wrapper = make_random_wrapper(sizes, max_num_seqs=2, num_kv_pages=8)
    plan = wrapper.compiled("score", 4096, 20).memory_analysis()
    assert plan.temp_size_in_bytes < 8 * SCORE_BLOCK * 16384 * 4 < 4096 * 16384 * 4
    wrapper.close()
