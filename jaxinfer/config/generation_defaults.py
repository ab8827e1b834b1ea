"""GenerationDefaults: what a checkpoint says about generating.

Owns: which sampling settings and end tokens a checkpoint can set.
Does not know: files; checkpoint.directory reads them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json (and config.json) say about generating.

    Args:
      temperature, top_k, top_p: sampling settings for calls without SamplingParams; 0, 0 and 1 (greedy, no filters)
        unless the checkpoint asks for sampling.
      eos_token_ids: tokens that end a text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
