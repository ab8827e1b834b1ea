"""Makes the golden files beside it: tiny random checkpoints with the answers of transformers, and tokenizers.

It and make_sites.py alone need torch and transformers. Run `python tests/golden/make.py` to make all of it, or
name some cases: `python tests/golden/make.py gqa tied`. Everything follows from the table CASES and fixed seeds: a
second run writes the same bytes (on one machine and one torch version).

A case keeps, in expected.npz, for i = 0, 1, 2:
  prompt_i     int32[len]      prompt ids; lengths 5, 23, 40
  positions_i  int32[n]        prompt positions whose logits are kept: at most 16, evenly spaced, the last one included
  logits_i     float32[n, V]   logits of one forward pass over the prompt, at positions_i
  greedy_i     int32[24]       generate(do_sample=False) with no end token
  logprobs_i   float32[24]     log_softmax of each step at the token it chose
  margin_i     float32[]       smallest gap between the two best logits over the 24 steps; over 1e-4, else the seed is
  passed over
and, in rope_dynamic, long_prompt, long_positions, long_logits for a prompt longer than max_position_embeddings.

`chat` keeps, in chat/renders.json, what apply_chat_template makes of the templates beside that file (written here, in
the shapes of well-known ones) and CONVERSATIONS: special_tokens, now, conversations, and renders, each with template,
conversation (its number), and text and, for mistral.jinja, ids (the tokenizer is gqa's); or error, the template's own
message.

`beam` keeps, in beam/cases.json, what generate(num_beams=.., do_sample=False) makes of the table BEAM_CASES with the
checkpoints beside it: for each case checkpoint, prompt, beam_width, max_tokens, length_penalty, early_stopping,
num_return_sequences and eos (end token ids, none or several), and sequences (the generated ids of each returned text,
best first, its end token included, padding stripped) with their scores (sequences_scores). A seed is passed over where
noise of 1e-4 in the log-probabilities changes a sequence, where another early_stopping that the case names gives the
same sequences, or, where it names none, all sequences are equally long although there are end tokens.
"""

from __future__ import annotations

import datetime
import json
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
PROMPT_LENS = (5, 23, 40)
NUM_NEW_TOKENS = 24
MAX_KEPT_POSITIONS = 16
MIN_MARGIN = 1e-4
MIN_DISTINCT = 8
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
METASPACE = "\u2581"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint: what differs from BASE, how it is stored, what else is kept."""

    config: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    base: Mapping[str, Any] = field(default_factory=lambda: BASE)
    bfloat16: bool = False
    max_shard_size: str = "10MB"
    long_prompt_len: int = 0
    tokenizer: bool = False


BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


MESH = {"vocab_size": 301, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8}


def rope(kind: str, **fields: float) -> dict[str, Any]:
    """A rope_parameters field with a base low enough that every frequency turns within a prompt."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **fields}}


def longrope(original: int, **fields: float) -> dict[str, Any]:
    """Phi-3's rotary settings for heads of which 12 dimensions are rotated: six factors."""
    short, long = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
    settings = rope("longrope", short_factor=short, long_factor=long, **fields)
    settings["rope_parameters"]["original_max_position_embeddings"] = original
    return settings | {"original_max_position_embeddings": original, "pad_token_id": None, **fields}


