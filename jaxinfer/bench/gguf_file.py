"""Writing a Llama as a GGUF file, so that llama.cpp can load the same weights.

Owns: the file's metadata and the order in which llama.cpp expects the rows of queries and keys.
Does not know: llama.cpp, where the tensors come from. The package gguf is imported only when a file is written.

Source: llama.cpp's convert_hf_to_gguf.py (LlamaModel). Deliberately without a tokenizer, as benchmarks pass token ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxinfer.bench.random_weights import RandomStore
from jaxinfer.checkpoint.store import TensorStore
from jaxinfer.config.model_config import ModelConfig

_ARCHITECTURE = "LlamaForCausalLM"
_ROPE = "default"
_BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""


def write_gguf(store: TensorStore, config: ModelConfig, file: Path, *, quantization: str | None = None) -> None:
    """Writes a Llama's weights and numbers; memory holds all tensors while the file is written.

    Args:
      store: the tensors, named as in Hugging Face checkpoints.
      config: the model's numbers.
      file: the file to write.
      quantization: "int8" writes matrices as Q8_0, with a scale for 32 weights in a row; None writes float32.

    Raises:
      ImportError: gguf is not installed.
      ValueError: the model is no Llama, its rotary embedding is an extended one, GGUF lacks one of its tensors, or a
        matrix to be rounded has no whole blocks.
    """
    import gguf

    rope = config.rope
    if config.architecture != _ARCHITECTURE or rope is None or rope.kind != _ROPE:
        found = f"{config.architecture} with {rope.kind if rope else 'no'} rope"
        raise ValueError(f"only {_ARCHITECTURE} with {_ROPE} rope is written as GGUF, got {found}")
    writer = gguf.GGUFWriter(file, "llama")
    is_quantized = quantization is not None
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if is_quantized else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(rope.rotated_dims(config.head_dim))
    writer.add_rope_freq_base(rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    num_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name in RandomStore(config).names():  # those that the config implies; a checkpoint may hold more
        tensor = np.empty(store.shape(name), np.float32)
        store.read(name, tuple(slice(0, size) for size in tensor.shape), tensor)
        module = name.split(".")[-2]
        rows = interleaved_halves(tensor, num_heads[module]) if module in num_heads else tensor
        saved_name = names.get_name(name, (".weight", ".bias"))
        if saved_name is None:
            raise ValueError(f"GGUF has no name for the tensor {name}")
        if is_quantized and rows.ndim == 2:
            if rows.shape[1] % _BLOCK:
                raise ValueError(f"llama.cpp rounds blocks of {_BLOCK} inputs, got {list(rows.shape)} in {name}")
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(saved_name, gguf.quants.quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(saved_name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of a projection to queries or keys in llama.cpp's order.

    Rotary embeddings turn pairs of a head's dimensions. In Hugging Face's order, pair i is dimension i of the first
    half and dimension i of the second half; llama.cpp has the two next to each other.

    Args:
      rows: weights [N * H, D] or biases [N * H].
      num_heads: N.

    Example:
      >>> interleaved_halves(np.arange(8), 2).tolist()
      [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])  # [N, 2, H / 2, ...]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
