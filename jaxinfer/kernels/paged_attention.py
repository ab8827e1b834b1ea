"""Paged attention: the contract that all backends keep, and the choice among them.

Owns: what the operation means and which implementation runs.
Does not know: schedulers, layers, meshes.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.config.engine_config import ATTENTION_BACKENDS, REGISTERED_ATTENTION
from jaxinfer.kernels.pallas import paged_attention_pallas, segmented_attention_pallas
from jaxinfer.kernels.reference import attention_weights_reference, paged_attention_reference
from jaxinfer.kernels.segment import Segment
from jaxinfer.kernels.xla import paged_attention_xla

BACKENDS: dict[str, Callable[..., Array]] = {
    "reference": paged_attention_reference,
    "xla": paged_attention_xla,
    "pallas": paged_attention_pallas,
}
_BUILT_IN = tuple(BACKENDS)
_CURRENT: dict[str, str] = {}
"""The backend that a registered name stands for now. LLMs that were made before keep the one that it stood for then."""
_TRITON_CAPABILITY = (8, 0)
"""Compute capability of the oldest CUDA devices that XLA's Triton compiles for: Ampere."""


def register_attention(name: str, function: Callable[..., Array]) -> None:
    """Adds an attention function of your own, which an LLM runs with attention_backend=name.

    Args:
        name: how the settings call it. A function that was registered under the name before is replaced, for LLMs that
            are loaded from then on.
        function: keeps the contract of `paged_attention`: (q, k_pages, v_pages, page_table, kv_len, q_len, *, scale,
            window, sink_tokens, softcap, sinks, sequence_id) -> Float[R, Q, N, H] in q's dtype. It sees the heads of
            one shard, and its device's pages. What stands around attention runs as with "xla".

    Raises:
        TypeError: name is not a string, or function cannot be called.
        ValueError: the name is a built-in one, or the function cannot be traced with such arguments or returns
            something else.
    """
    if not isinstance(name, str) or not callable(function):
        raise TypeError(f"register_attention needs a name and a function, got {name!r} and {function!r}")
    if name in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {name!r} is built in; register the function under another name")
    q, pages = (jax.ShapeDtypeStruct(dims, jnp.float32) for dims in ((2, 3, 4, 8), (5, 2, 8, 8)))
    table, lengths = (jax.ShapeDtypeStruct(dims, jnp.int32) for dims in ((2, 4), (2,)))
    options = {"scale": 0.5, "window": None, "sink_tokens": 0, "softcap": None, "sinks": None, "sequence_id": None}
    try:
        found = jax.eval_shape(lambda *arrays: function(*arrays, **options), q, pages, pages, table, lengths, lengths)
    except Exception as error:  # whatever the user's function raises
        (reason, *_) = str(error).splitlines() or [""]
        raise ValueError(f"attention function {name!r} cannot be traced: {type(error).__name__}: {reason}") from error
    if getattr(found, "shape", None) != q.shape or found.dtype != q.dtype:
        raise ValueError(f"attention function {name!r} must return q's shape and dtype, {q}, got {found}")
    _CURRENT[name] = f"{name} #{1 + sum(key.startswith(f'{name} #') for key in BACKENDS)}"
    BACKENDS[_CURRENT[name]] = function
    if name not in REGISTERED_ATTENTION:
        REGISTERED_ATTENTION.append(name)


def is_built_in(backend: str) -> bool:
    """Whether a backend is one of this package, not a user's function."""
    return backend in _BUILT_IN


def choose_backend(requested: str, platform: str, compute_capability: str | None = None) -> str:
    """Resolves a requested backend name for a platform.

    Args:
        requested: "auto" or a name in `BACKENDS`.
        platform: JAX platform name, such as "cpu" or "gpu".
        compute_capability: of a CUDA device, such as "9.0", or what other makers' GPUs report in its place, such as
            "gfx942"; None if unknown.

    Returns:
        A name in `BACKENDS`. "auto" gives "pallas" on CUDA devices that Triton supports (from Ampere on) and on a GPU
        of unknown capability, "xla" elsewhere.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> choose_backend("auto", "cpu"), choose_backend("auto", "gpu", "9.0"), choose_backend("auto", "gpu", "7.5")
        ('xla', 'pallas', 'xla')
    """
    if requested == "auto":
        is_supported = compute_capability is None or _version(compute_capability) >= _TRITON_CAPABILITY
        return "pallas" if platform == "gpu" and is_supported else "xla"
    requested = _CURRENT.get(requested, requested)
    if requested not in BACKENDS:
        choices = ", ".join(["auto", *_BUILT_IN, *_CURRENT])
        raise ValueError(f"attention backend {requested!r} is unknown on {platform}; choose one of: {choices}")
    return requested


