"""Attention functions that differ from a model's own in which positions a query sees.

Owns: attention with a rule about positions.
Does not know: models. A window is a setting of the engine (sliding_window), which also gives KV pages back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array

from jaxinfer.kernels.reference import Visibility, paged_attention_reference


def masked_attention(visible: Visibility) -> Callable[..., Array]:
    """An attention function for register_attention in which a query sees only some of the positions up to its own.

    Args:
      visible: (positions of queries, positions of keys) -> bool, by broadcasting. Windows, of the model or of the
        engine's settings, still hold.

    Example:
      >>> import jaxinfer
      >>> every_other = masked_attention(lambda query, key: (query - key) % 2 == 0)
      >>> jaxinfer.register_attention("every-other", every_other)  # then LLM(.., attention_backend="every-other")
    """
    return functools.partial(paged_attention_reference, visible=visible)
