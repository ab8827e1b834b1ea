"""llama.cpp as a peer: the order of rows by arithmetic; the file and the tokens where its packages are installed."""

import dataclasses

import numpy as np
import pytest
from conftest import load_golden

from jaxinfer.bench.gguf_file import interleaved_halves, write_gguf
from jaxinfer.bench.llama_cpp_peer import LlamaCppPeer
from jaxinfer.bench.random_weights import RandomStore
from jaxinfer.bench.workload import random_prompts
from jaxinfer.checkpoint.directory import read_json, weight_files
from jaxinfer.checkpoint.store import SafetensorsStore
from jaxinfer.models.registry import parse_model_config


def rotated(x, angles, *, neighbours):
    """A head's dimensions [H], turned in pairs by angles [H / 2]."""
    first, second = (x[0::2], x[1::2]) if neighbours else (x[: len(x) // 2], x[len(x) // 2 :])
    turned = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
    return np.stack(turned, axis=1).reshape(-1) if neighbours else np.concatenate(turned)


def test_interleaved_halves_rotating_neighbours_gives_the_same_scores():
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(2, 2 * 6, 5))  # [N * H, D] with N = 2, H = 6
    x, angles = rng.normal(size=5), rng.normal(size=(2, 3))
    for head in range(2):
        rows = slice(6 * head, 6 * head + 6)
        expected = rotated(queries[rows] @ x, angles[0], neighbours=False) @ rotated(
            keys[rows] @ x, angles[1], neighbours=False
        )
        found = rotated(interleaved_halves(queries, 2)[rows] @ x, angles[0], neighbours=True) @ rotated(
            interleaved_halves(keys, 2)[rows] @ x, angles[1], neighbours=True
        )
        assert found == pytest.approx(expected)


def test_write_gguf_holds_every_tensor_of_the_checkpoint(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = load_golden("gqa").path
    config, store = parse_model_config(read_json(path / "config.json")), SafetensorsStore(weight_files(path))
    write_gguf(store, config, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(list(RandomStore(config).names()))
    for name, saved, heads in (
        ("model.embed_tokens.weight", "token_embd.weight", None),
        ("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight", config.num_heads),
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight", config.num_kv_heads),
        ("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight", None),
    ):
        expected = np.empty(store.shape(name), np.float32)
        store.read(name, tuple(slice(0, size) for size in expected.shape), expected)
        np.testing.assert_array_equal(tensors[saved], interleaved_halves(expected, heads) if heads else expected)


def test_write_gguf_int8_rounds_blocks_of_32_and_keeps_norms(tmp_path):
    gguf = pytest.importorskip("gguf")
    small = parse_model_config(read_json(load_golden("gqa").path / "config.json"))
    with pytest.raises(ValueError, match=r"blocks of 32 inputs, got \[\d+, 48\] in model"):
        write_gguf(RandomStore(small), small, tmp_path / "small.gguf", quantization="int8")
    config = dataclasses.replace(small, hidden_size=64, ffn_size=96, num_heads=4, head_dim=16)
    store, file = RandomStore(config), tmp_path / "model.gguf"
    write_gguf(store, config, file, quantization="int8")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    norm, down = tensors["blk.0.attn_norm.weight"], tensors["blk.0.ffn_down.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32 and down.tensor_type == gguf.GGMLQuantizationType.Q8_0
    expected = np.empty((64, 96), np.float32)
    store.read("model.layers.0.mlp.down_proj.weight", (slice(0, 64), slice(0, 96)), expected)
    steps = np.repeat(np.abs(expected.reshape(64, 3, 32)).max(-1), 32, axis=1) / 127
    assert (np.abs(gguf.quants.dequantize(down.data, down.tensor_type) - expected) <= 0.6 * steps).all()


@pytest.mark.parametrize("case", ["gpt2", "rope_llama3"])
def test_write_gguf_other_model_is_refused(case, tmp_path):
    pytest.importorskip("gguf")
    config = parse_model_config(read_json(load_golden(case).path / "config.json"))
    with pytest.raises(ValueError, match="only LlamaForCausalLM with default rope is written as GGUF, got"):
        write_gguf(RandomStore(config), config, tmp_path / "model.gguf")


def test_llama_cpp_tokens_do_not_depend_on_the_number_of_slots():
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    peer = LlamaCppPeer(load_golden("gqa").path, dtype="float32", platform="cpu")
    prompts = random_prompts([12, 3, 20, 7], vocab_size=320, seed=(0,))
    alone = [peer.generate([prompt], 6)[0] for prompt in prompts]
    assert peer.generate(prompts, 6) == peer.serve(prompts, 6, max_num_seqs=2) == alone
    lengths = [1, 6, 2, 4]
    expected = [tokens[:length] for tokens, length in zip(alone, lengths, strict=True)]
    assert peer.serve_mixed(prompts, lengths, max_num_seqs=2) == expected
    with pytest.raises(ValueError, match="runs in float32 on a cpu, got bfloat16 on cpu; set dtype"):
        LlamaCppPeer(load_golden("gqa").path, dtype="bfloat16", platform="cpu")
