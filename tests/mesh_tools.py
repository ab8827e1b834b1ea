"""Layouts of up to eight simulated devices, models for them, and requests that use every sampler."""

from __future__ import annotations

import numpy as np
from conftest import load_golden

from jaxinfer import LLM, RequestOutput, SamplingParams

LAYOUTS = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (4, 1), (4, 2), (2, 4)]
MODELS = ["llama", "qwen3", "gemma3", "gpt2", "mixtral"]
BASE = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 16}
VOCAB_SIZE = 301


def layout_name(layout: tuple[int, int]) -> str:
    return "x".join(map(str, layout))


def on_mesh(model: str, layout: tuple[int, int], **fields) -> LLM:
    stages, shards = layout
    sizes = {"pipeline_parallel_size": stages, "tensor_parallel_size": shards}
    return LLM(load_golden(f"mesh/{model}").path, **BASE | sizes | fields)


def requests_of(model: str) -> list[tuple[list[int], SamplingParams]]:
    """The golden prompts, greedy, and between them seeded ones of every sampler that share a beginning."""
    golden = load_golden(f"mesh/{model}")
    beginning = np.random.default_rng(1).integers(0, VOCAB_SIZE, 17).tolist()
    samplers = [{"temperature": 0.9, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.2}]
    pairs = []
    for number, (prompt, sampler) in enumerate(zip(golden.prompts, samplers, strict=True)):
        pairs.append((prompt, SamplingParams(max_tokens=14, temperature=0.0, logprobs=1, ignore_eos=True)))
        seeded = SamplingParams(max_tokens=18, seed=number, logprobs=1, ignore_eos=True, **sampler)
        pairs.append((beginning + prompt[:9], seeded))
    return pairs


def run(llm: LLM, model: str) -> list[RequestOutput]:
    prompts, params = zip(*requests_of(model), strict=True)
    return llm.generate(list(prompts), list(params), use_tqdm=False)
