"""Loaded parameters are the checkpoint's tensors, on any mesh, each byte read once, within the host's memory bound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint.loading_tools import assert_same_tensors, checkpoint_tensors, load, num_bytes
from conftest import GOLDEN
from processes import run_python
from safetensors.numpy import save_file

from jaxinfer.models import llama
from jaxinfer.models.registry import find_family, parse_model_config


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray], source: str = "gqa", **config: object) -> Path:
    """A checkpoint with these tensors and the config.json of a golden one, some fields changed."""
    fields = json.loads((GOLDEN / source / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_load_golden_equals_checkpoint(golden) -> None:
    loaded, expected = load(golden.path), checkpoint_tensors(golden.path)
    assert_same_tensors(loaded.tensors, expected)
    assert loaded.store.bytes_read == num_bytes(expected)


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float64", "float16", "bf16", "gqa"])
def test_load_other_dtype_casts(source: str, target: str, tmp_path: Path) -> None:
    path = GOLDEN / source
    if not path.exists():
        tensors = {name: values.astype(source) for name, values in checkpoint_tensors(GOLDEN / "gqa").items()}
        path = write_checkpoint(tmp_path, tensors)
    loaded, expected = load(path, dtype=target), checkpoint_tensors(path)
    assert all(values.dtype == target for values in loaded.tensors.values())
    assert_same_tensors(loaded.tensors, expected)
    assert loaded.store.bytes_read == num_bytes(expected)


def test_load_value_beyond_dtype_names_tensor(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(GOLDEN / "gqa")
    tensors["model.norm.weight"] *= 1e6
    path = write_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"tensor model.norm.weight in .* holds values beyond float16"):
        load(path, dtype="float16")


MESHES = """
import sys
from pathlib import Path
from checkpoint.loading_tools import assert_same_tensors, checkpoint_tensors, load, num_bytes
for word in sys.argv[2:]:
    case, num_stages, num_shards = word.split(",")
    path = Path(sys.argv[1]) / case
    expected = checkpoint_tensors(path)
    for inputs_first in (False, True):
        loaded = load(path, num_stages=int(num_stages), num_shards=int(num_shards), inputs_first=inputs_first)
        assert_same_tensors(loaded.tensors, expected)
        assert loaded.store.bytes_read == num_bytes(expected), word  # each byte once, although norms have replicas
    print(word)
"""


def test_load_any_mesh_unfuses_to_checkpoint() -> None:
    # tied has 3 layers (uneven over 2 stages, a whole stage of padding over 4), 256 tokens are uneven over 3 devices.
    # phi3's products are fused in the file, gpt2's besides transposed.
    words = ["tied,2,2", "tied,4,2", "tied,3,1", "tied,2,4", "mha,2,4", "mha,1,8", "biases,1,2", "sharded,2,1"]
    # Where shards outnumber kv heads, several hold the same ones; experts are spread whole.
    words += ["phi3,1,2", "olmo2,2,2", "gpt2,2,2", "gpt2,1,4", "mesh/llama,2,4", "mesh/llama,1,8"]
    words += ["mesh/mixtral,2,4", "mesh/mixtral,4,2"]
    flags = "--xla_force_host_platform_device_count=8"
    assert run_python(MESHES, GOLDEN, *words, XLA_FLAGS=flags).split() == words


MEMORY = """
import json, sys
from pathlib import Path
import jax
from checkpoint import loading_tools
from flax import nnx

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

# The measured part is load_parameters alone, after the file is mapped and XLA's threads have started.
num_stages, num_shards = int(sys.argv[3]), int(sys.argv[4])
options = {"num_stages": num_stages, "num_shards": num_shards, "inputs_first": True}
loading_tools.load(Path(sys.argv[2]), **options)
growth, kept = {}, []
original = loading_tools.load_parameters
def measured(*args, **keywords):
    before = status("VmSize")
    state = original(*args, **keywords)
    kept.append(state)  # freed weights would be reused by the next load, whose growth would then be too small
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    growth[dtype] = {"weights": weights, "growth": status("VmPeak") - before}
    raise StopIteration
loading_tools.load_parameters = measured
for dtype in ("bfloat16", "float32"):  # VmPeak never falls: the smaller first
    try:
        loading_tools.load(Path(sys.argv[1]), dtype=dtype, **options)
    except StopIteration:
        pass
