"""Other engines behind one protocol; the only place that imports them, and only when asked.

Owns: loading a peer and its greedy generation of a fixed number of tokens.
Does not know: what it is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PEERS = ("transformers",)
_TUNING_TOKENS = 4


class Peer(Protocol):
    """An engine to compare with."""

    @property
    def name(self) -> str:
        """What it is called, its version included."""
        ...

    def tune(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Chooses the fastest number of threads for batches like this one, and returns it."""
        ...

    def generate(self, prompts: Sequence[tuple[int, ...]], output_len: int) -> list[list[int]]:
        """Greedy tokens of all prompts (of one length) together, exactly output_len each, end token ignored."""
        ...


class TransformersPeer:
    """Hugging Face transformers' generate.

    Args:
      checkpoint: a directory.
      dtype: "float32", "bfloat16" or "float16".
      device: torch's name of it.

    Raises:
      ValueError: torch or transformers is not installed.
    """

    def __init__(self, checkpoint: Path, *, dtype: str, device: str):
        try:
            import torch  # pyright: ignore[reportMissingImports]
            import transformers  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("peer 'transformers' needs both packages: pip install torch transformers") from error
        self._torch = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        self._model = self._model.to(device=device, dtype=getattr(torch, dtype)).eval()
        # The checkpoint's own would bring its end token, and whatever it says about sampling.
        self._model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self.name = f"transformers {transformers.__version__}"
        self._max_threads = torch.get_num_threads()

    def tune(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Chooses the fastest number of threads for batches like this one, and returns it.

        A peer is compared at its best: OpenMP's threads wait spinning, and where another process holds a core, all of
        them are 10 to 20 times slower than one (measured, 135M shape on two busy cores).
        """
        choices = sorted({1, max(1, self._max_threads // 2), self._max_threads})
        seconds = {threads: self._seconds(prompts, threads) for threads in choices if len(choices) > 1}
        self._torch.set_num_threads(min(seconds, key=seconds.__getitem__, default=self._max_threads))
        return self._torch.get_num_threads()

    def _seconds(self, prompts: Sequence[tuple[int, ...]], threads: int) -> float:
        self._torch.set_num_threads(threads)
        self.generate(prompts, 1)
        started = time.perf_counter()
        self.generate(prompts, _TUNING_TOKENS)
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[tuple[int, ...]], output_len: int) -> list[list[int]]:
        """Greedy tokens of all prompts (of one length) together, exactly output_len each, end token ignored."""
        ids = self._torch.tensor(np.asarray(prompts), device=self._model.device)
        with self._torch.inference_mode():
            tokens = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=output_len, do_sample=False
            )
        return tokens[:, ids.shape[1] :].tolist()


def load_peer(name: str, checkpoint: Path, *, dtype: str, platform: str) -> Peer:
    """A peer by name, with the same weights on the same kind of device.

    Args:
      name: one of PEERS.
      checkpoint: a directory.
      dtype: of weights and activations.
      platform: JAX's name of it.

    Raises:
      ValueError: no such peer, or it is not installed.
    """
    if name not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
    return TransformersPeer(checkpoint, dtype=dtype, device="cpu" if platform == "cpu" else "cuda")
