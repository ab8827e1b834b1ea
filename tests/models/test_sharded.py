"""Two tensor shards: families whose storage or norms cut across heads give transformers' logits there as well."""

from __future__ import annotations

from conftest import GOLDEN
from processes import run_python

SCRIPT = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
from checkpoint.loading_tools import load
from flax import nnx
from jax.sharding import PartitionSpec
from jaxinfer.checkpoint.directory import read_json
from jaxinfer.communication.mesh import make_mesh
from jaxinfer.layers.attention import Segment, TokenBatch
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import find_family, parse_model_config

num_shards = 2
for path in map(Path, sys.argv[1:]):
    config = parse_model_config(read_json(path / "config.json"))
    layout = Layout(
        num_stages=1, num_shards=num_shards, dtype=jnp.dtype("float32"), max_model_len=64, attention_backend="reference"
    )
    model = nnx.eval_shape(lambda: find_family(config.architecture).build(config, layout))
    graph, abstract = nnx.split(model)
    loaded = dict(nnx.to_flat_state(load(path, num_shards=num_shards).parameters))
    variables = [loaded[place] for place, _ in nnx.to_flat_state(abstract)]
    expected = dict(np.load(path / "expected.npz"))
    prompt = jnp.asarray(expected["prompt_2"])
    length = len(prompt)

    def logits(leaves):
        model = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(abstract), leaves))
        positions, full = jnp.arange(length), jnp.array([length])
        segment = Segment(jnp.array([[1]]), full, full, num_queries=length)
        batch = TokenBatch(positions, jnp.ones(length, jnp.int32), positions, (segment,))
        zeros = jnp.zeros((2, config.num_kv_heads // num_shards, length, config.head_dim))
        caches = [LayerCache(keys=zeros, values=zeros) for _ in model.layers]
        x, _ = model.run_layers(model.embed(prompt, positions), caches, batch)
        return model.head.logits(model.final_norm(x))

    run = jax.shard_map(
        logits,
        mesh=make_mesh(tensor_parallel_size=num_shards),
        in_specs=([variable.spec for variable in variables],),
        out_specs=PartitionSpec(None, ("pipe", "tensor")),
        check_vma=False,
    )
    found = np.asarray(jax.jit(run)([variable[...] for variable in variables]))[expected["positions_2"]]
    print(path.name, np.abs(found - expected["logits_2"]).max())
"""


def test_logits_two_tensor_shards_equal_transformers() -> None:
    cases = ["olmo2", "phi3", "gpt2"]
    paths = [GOLDEN / case for case in cases]
    printed = run_python(SCRIPT, *paths, XLA_FLAGS="--xla_force_host_platform_device_count=2").split()
    assert printed[::2] == cases
    assert all(float(error) < 2e-4 for error in printed[1::2]), printed