print(json.dumps(growth))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("mesh", [pytest.param((1, 1), marks=pytest.mark.matrix), (2, 4)], ids=["one device", "2x4"])
def test_load_parameters_peak_memory_is_weights_and_two_tensors(tmp_path: Path, mesh: tuple[int, int]) -> None:
    # VmPeak is the kernel's own peak of the address space, so no sample can miss it. Every anonymous page has an
    # address, so it bounds the memory from above; pages of the mapped file, which the kernel may drop at any time and
    # which would blur a resident-set figure, are in the baseline already. One malloc arena, since each reserves 64 MB.
    # Python's objects take malloc's heap, which never shrinks: what is left of compiling the modules could otherwise be
    # given back during the load. Tensors are mapped apart from it, so that they never reuse what is free in it.
    hidden, ffn, vocab, layers = 512, 2048, 8192, 14
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {prefix + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    tensors = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    path = write_checkpoint(
        tmp_path,
        tensors,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    largest = max(values.nbytes for values in tensors.values())
    heap = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    printed = run_python(MEMORY, path, GOLDEN / "mha", *mesh, PYTHONMALLOC="malloc", **heap)
    (path / "model.safetensors").unlink()
    growth = json.loads(printed)
    assert growth["float32"]["weights"] == 2 * growth["bfloat16"]["weights"] == num_bytes(tensors) > 10 * largest
    for entry in growth.values():
        assert entry["weights"] <= entry["growth"] <= entry["weights"] + 2 * largest


def swap(tensors: dict[str, np.ndarray], first: str, second: str) -> None:
    tensors[first], tensors[second] = tensors[second], tensors[first]


Q, K = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")
EDITS = {
    "missing": (lambda tensors: tensors.pop(Q), rf"checkpoint lacks tensor {Q}$"),
    "missing_two": (lambda tensors: (tensors.pop(Q), tensors.pop(K)), rf"lacks tensor {K} \(and 1 more\)"),
    "missing_head": (lambda tensors: tensors.pop("lm_head.weight"), r"lacks tensor lm_head.weight"),
    "unexpected": (
        lambda tensors: tensors.update({"model.extra.weight": np.zeros(3, np.float32)}),
        r"unexpected tensor model.extra.weight in .*model.safetensors",
    ),
    "layer_too_many": (
        lambda tensors: tensors.update({Q.replace(".1.", ".2."): tensors[Q].copy()}),
        r"unexpected tensor model.layers.2.self_attn.q_proj.weight in",
    ),
    "unexpected_bias": (
        lambda tensors: tensors.update({Q.replace("weight", "bias"): np.zeros(48, np.float32)}),
        r"unexpected tensor model.layers.1.self_attn.q_proj.bias",
    ),
    "swapped": (lambda tensors: swap(tensors, Q, K), rf"tensor {Q} in .* has shape \(24, 48\), expected \(48, 48\)"),
    "transposed": (
        lambda tensors: tensors.update({K: tensors[K].T.copy()}),
        rf"tensor {K} in .*model.safetensors has shape \(48, 24\), expected \(24, 48\)",
    ),
    "flat": (lambda tensors: tensors.update({K: tensors[K].ravel()}), rf"tensor {K} in .* has shape \(1152,\)"),
    "scalar": (lambda tensors: tensors.update({K: np.zeros((), np.float32)}), rf"tensor {K} in .* has shape \(\)"),
    "short_vocabulary": (
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:-1].copy()}),
        r"tensor lm_head.weight in .* has shape \(319, 48\), expected \(320, 48\)",
    ),
    "integers": (
        lambda tensors: tensors.update({K: tensors[K].astype(np.int8)}),
        rf"tensor {K} in .*model.safetensors is I8; supported: F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_load_wrong_tensors_names_tensor(edit: str, tmp_path: Path) -> None:
    change, message = EDITS[edit]
    tensors = checkpoint_tensors(GOLDEN / "gqa")
    change(tensors)
    path = write_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_load_known_superfluous_tensors_are_ignored(tmp_path: Path) -> None:
    expected = checkpoint_tensors(GOLDEN / "tied")
    superfluous = {
        "lm_head.weight": expected["model.embed_tokens.weight"].copy(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32),
    }
    loaded = load(write_checkpoint(tmp_path, expected | superfluous, "tied"))
    assert_same_tensors(loaded.tensors, expected)
    assert loaded.store.bytes_read == num_bytes(expected)


def test_load_file_of_index_truncated_names_file(tmp_path: Path) -> None:
    path = shutil.copytree(GOLDEN / "sharded", tmp_path / "sharded")
    last = sorted(path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{last} is not a complete safetensors file"):
        load(path)


def test_tensor_names_every_parameter_is_named_once() -> None:
    config = parse_model_config(json.loads((GOLDEN / "biases" / "config.json").read_text()))
    assert find_family(config.architecture) is llama.FAMILY
    names = [name for names in llama.FAMILY.tensor_names.values() for name in names]
    assert len(names) == len(set(names))


def test_load_gpt2_without_prefix_and_with_its_masks(tmp_path: Path) -> None:
    """As the first checkpoints of GPT-2 are stored."""
    expected = checkpoint_tensors(GOLDEN / "gpt2")
    tensors = {name.removeprefix("transformer."): values for name, values in expected.items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.1.attn.masked_bias": np.zeros(1, np.float32)}
    loaded = load(write_checkpoint(tmp_path, tensors | masks, source="gpt2"))
    assert_same_tensors(loaded.tensors, expected)
    path = write_checkpoint(tmp_path, tensors | {"h.0.attn.other": masks["h.0.attn.bias"]}, source="gpt2")
    with pytest.raises(ValueError, match=r"unexpected tensor h\.0\.attn\.other"):
        load(path)


def test_load_gpt2_untransposed_weight_names_both_shapes(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(GOLDEN / "gpt2")
    name = "transformer.h.1.attn.c_attn.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(ValueError, match=rf"{name} in .* has shape \(144, 48\), expected \(48, 144\)"):
        load(write_checkpoint(tmp_path, tensors, source="gpt2"))
