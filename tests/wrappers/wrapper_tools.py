"""Builds wrappers from golden checkpoints and steps by hand."""

from pathlib import Path

import jax
import numpy as np

from jaxinfer.checkpoint import directory
from jaxinfer.checkpoint.store import MemoryStore, SafetensorsStore
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.models.registry import parse_model_config
from jaxinfer.wrappers.assembly import assemble
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.step_batch import SamplerVariant, StepBatch, pack_sampling
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, pages_for

GREEDY = pack_sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


class FakeProgram(jax.stages.Compiled):
    """A compiled program that calls a function."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)


def make_wrapper(path: Path, **fields) -> DecoderWrapper:
    fields = {"max_num_seqs": 2, "page_size": 8, "num_kv_pages": 40, "max_num_batched_tokens": 128} | fields
    model_config = parse_model_config(directory.read_json(path / "config.json"))
    store = SafetensorsStore(directory.weight_files(path))
    return assemble(model_config, store, EngineConfig(**fields), progress=False)


def make_random_wrapper(sizes: dict, **fields) -> DecoderWrapper:
    """A Llama with random weights, two layers, four heads and two kv heads unless sizes say otherwise."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    } | sizes
    width, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
            f"{prefix}self_attn.q_proj.weight": (q_size, width),
            f"{prefix}self_attn.k_proj.weight": (kv_size, width),
            f"{prefix}self_attn.v_proj.weight": (kv_size, width),
            f"{prefix}self_attn.o_proj.weight": (width, q_size),
            f"{prefix}mlp.gate_proj.weight": (ffn, width),
            f"{prefix}mlp.up_proj.weight": (ffn, width),
            f"{prefix}mlp.down_proj.weight": (width, ffn),
        }
    random = np.random.default_rng(0)
    tensors = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    fields = {"page_size": 8} | fields
    return assemble(parse_model_config(config), MemoryStore(tensors), EngineConfig(**fields), progress=False)


def prefill_step(
    wrapper: DecoderWrapper, tokens, *, slot=0, start=0, pages=None, logit_index=None, page_copies=(), num_top=None
) -> StepBatch:
    """One chunk of one slot; pages default to 1, 2, .. and the logit rows to the last token."""
    shapes = wrapper.shapes
    index = [len(tokens) - 1] if logit_index is None else list(logit_index)
    starts = np.arange(0, len(tokens), PREFILL_BLOCK)
    shape = shapes.shape(num_decode=0, num_prefill=len(starts), num_logits=len(index))
    rows = shape.num_prefill
    blocks = np.zeros((rows, PREFILL_BLOCK), np.int32)
    blocks.ravel()[: len(tokens)] = tokens
    table = np.zeros((1, shapes.table_width), np.int32)
    pages = range(1, 1 + pages_for(start + len(tokens), 8)) if pages is None else pages
    table[0, : len(pages)] = pages
    return StepBatch(
        shape=shape,
        dump_slot=shapes.num_slots,
        decode_slots=np.zeros(0, np.int32),
        decode_page_index=np.zeros(0, np.int32),
        decode_page_id=np.zeros(0, np.int32),
        chunk_slots=np.array([slot], np.int32),
        chunk_pages=table,
        chunk_sampling=GREEDY[None],
        prefill_slots=_padded([slot] * len(starts), rows, shapes.num_slots),
        prefill_start=_padded(start + starts, rows, 0),
        prefill_len=_padded(np.minimum(PREFILL_BLOCK, len(tokens) - starts), rows, 0),
        prefill_tokens=blocks,
        logit_index=_padded(shapes.max_decode + np.array(index), shape.num_logits, 0),
        logit_slots=_padded([slot] * len(index), shape.num_logits, shapes.num_slots),
        logit_feeds=np.arange(shape.num_logits) == len(index) - 1,
        page_copies=np.array(page_copies, np.int32).reshape(-1, 2),
        variant=SamplerVariant.GREEDY,
        num_top=num_top,
    )


def decode_step(wrapper: DecoderWrapper, slots, *, new_pages=None) -> StepBatch:
    """One token of each slot; new_pages maps a slot to (index, page)."""
    shapes = wrapper.shapes
    shape = shapes.shape(num_decode=len(slots), num_prefill=0, num_logits=0)
    rows = shape.num_decode
    entries = [(new_pages or {}).get(slot, (shapes.table_width, 0)) for slot in slots]
    return StepBatch(
        shape=shape,
        dump_slot=shapes.num_slots,
        decode_slots=_padded(slots, rows, shapes.num_slots),
        decode_page_index=_padded([index for index, _ in entries], rows, shapes.table_width),
        decode_page_id=_padded([page for _, page in entries], rows, 0),
        chunk_slots=np.zeros(0, np.int32),
        chunk_pages=np.zeros((0, shapes.table_width), np.int32),
        chunk_sampling=np.zeros((0, GREEDY.size), np.int32),
        prefill_slots=np.zeros(0, np.int32),
        prefill_start=np.zeros(0, np.int32),
        prefill_len=np.zeros(0, np.int32),
        prefill_tokens=np.zeros((0, PREFILL_BLOCK), np.int32),
        logit_index=np.arange(rows, dtype=np.int32),
        logit_slots=_padded(slots, rows, shapes.num_slots),
        logit_feeds=np.arange(rows) < len(slots),
        page_copies=np.zeros((0, 2), np.int32),
        variant=SamplerVariant.GREEDY,
    )


def _padded(values, size, fill) -> np.ndarray:
    return np.array([*values, *[fill] * (size - len(values))], np.int32)