CASES: dict[str, Case] = {
    "gqa": Case(
        config={"vocab_size": 320, "intermediate_size": 40, "bos_token_id": 0, "eos_token_id": 1}, tokenizer=True
    ),
    "mha": Case(config={"num_key_value_heads": 4}),
    "tied": Case(config={"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "biases": Case(config={"attention_bias": True, "mlp_bias": True}),
    "head_dim": Case(config={"head_dim": 20, "tie_word_embeddings": True}),
    "rope_linear": Case(config=rope("linear", factor=4.0)),
    "rope_dynamic": Case(config={"max_position_embeddings": 64} | rope("dynamic", factor=4.0), long_prompt_len=100),
    "rope_llama3": Case(
        config=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        )
    ),
    "rope_yarn": Case(
        config=rope("yarn", factor=8.0, beta_fast=4.0, beta_slow=1.0, original_max_position_embeddings=32)
    ),
    "sharded": Case(max_shard_size="120KB"),
    "bf16": Case(bfloat16=True),
    "mistral": Case(family="mistral", config={"sliding_window": 12}),
    "mistral_full": Case(
        family="mistral", config={"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True}
    ),
    "qwen2": Case(
        family="qwen2",
        config={
            "num_hidden_layers": 3,
            "intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 1,
        },
    ),
    "gemma2": Case(
        family="gemma2",
        config={
            "num_hidden_layers": 3,
            "intermediate_size": 32,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 0.3,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": Case(
        family="gemma3_text",
        config={
            "num_hidden_layers": 3,
            "intermediate_size": 32,
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "qwen3": Case(family="qwen3", config={"head_dim": 16}),
    "phi3": Case(family="phi3", config=longrope(original=256) | {"sliding_window": 12}),
    "phi3_long": Case(
        family="phi3",
        config=longrope(original=4, partial_rotary_factor=0.75) | {"hidden_size": 64, "tie_word_embeddings": True},
    ),
    "olmo2": Case(family="olmo2"),
    "gpt2": Case(
        family="gpt2",
        base={},
        config={
            "vocab_size": 256,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "n_inner": 64,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "mixtral": Case(
        family="mixtral",
        config={"intermediate_size": 16, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 12},
    ),
    "qwen3_moe": Case(
        family="qwen3_moe",
        config={
            "num_hidden_layers": 3,
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
    ),
    # For meshes of up to 4 stages and 8 shards: uneven layers, a vocabulary and kv heads that do not divide.
    "mesh/llama": Case(config=MESH),
    "mesh/qwen3": Case(
        family="qwen3", config=MESH | {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 16}
    ),
    "mesh/gemma3": Case(
        family="gemma3_text",
        config=MESH
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": 10,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "mesh/gpt2": Case(
        family="gpt2",
        base={},
        config={
            "vocab_size": 301,
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 8,
            "n_positions": 256,
            "n_inner": 64,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "mesh/mixtral": Case(
        family="mixtral",
        config=MESH
        | {"num_hidden_layers": 4, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}


def make_model(case: Case, seed: int) -> PreTrainedModel:
    """A float32 model with weights drawn in name order; rounded to bfloat16 values where the case is stored so."""
    config = AutoConfig.for_model(case.family, **(case.base | case.config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(draw(rng, name, tuple(parameter.shape), config.tie_word_embeddings))
            if case.family.startswith("gemma") and "norm" in name:
                values -= 1  # Gemma adds it again
            if case.family.startswith("gemma") and "embed" in name:
                values *= 0.1  # Gemma multiplies embeddings by the root of the width
            parameter.copy_(values.bfloat16().float() if case.bfloat16 else values)
    return model


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], tied: bool) -> np.ndarray:
    """One weight: large enough that the greedy output wanders, norms around one, biases not zero."""
    normal = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("bias"):
        return 0.3 * normal
    if "norm" in name or "ln_" in name:
        return 1 + 0.2 * normal
    if "wpe" in name:
        return 0.3 * normal
    if (
        "embed_tokens" in name or "wte" in name
    ):  # a tied head would repeat its input if the embedding outweighed the layers
        return (0.3 if tied else 1.0) * normal
    num_inputs = shape[0] if "c_" in name else shape[-1]  # GPT-2 stores [in, out]
    return 1.5 / np.sqrt(np.float32(num_inputs)) * normal


def forward(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Logits float32[len, V] of one forward pass without a cache."""
    with torch.no_grad():
        return model(torch.tensor(ids[None], dtype=torch.long), use_cache=False).logits[0].numpy()


def greedy(model: PreTrainedModel, prompt: np.ndarray) -> np.ndarray:
    """int32[24]: what transformers generates with no end token."""
    ids = torch.tensor(prompt[None], dtype=torch.long)
    mask = torch.ones_like(ids)
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = eos
    return output[0, len(prompt) :].numpy().astype(np.int32)


def kept_logits(model: PreTrainedModel, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions int32[n], logits float32[n, V]) of a forward pass over the prompt."""
    num_kept = min(len(prompt), MAX_KEPT_POSITIONS)
    positions = np.linspace(0, len(prompt) - 1, num_kept).round().astype(np.int32)
    return positions, forward(model, prompt)[positions]


def expected(model: PreTrainedModel, case: Case, seed: int) -> dict[str, np.ndarray] | None:
    """The arrays of expected.npz, or None where this seed's output is too uniform or too close to a tie."""
    rng = np.random.default_rng(1000 + seed)
    vocab_size = model.config.vocab_size
    arrays: dict[str, np.ndarray] = {}
    for i, prompt_len in enumerate(PROMPT_LENS):
        prompt = rng.integers(3, vocab_size, prompt_len).astype(np.int32)
        tokens = greedy(model, prompt)
        steps = forward(model, np.concatenate([prompt, tokens]))[prompt_len - 1 : -1]  # [24, V]
        best = np.sort(steps, axis=-1)[:, -2:]
        margin = (best[:, 1] - best[:, 0]).min()
        if margin <= MIN_MARGIN or len(set(tokens.tolist())) < MIN_DISTINCT or model.config.eos_token_id in tokens:
            return None
        if not np.array_equal(steps.argmax(-1), tokens):
            raise RuntimeError("generate() and a forward pass without cache disagree although no step is near a tie")
        logprobs = torch.log_softmax(torch.from_numpy(steps), -1).numpy()[np.arange(NUM_NEW_TOKENS), tokens]
        positions, logits = kept_logits(model, prompt)
        arrays |= {f"prompt_{i}": prompt, f"positions_{i}": positions, f"logits_{i}": logits}
        arrays |= {f"greedy_{i}": tokens, f"logprobs_{i}": logprobs, f"margin_{i}": margin}
    if case.long_prompt_len:
        arrays["long_prompt"] = rng.integers(3, vocab_size, case.long_prompt_len).astype(np.int32)
        arrays["long_positions"], arrays["long_logits"] = kept_logits(model, arrays["long_prompt"])
    return arrays


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """np.savez with fixed time stamps, so that equal arrays are equal files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def fresh(directory: Path) -> Path:
    """An empty directory in place of whatever was there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def make_case(name: str, case: Case) -> str:
    """Writes one checkpoint with its expected.npz; returns a line that says what came of it."""
    for seed in range(1000):
        model = make_model(case, seed)
        arrays = expected(model, case, seed)
        if arrays is not None:
            break
    else:
        raise RuntimeError(f"{name}: no seed below 1000 gives a diverse output without near-ties")
    directory = fresh(HERE / name)
    if case.bfloat16:
        model = model.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=case.max_shard_size)
    save_npz(directory / "expected.npz", arrays)
    if case.tokenizer:
        byte_level_tokenizer(model.config.vocab_size).save_pretrained(directory)
        write_texts(directory)
    for path in directory.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    num_bytes = sum(path.stat().st_size for path in directory.iterdir())
    margin = min(float(arrays[f"margin_{i}"]) for i in range(len(PROMPT_LENS)))
    return f"{name}: seed {seed}, smallest margin {margin:.1e}, {num_bytes / 1000:.0f} kB"


CORPUS = """In the beginning there was a small river, and beside the river there was a small house. The people of the
house were not many: a baker, a fisher and their three children. In the morning the baker lit the fire; in the evening
the fisher came home from the river. "There is bread," said the baker. "There is fish," said the fisher. And so there
was supper. Café, naïve, façade, déjà vu, über, Straße, ñandú, señor, smörgåsbord. Ça va? Ça va très bien, merci.
你好世界。你好，朋友。日本語の文章です。こんにちは世界。한국어 문장입니다.
🙂 🙂🙂 🚀 to the moon 🚀! 👩‍👩‍👧 family. x = y + 42; print("hello world")
"""
TEXTS = (
    "In the beginning",
    " there was a small house",
    "  two  spaces  inside  ",
    "\n\ttabs and\nlines\n",
    "Café déjà vu",
    "你好，世界 日本語",
    "🙂👩‍👩‍👧🚀 emoji 🦄",
    "unseen: Ω ж ๛ \u00a0 \ufffd",
    "<s>special</s> tokens",
    "",
)


def byte_level_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """GPT-2 / Llama-3 style: bytes as letters, BPE, <s> put in front by the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return with_bos(tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2 style: a space put in front, spaces as U+2581, BPE that falls back to <0xXX> byte tokens."""
    counts = Counter(CORPUS.replace(" ", METASPACE).replace("\n", ""))
    alphabet = sorted(counts, key=lambda letter: (-counts[letter], letter))[:60]  # rarer letters become bytes
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=140, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    trained.train_from_iterator(CORPUS.splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    names = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: token_id for token_id, name in enumerate(names)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    return with_bos(tokenizer, unk_token=UNK)


def with_bos(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    """Adds the post-processor that puts <s> in front and the names that tokenizer_config.json keeps."""
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, **names)


def write_texts(directory: Path) -> None:
    """texts.json: what transformers, loading the directory afresh, makes of TEXTS and of two awkward id sequences."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    cut_off = tokenizer.encode("a 日本")[:-1]
    odd = [1, *range(5, 300, 13), 2, 0, 1]
    encoded = [tokenizer.encode(text) for text in TEXTS]
    record = {
        "transformers": {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "vocab_size": len(tokenizer),
            "all_special_ids": sorted(tokenizer.all_special_ids),
        },
        "encode": [
            {"text": text, "ids": ids, "plain_ids": tokenizer.encode(text, add_special_tokens=False)}
            for text, ids in zip(TEXTS, encoded, strict=True)
        ],
        "decode": [
            {
                "ids": ids,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "text_with_special": tokenizer.decode(ids, skip_special_tokens=False),
            }
            for ids in [*encoded, cut_off, odd]
        ],
    }
    (directory / "texts.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def make_tokenizers() -> str:
    """Writes the tokenizer fixtures that belong to no checkpoint."""
    directory = fresh(HERE / "tokenizers" / "metaspace")
    metaspace_tokenizer().save_pretrained(directory)
    write_texts(directory)
    return f"tokenizers/metaspace: {sum(path.stat().st_size for path in directory.iterdir()) / 1000:.0f} kB"


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Météo d\'une ville: "today" & <tomorrow>',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
USER = {"role": "user", "content": "Is 1 < 2 && 'so' on? He said \"yes\"."}
ASSISTANT = {"role": "assistant", "content": " Yes: <b>naïve</b> 日本語 🙂\n"}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich <ZH>"}}}],
}
PARTS = {"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two & three"}]}
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {"messages": [USER]},
    {"messages": [USER], "add_generation_prompt": False},
    {"messages": [SYSTEM, USER]},
    {"messages": [USER, ASSISTANT, {"role": "user", "content": "\ttabs, </s> and\n\nlines  "}]},
    {"messages": [SYSTEM, USER, ASSISTANT], "add_generation_prompt": False},
    {"messages": [USER, {"role": "assistant", "content": "The answer is"}], **CONTINUED},
    {"messages": [SYSTEM, USER, {"role": "assistant", "content": " ends in spaces  "}], **CONTINUED},
    {"messages": [USER, USER]},
    {"messages": [USER, {"role": "critic", "content": "no"}]},
    {"messages": [SYSTEM, USER], "tools": [WEATHER_TOOL, WEATHER_TOOL]},
    {"messages": [USER], "tools": [WEATHER_TOOL], "chat_template_kwargs": {"tools_in_user_message": False}},
    {"messages": [USER], "tools": []},
    {"messages": [SYSTEM], "tools": [WEATHER_TOOL]},
    {"messages": [USER, CALL, {"role": "tool", "content": "sunny, 20 °C"}], "tools": [WEATHER_TOOL]},
    {
        "messages": [
            USER,
            CALL,
            {"role": "tool", "content": {"sky": "blau", "t": 20.5}},
            {"role": "tool", "content": "b"},
        ]
    },
    {"messages": [PARTS]},
    {"messages": [PARTS, {"role": "assistant", "content": [{"type": "text", "text": "and so"}]}], **CONTINUED},
    {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May 2025"}},
    {"messages": [USER], "chat_template_kwargs": {"bos_token": "<other>"}},
)


def chat_record(tokenizer: PreTrainedTokenizerFast, path: Path, number: int) -> dict[str, Any]:
    """One render of one template, or the message of the exception that it raises."""
    options = {"add_generation_prompt": True} | CONVERSATIONS[number]
    options |= options.pop("chat_template_kwargs", {})
    options |= {"conversation": options.pop("messages"), "chat_template": path.read_text(encoding="utf-8")}
    record: dict[str, Any] = {"template": path.name, "conversation": number}
    try:
        record["text"] = tokenizer.apply_chat_template(tokenize=False, **options)
        if path.stem == "mistral":  # its special tokens are gqa's
            record["ids"] = tokenizer.apply_chat_template(return_dict=False, **options)
    except jinja2.TemplateError as error:
        record["error"] = str(error)
    except (TypeError, ValueError):  # said in transformers' or Python's words
        record["error"] = ""
    return record


def make_chat() -> str:
    """Writes chat/renders.json."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "gqa")
    now = datetime.datetime(2024, 7, 26, 13, 5, 9)
    clock = mock.Mock(wraps=datetime.datetime)
    clock.now.return_value = now
    paths = sorted((HERE / "chat").glob("*.jinja"))
    with mock.patch("transformers.utils.chat_template_utils.datetime", clock):
        records = [chat_record(tokenizer, path, number) for path in paths for number in range(len(CONVERSATIONS))]
    content = {
        "special_tokens": tokenizer.special_tokens_map,
        "now": now.isoformat(),
        "conversations": CONVERSATIONS,
        "renders": records,
    }
    text = json.dumps(content, ensure_ascii=False) + "\n"
    (HERE / "chat" / "renders.json").write_text(text, encoding="utf-8")
    return (
        f"chat: {len(records)} renders ({sum('error' in record for record in records)} errors), {len(text)} characters"
    )


@dataclass(frozen=True, kw_only=True)
class BeamCase:
    """One beam search, and the values of early_stopping whose sequences must be others."""

    checkpoint: str
    prompt_len: int
    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int
    num_ends: int = 1
    unlike: tuple[bool | str, ...] = ()


def beam_case(checkpoint: str, prompt_len: int, beam_width: int, max_tokens: int, **fields: Any) -> BeamCase:
    """A line of the table; as many texts are returned as there are beams unless fields say otherwise."""
    fields = {"num_return_sequences": beam_width} | fields
    return BeamCase(
        checkpoint=checkpoint, prompt_len=prompt_len, beam_width=beam_width, max_tokens=max_tokens, **fields
    )


BEAM_NOISE = 1e-4
NUM_NOISE_SEEDS = 6
BEAM_CASES = (
    beam_case("mesh/llama", 5, 4, 12, unlike=("never",)),
    beam_case("mesh/llama", 12, 3, 16, length_penalty=2.0, early_stopping=True, unlike=(False,)),
    beam_case("mesh/llama", 20, 4, 16, length_penalty=0.6, early_stopping="never"),
    beam_case("mesh/llama", 3, 6, 10, length_penalty=0.0, num_ends=2),
    beam_case("mesh/llama", 9, 2, 24, num_ends=0),
    beam_case("gqa", 7, 4, 12, length_penalty=-1.0),
    beam_case("gqa", 3, 5, 8, early_stopping=True, num_ends=2, unlike=(False,)),
    beam_case("gqa", 16, 2, 20, early_stopping="never", num_return_sequences=1, unlike=(False,)),
    beam_case("qwen3", 4, 3, 12, num_return_sequences=2, unlike=(True,)),
    beam_case("qwen3", 11, 6, 8, length_penalty=0.6, early_stopping="never", num_ends=2, unlike=(True,)),
    beam_case("qwen3", 6, 4, 10, length_penalty=-1.0, early_stopping="never", num_return_sequences=2),
    beam_case("gemma3", 14, 4, 16, length_penalty=0.0, early_stopping="never"),
    beam_case("gemma3", 8, 3, 10, length_penalty=0.6, early_stopping=True),
)


class Noise(LogitsProcessor):
    """Adds uniform noise, as other rounding would."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of every beam, each up to BEAM_NOISE higher or lower."""
        return scores + torch.from_numpy(self.rng.uniform(-BEAM_NOISE, BEAM_NOISE, scores.shape).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class BeamAnswer:
    """The texts of a beam search, best first: generated ids and scores."""

    sequences: list[list[int]]
    scores: list[float]


def beam_answer(
    model: PreTrainedModel, case: BeamCase, prompt: np.ndarray, eos: list[int], noise: Noise | None = None
) -> BeamAnswer:
    """What transformers generates."""
    ids = torch.tensor(prompt[None], dtype=torch.long)
    model.generation_config.eos_token_id = eos or None
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=case.beam_width,
        max_new_tokens=case.max_tokens,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
        num_return_sequences=case.num_return_sequences,
        logits_processor=[noise] if noise else [],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    lengths = (output.beam_indices >= 0).sum(-1).tolist()
    generated = output.sequences[:, len(prompt) :].tolist()
    return BeamAnswer(
        sequences=[ids[:length] for ids, length in zip(generated, lengths, strict=True)],
        scores=[round(score, 6) for score in output.sequences_scores.tolist()],
    )


def beam_record(model: PreTrainedModel, case: BeamCase, seed: int) -> dict[str, Any] | None:
    """One entry of cases.json, or None where this seed's answer is not robust or shows too little."""
    rng = np.random.default_rng(2000 + seed)
    prompt = rng.integers(3, model.config.vocab_size, case.prompt_len)
    eos: list[int] = []
    if case.num_ends:  # tokens that the search meets when nothing ends it
        unended = beam_answer(model, case, prompt, [])
        met = np.unique([ids[:-1] for ids in unended.sequences])
        eos = sorted(rng.choice(met, case.num_ends, replace=False).tolist())
    answer = beam_answer(model, case, prompt, eos)
    others = (beam_answer(model, replace(case, early_stopping=other), prompt, eos) for other in case.unlike)
    if any(other.sequences == answer.sequences for other in others):
        return None
    if case.num_ends and not case.unlike and len({len(ids) for ids in answer.sequences}) == 1:
        return None
    noisy = (beam_answer(model, case, prompt, eos, Noise(seed)) for seed in range(NUM_NOISE_SEEDS))
    if any(other.sequences != answer.sequences for other in noisy):
        return None
    record = asdict(case) | {"prompt": prompt.tolist(), "eos": eos} | asdict(answer)
    del record["unlike"], record["num_ends"], record["prompt_len"]
    return record


def make_beam() -> str:
    """Writes beam/cases.json."""
    records = []
    for case in BEAM_CASES:
        model = AutoModelForCausalLM.from_pretrained(
            HERE / case.checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
        record = next(filter(None, (beam_record(model.eval(), case, seed) for seed in range(1000))), None)
        if record is None:
            raise RuntimeError(f"no seed below 1000 gives a robust and telling answer to {case}")
        records.append(json.dumps(record))
    text = "[\n" + ",\n".join(records) + "\n]\n"
    (fresh(HERE / "beam") / "cases.json").write_text(text, encoding="utf-8")
    return f"beam: {len(records)} cases, {len(text)} characters"


def main(names: list[str]) -> None:
    """Makes the named cases, or all of them, the tokenizers, the chats and the beam searches."""
    torch.set_num_threads(1)
    others = {"tokenizers": make_tokenizers, "chat": make_chat, "beam": make_beam}
    for name in names or [*CASES, *others]:
        print(others[name]() if name in others else make_case(name, CASES[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
