"""Attention functions that differ from a model's own in which positions a query sees.

Owns: attention with a rule about positions, and rules from the literature.
Does not know: models; the KV pages that nobody sees any more stay allocated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array, Bool, Int

from jaxinfer.config.validation import require_int
from jaxinfer.kernels.reference import Visibility, paged_attention_reference


def masked_attention(visible: Visibility) -> Callable[..., Array]:
    """An attention function for register_attention in which a query sees only some of the positions up to its own.

    Args:
      visible: (positions of queries, positions of keys) -> bool, by broadcasting. A model's own windows still hold.

    Example:
      >>> import jaxinfer
      >>> every_other = masked_attention(lambda query, key: (query - key) % 2 == 0)
      >>> jaxinfer.register_attention("every-other", every_other)  # then LLM(.., attention_backend="every-other")
    """
    return functools.partial(paged_attention_reference, visible=visible)


def streaming_attention(*, window: int, sinks: int = 4) -> Callable[..., Array]:
    """Attention to the last `window` positions, the query's own included, and to the first `sinks` ones.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks". Deviation: positions are those
    in the text, not those in the cache.

    Raises:
      ValueError: window is below 1, or sinks below 0.
    """
    require_int("window", window, 1)
    require_int("sinks", sinks, 0)

    def visible(query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (key < sinks) | (key > query - window)

    return masked_attention(visible)
