"""Other engines (peers) behind one protocol, and transformers, one of them. A peer is imported only when it is loaded.

Owns: the protocol, loading a peer by name, and having transformers generate a fixed number of greedy tokens.
Does not know: what a peer is compared with.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxinfer.bench.llama_cpp_peer import LlamaCppPeer
from jaxinfer.bench.static_batches import in_static_batches, left_padded

PEERS = ("transformers", "llama.cpp")
_TUNING_TOKENS = 4


class Peer(Protocol):
    """An engine to compare with."""

    @property
    def name(self) -> str:
        """The engine's name and version."""
        ...

    @property
    def mixed_batching(self) -> str:
        """How serve_mixed batches requests, such as "static batches"."""
        ...

    def tune(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Chooses the fastest number of threads for batches like this one, and returns it."""
        ...

    def generate(self, prompts: Sequence[tuple[int, ...]], output_len: int) -> list[list[int]]:
        """Greedy tokens of all prompts together, exactly output_len each, end token ignored."""
        ...

    def serve(self, prompts: Sequence[tuple[int, ...]], output_len: int, *, max_num_seqs: int) -> list[list[int]]:
        """The same tokens by continuous batching, with at most max_num_seqs requests at once."""
        ...

    def serve_mixed(
        self, prompts: Sequence[tuple[int, ...]], output_lens: Sequence[int], *, max_num_seqs: int
    ) -> list[list[int]]:
        """Greedy tokens of requests that differ in length, output_lens of each, at most max_num_seqs at once."""
        ...


class TransformersPeer:
    """Hugging Face transformers' generate; on a GPU with its static cache and compiled forward.

    Args:
      checkpoint: a checkpoint directory; or the fields of a config.json, for random weights of that shape.
      dtype: "float32", "bfloat16" or "float16".
      device: torch's name of the device.

    Raises:
      ValueError: torch or transformers is not installed.
    """

    mixed_batching = "static batches"

    def __init__(self, checkpoint: Path | Mapping[str, Any], *, dtype: str, device: str):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise ValueError("peer 'transformers' needs both packages: pip install torch transformers") from error
        self._torch, self._transformers = torch, transformers
        if isinstance(checkpoint, Path):
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
            self._model = self._model.to(device=device, dtype=getattr(torch, dtype)).eval()
        else:
            self._model = self._random_model(checkpoint, dtype, device)
        # The checkpoint's own generation_config would bring its end token and its sampling settings.
        self._model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self.name = f"transformers {transformers.__version__}"
        # On a CPU transformers does not compile, so a static cache would only be longer than needed.
        self._cache: dict[str, Any] = {} if device == "cpu" else {"cache_implementation": "static"}
        self._max_threads = torch.get_num_threads()

    def _random_model(self, fields: Mapping[str, Any], dtype: str, device: str) -> Any:
        """A model with random weights, made on the device: writing and reading an 8B checkpoint would take minutes."""
        shape = {name: value for name, value in fields.items() if name not in ("model_type", "dtype", "torch_dtype")}
        config = self._transformers.AutoConfig.for_model(fields["model_type"], **shape)
        with self._torch.device(device):
            model = self._transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(self._torch, dtype))
        with self._torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, weight.shape[-1] ** -0.5)
        return model.eval()

    def tune(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Chooses the fastest number of threads for batches like this one, and returns it.

        This lets the peer run at its best: OpenMP's threads wait by spinning, and where another process keeps a core
        busy, all threads together are 10 to 20 times slower than one (measured with the 135M shape on two busy cores).
        On a GPU the number of threads is left as it is.
        """
        choices = sorted({1, max(1, self._max_threads // 2), self._max_threads})
        many = len(choices) > 1 and self._model.device.type == "cpu"
        seconds = {threads: self._seconds(prompts, threads) for threads in choices if many}
        self._torch.set_num_threads(min(seconds, key=seconds.__getitem__, default=self._max_threads))
        return self._torch.get_num_threads()

    def _seconds(self, prompts: Sequence[tuple[int, ...]], threads: int) -> float:
        self._torch.set_num_threads(threads)
        self.generate(prompts, 1)
        started = time.perf_counter()
        self.generate(prompts, _TUNING_TOKENS)
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[tuple[int, ...]], output_len: int) -> list[list[int]]:
        """Greedy tokens of all prompts together, exactly output_len each, end token ignored."""
        ids, mask = (self._torch.tensor(array, device=self._model.device) for array in left_padded(prompts))
        is_cpu = self._model.device.type == "cpu"
        with self._torch.inference_mode() if is_cpu else self._torch.no_grad():  # on GPUs, compiled as users' calls are
            tokens = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=output_len,
                do_sample=False,
                **self._cache,
            )
        return tokens[:, ids.shape[1] :].tolist()

    def serve(self, prompts: Sequence[tuple[int, ...]], output_len: int, *, max_num_seqs: int) -> list[list[int]]:
        """Greedy tokens of all prompts by continuous batching (transformers' generate_batch), end token ignored.

        The first call sizes the cache and captures CUDA graphs; later calls with the same lengths reuse both.

        Raises:
          RuntimeError: a request did not get all its tokens.
        """
        settings = {
            "max_requests_per_batch": max_num_seqs,
            "allow_block_sharing": False,  # no two prompts begin alike
            "auto_switch_to_flash": False,  # would look for a kernel on the hub
        }
        known = {field.name for field in dataclasses.fields(self._transformers.ContinuousBatchingConfig)}
        outputs = self._model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=self._transformers.GenerationConfig(
                max_new_tokens=output_len, do_sample=False, pad_token_id=0, eos_token_id=-1
            ),
            continuous_batching_config=self._transformers.ContinuousBatchingConfig(
                **{name: value for name, value in settings.items() if name in known}
            ),
            persistent_manager=True,
        )
        tokens = [list(output.generated_tokens) for output in outputs.values()]
        if len(tokens) < len(prompts) or any(len(entry) != output_len for entry in tokens):
            raise RuntimeError(f"{len(tokens)} of {len(prompts)} requests came back, or not with {output_len} tokens")
        return tokens

    def serve_mixed(
        self, prompts: Sequence[tuple[int, ...]], output_lens: Sequence[int], *, max_num_seqs: int
    ) -> list[list[int]]:
        """Greedy tokens of requests that differ in length, output_lens of each, in static batches of max_num_seqs.

        Not by generate_batch, which gives all requests the same number of tokens.
        """
        return in_static_batches(self.generate, prompts, output_lens, batch_size=max_num_seqs)


def load_peer(
    name: str, checkpoint: Path | Mapping[str, Any], *, dtype: str, platform: str, quantization: str | None = None
) -> Peer:
    """Loads a peer by name, onto the kind of device that JAX uses.

    Args:
      name: one of PEERS.
      checkpoint: a directory, whose weights are loaded; or the fields of a config.json, for random weights.
      dtype: of weights and activations.
      platform: JAX's name of the device's kind, such as "gpu".
      quantization: of the weights, "int8" or None.

    Raises:
      ValueError: there is no such peer, it is not installed, it has no such quantisation, or it does not
        run this model here.
    """
    if name not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
    if name == "llama.cpp":
        return LlamaCppPeer(checkpoint, dtype=dtype, platform=platform, quantization=quantization)
    if quantization is not None:
        raise ValueError(
            f"peer {name!r} is run without quantization, got {quantization!r}; use llama.cpp or leave it out"
        )
    return TransformersPeer(checkpoint, dtype=dtype, device="cpu" if platform == "cpu" else "cuda")
