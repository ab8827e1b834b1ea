"""llama.cpp as a peer, through the C functions that the package llama-cpp-python exposes.

Owns: loading a model from a GGUF file, contexts, batches, and a loop that keeps every sequence's slot busy.
Does not know: what it is compared with. The package is imported only when the peer is loaded.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.bench.gguf_file import write_gguf
from jaxinfer.bench.random_weights import RandomStore
from jaxinfer.checkpoint.directory import read_json, weight_files
from jaxinfer.checkpoint.store import SafetensorsStore
from jaxinfer.models.registry import parse_model_config

_TUNING_TOKENS = 4
_CELLS = 256  # llama.cpp rounds the KV cells of a sequence up to a multiple of this
_ERROR = 4  # ggml's level of errors in its log; warnings are 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fed:
    """The tokens that one sequence adds to a call of llama_decode; the first has the position `start`."""

    slot: int
    start: int
    tokens: Sequence[int]


class LlamaCppPeer:
    """llama.cpp on the CPU, weights, activations and KV cache in float32. One llama_decode a step has all rows.

    Args:
      checkpoint: a checkpoint directory; or the fields of a config.json, for random weights of that shape.
      dtype: must be "float32".
      platform: must be "cpu".
      quantization: of the matrices, as write_gguf's.

    Raises:
      ValueError: a package is missing, dtype or platform is another, or the model is not one that is written as GGUF.
    """

    mixed_batching = "continuous batching"

    def __init__(
        self, checkpoint: Path | Mapping[str, Any], *, dtype: str, platform: str, quantization: str | None = None
    ):
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except ImportError as error:
            raise ValueError("peer 'llama.cpp' needs both packages: pip install llama-cpp-python gguf") from error
        if (dtype, platform) != ("float32", "cpu"):
            raise ValueError(f"peer 'llama.cpp' runs in float32 on a cpu, got {dtype} on {platform}; set dtype")
        self._api: Any = llama_cpp
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self._log = llama_cpp.llama_log_callback(_print_error)  # kept, as the library calls it later
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        fields = read_json(checkpoint / "config.json") if isinstance(checkpoint, Path) else checkpoint
        config = parse_model_config(fields)
        store = SafetensorsStore(weight_files(checkpoint)) if isinstance(checkpoint, Path) else RandomStore(config)
        self._vocab_size = config.vocab_size
        with tempfile.TemporaryDirectory(prefix="jaxinfer-gguf-") as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(store, config, file, quantization=quantization)
            self._model: Any = self._load(file)
        self._max_threads = self._threads = os.cpu_count() or 1
        self._context: Any = None
        self._context_key: Any = None

    def _load(self, file: Path) -> Any:
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_mmap = False  # the file is deleted
        model = self._api.llama_model_load_from_file(str(file).encode(), params)
        if not model:
            raise ValueError("llama.cpp did not load the model; its message is above")
        return model

    def tune(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Chooses the fastest number of threads for batches like this one, and returns it."""
        choices = {1, max(1, self._max_threads // 2), self._max_threads}
        self._threads = min(choices, key=lambda threads: self._seconds(prompts, threads))
        return self._threads

    def _seconds(self, prompts: Sequence[tuple[int, ...]], threads: int) -> float:
        self._threads = threads
        self.generate(prompts, 1)
        started = time.perf_counter()
        self.generate(prompts, _TUNING_TOKENS)
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[tuple[int, ...]], output_len: int) -> list[list[int]]:
        """Greedy tokens of all prompts together, exactly output_len each, end token ignored."""
        return self.serve(prompts, output_len, max_num_seqs=len(prompts))

    def serve(self, prompts: Sequence[tuple[int, ...]], output_len: int, *, max_num_seqs: int) -> list[list[int]]:
        """The same tokens by continuous batching, with at most max_num_seqs requests at once."""
        return self.serve_mixed(prompts, [output_len] * len(prompts), max_num_seqs=max_num_seqs)

    def serve_mixed(
        self, prompts: Sequence[tuple[int, ...]], output_lens: Sequence[int], *, max_num_seqs: int
    ) -> list[list[int]]:
        """Greedy tokens of requests that differ in length, output_lens of each; the next prompt takes a free slot."""
        num_slots = min(max_num_seqs, len(prompts))
        longest = max(len(prompt) + length for prompt, length in zip(prompts, output_lens, strict=True))
        context = self._context_for(num_slots, longest)
        memory = self._api.llama_get_memory(context)
        tokens: list[list[int]] = [[] for _ in prompts]
        waiting, free, running = deque(range(len(prompts))), set(range(num_slots)), dict[int, int]()
        while waiting or running:
            while waiting and free:
                slot = min(free)
                free.remove(slot)
                running[slot] = waiting.popleft()
            fed = [_next_tokens(slot, prompts[running[slot]], tokens[running[slot]]) for slot in sorted(running)]
            for entry, token in zip(fed, self._decode(context, fed), strict=True):
                number = running[entry.slot]
                tokens[number].append(token)
                if len(tokens[number]) == output_lens[number]:
                    self._api.llama_memory_seq_rm(memory, entry.slot, -1, -1)
                    del running[entry.slot]
                    free.add(entry.slot)
        return tokens

    def _context_for(self, num_slots: int, seq_len: int) -> Any:
        """A context with room for num_slots sequences of seq_len tokens, made anew only if the last one differs."""
        seq_len = -(-seq_len // _CELLS) * _CELLS
        key = (num_slots, seq_len)
        if key != self._context_key:
            if self._context is not None:
                self._api.llama_free(self._context)
            params = self._api.llama_context_default_params()
            params.n_ctx = params.n_batch = num_slots * seq_len
            params.n_seq_max = params.n_outputs_max = num_slots
            # With flash attention, logits are off by up to 0.015 even though the cache is float32, without it by 1e-5;
            # and it is slower (the 135M shape with 16 slots on one thread: 25 s, else 20 s).
            params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = self._api.GGML_TYPE_F32
            # Each sequence has cells of its own: in unified ones, all would attend, masked, to those of all (31 s).
            params.kv_unified = False
            self._context, self._context_key = self._api.llama_init_from_model(self._model, params), key
            if not self._context:
                raise RuntimeError(f"llama.cpp made no context for {num_slots} sequences of {seq_len} tokens")
        self._api.llama_set_n_threads(self._context, self._threads, self._threads)
        return self._context

    def _decode(self, context: Any, fed: Sequence[_Fed]) -> list[int]:
        """Runs one llama_decode; returns the most likely token after the last one that each sequence fed.

        Raises:
          RuntimeError: llama_decode failed.
        """
        lengths = [len(entry.tokens) for entry in fed]
        tokens = np.fromiter(itertools.chain.from_iterable(entry.tokens for entry in fed), np.int32)
        positions = np.concatenate(
            [np.arange(entry.start, entry.start + len(entry.tokens), dtype=np.int32) for entry in fed]
        )
        slots = np.repeat(np.array([entry.slot for entry in fed], np.int32), lengths)
        num_slots = np.ones_like(slots)  # a token may belong to several sequences; here it belongs to one
        slot_addresses = slots.ctypes.data + slots.itemsize * np.arange(len(slots), dtype=np.uintp)
        wants_logits = np.zeros(len(tokens), np.int8)
        wants_logits[np.cumsum(lengths) - 1] = 1
        batch = self._api.llama_batch(
            n_tokens=len(tokens),
            token=_pointer(tokens, ctypes.c_int32),
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(num_slots, ctypes.c_int32),
            seq_id=_pointer(slot_addresses, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(wants_logits, ctypes.c_int8),
        )
        status = self._api.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status} for {len(fed)} sequences, {len(tokens)} tokens")
        logits = np.ctypeslib.as_array(self._api.llama_get_logits(context), (len(fed), self._vocab_size))
        return logits.argmax(-1).tolist()


def _next_tokens(slot: int, prompt: Sequence[int], tokens: Sequence[int]) -> _Fed:
    """The prompt of a sequence that has no token yet; else its newest token."""
    if not tokens:
        return _Fed(slot=slot, start=0, tokens=prompt)
    return _Fed(slot=slot, start=len(prompt) + len(tokens) - 1, tokens=tokens[-1:])


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _print_error(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)