def _version(compute_capability: str) -> tuple[int, ...]:
    """The numbers of a CUDA device's capability, (9, 0) for "9.0"; () for other makers' names, such as "gfx942"."""
    parts = compute_capability.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def paged_attention(
    q: Float[Array, "R Q N H"],
    k_pages: Float[Array, "P K C H"],
    v_pages: Float[Array, "P K C H"],
    page_table: Int[Array, "R W"],
    kv_len: Int[Array, " R"],
    q_len: Int[Array, " R"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    sink_tokens: int | Int[Array, ""] = 0,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    sequence_id: Int[Array, " R"] | None = None,
    backend: str = "xla",
) -> Float[Array, "R Q N H"]:
    """Causal attention of the last tokens of each row over all positions of the row, whose keys lie in pages.

    Position p of row r is stored in page `page_table[r, p // C]` at offset `p % C`. The row's live queries are its last
    `q_len[r]` positions: query j stands at position `kv_len[r] - q_len[r] + j`. It sees the positions up to its own;
    with a window w, only the last w of these, its own included, and the first `sink_tokens`. Query head n reads kv head
    `n // (N // K)`. Positions from `kv_len[r]` on, in the last page or in pages beyond it, may hold anything, even NaN,
    and so may pages of which no live query of the row sees any position.

    Args:
        q: queries, float[R, Q, N, H]; in row r, queries j >= q_len[r] are padding.
        k_pages: keys, float[P, K, C, H]; K divides N.
        v_pages: values, float[P, K, C, H].
        page_table: int[R, W], page numbers; entries past a row's last live page are not read.
        kv_len: int[R], positions in each row's context, the queries' own included; at most W * C.
        q_len: int[R], live queries of each row; at most kv_len[r].
        scale: factor on the scores before the softcap.
        window: how many tokens each query sees, itself included; None for all. An array may differ between devices.
        sink_tokens: how many of a row's first positions every query sees beside its window; an array like window.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for no cap.
        sinks: float[N], for each head one more logit in the softmax's denominator, which has no value; None for none.
        sequence_id: int[R], the number of the sequence that each row belongs to. Rows with the same number are pieces
            of one text and have the same page table, so a backend may read its pages once for neighbouring rows. The
            results do not depend on it. None: every row is a sequence of its own.
        backend: a name in `BACKENDS`; see `choose_backend`.

    Returns:
        Float[R, Q, N, H] in q's dtype, accumulated in float32; padding queries and empty rows are zeros.

    Raises:
        ValueError: the backend is unknown, K does not divide N, or an int window is not positive.

    Source: Kwon et al. 2023 (vLLM), section 4.1; window as in transformers' `masking_utils.py`, sinks as in its
        `gpt_oss/modeling_gpt_oss.py`.
    """
    _check(q.shape[2], k_pages.shape[1], window, backend)
    return BACKENDS[backend](
        q,
        k_pages,
        v_pages,
        page_table,
        kv_len,
        q_len,
        scale=scale,
        window=window,
        sink_tokens=sink_tokens,
        softcap=softcap,
        sinks=sinks,
        sequence_id=sequence_id,
    )


def segmented_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P K C H"],
    v_pages: Float[Array, "P K C H"],
    segments: Sequence[Segment],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    sink_tokens: int | Int[Array, ""] = 0,
    softcap: float | None = None,
    backend: str = "xla",
) -> Float[Array, "T N H"]:
    """The attention of all tokens of a step, which lie segment by segment: paged_attention for each segment.

    Args:
        q: queries of all tokens.
        segments: in the order of their tokens; together they have T.
        k_pages, v_pages, scale, window, sink_tokens, softcap, backend: as paged_attention's.

    Returns:
        Float[T, N, H] in q's dtype; padding queries and empty rows are zeros.

    Raises:
        ValueError: as paged_attention.
    """
    _check(q.shape[1], k_pages.shape[1], window, backend)
    options = {"scale": scale, "window": window, "sink_tokens": sink_tokens, "softcap": softcap}
    if backend == "pallas":
        return segmented_attention_pallas(q, k_pages, v_pages, segments, **options)
    attended, start = [], 0
    for segment in segments:
        rows = q[start : start + segment.num_tokens]
        start += segment.num_tokens
        found = paged_attention(
            rows.reshape(-1, segment.num_queries, *q.shape[1:]),
            k_pages,
            v_pages,
            segment.page_table,
            segment.kv_len,
            segment.q_len,
            sequence_id=segment.sequence_id,
            backend=backend,
            **options,
        )
        attended.append(found.reshape(rows.shape))
    return jnp.concatenate(attended)


def segmented_weights(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P K C H"],
    segments: Sequence[Segment],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    sink_tokens: int | Int[Array, ""] = 0,
    softcap: float | None = None,
) -> Float[Array, "T N S"]:
    """The attention weights of all tokens of a step over the positions of their rows, for looking at.

    No backend keeps them, so they are computed anew, whichever backend computes the attention itself.

    Args:
      q, k_pages, segments, scale, window, sink_tokens, softcap: as segmented_attention's.

    Returns:
      Float32[T, N, S], S positions of the longest row that a page table can hold; zeros for padding queries.
    """
    found, start = [], 0
    for segment in segments:
        rows = q[start : start + segment.num_tokens]
        start += segment.num_tokens
        weights = attention_weights_reference(
            rows.reshape(-1, segment.num_queries, *q.shape[1:]),
            k_pages,
            segment.page_table,
            segment.kv_len,
            segment.q_len,
            scale=scale,
            window=window,
            sink_tokens=sink_tokens,
            softcap=softcap,
        )  # [R, N, Q, S]
        found.append(weights.swapaxes(1, 2).reshape(segment.num_tokens, q.shape[1], -1))
    return jnp.concatenate(found)


def _check(num_heads: int, num_kv_heads: int, window: int | Int[Array, ""] | None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of: {', '.join(BACKENDS)}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} kv heads; check num_kv_heads")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window is {window} tokens, expected at least 1; pass None for full attention")
