"""Paged attention: the one contract and the choice of its backend.

Owns what the operation means and which implementation runs; knows nothing of schedulers, layers or meshes.
"""

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from jaxinfer.kernels.pallas import paged_attention_pallas
from jaxinfer.kernels.reference import paged_attention_reference
from jaxinfer.kernels.xla import paged_attention_xla

BACKENDS: dict[str, Callable[..., Array]] = {
    "reference": paged_attention_reference,
    "xla": paged_attention_xla,
    "pallas": paged_attention_pallas,
}
_TRITON_CAPABILITY = (8, 0)
"""Oldest CUDA devices that XLA's Triton compiles for: Ampere."""


def choose_backend(requested: str, platform: str, compute_capability: str | None = None) -> str:
    """Resolves a requested backend name for a platform.

    Args:
        requested: "auto" or a name in `BACKENDS`.
        platform: JAX platform name, such as "cpu" or "gpu".
        compute_capability: of a CUDA device, such as "9.0", or what else a GPU calls its kind; None if unknown.

    Returns:
        A name in `BACKENDS`; "auto" is "pallas" on CUDA devices that Triton supports (from Ampere on), "xla" elsewhere.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> choose_backend("auto", "cpu"), choose_backend("auto", "gpu", "9.0"), choose_backend("auto", "gpu", "7.5")
        ('xla', 'pallas', 'xla')
    """
    if requested == "auto":
        is_supported = compute_capability is None or _version(compute_capability) >= _TRITON_CAPABILITY
        return "pallas" if platform == "gpu" and is_supported else "xla"
    if requested not in BACKENDS:
        choices = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"attention backend {requested!r} is unknown on {platform}; choose one of: {choices}")
    return requested


def _version(compute_capability: str) -> tuple[int, ...]:
    """Major and minor number of a CUDA device's; nothing for other makers' names, such as "gfx942"."""
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
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    owner: Int[Array, " R"] | None = None,
    backend: str = "xla",
) -> Float[Array, "R Q N H"]:
    """Causal attention of each row's last tokens over the row's pages.

    Position p of row r lies at page `page_table[r, p // C]`, offset `p % C`. The row's live queries are its last
    `q_len[r]` positions: query j stands at position `kv_len[r] - q_len[r] + j`, sees the positions up to its own and,
    with a window w, only the last w of them, itself included. Query head n reads kv head `n // (N // K)`. Pages and
    page tails that a row does not reach may hold anything, NaN too.

    Args:
        q: queries, float[R, Q, N, H]; those at j >= q_len[r] are padding.
        k_pages: keys, float[P, K, C, H]; K divides N.
        v_pages: values, float[P, K, C, H].
        page_table: int[R, W], page numbers; entries past a row's last live page are not read.
        kv_len: int[R], tokens in each row's context, the queries included; at most W * C.
        q_len: int[R], live queries of each row; at most kv_len[r].
        scale: factor on the scores before the softcap.
        window: tokens each query sees, itself included; None for all. An array may differ between devices.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for no cap.
        sinks: float[N], one more logit per head in the softmax's denominator, without a value.
        owner: int[R], whose each row is: rows of one owner are pieces of one text and have the same page table, so that
            a backend may read its pages once for neighbouring rows. It changes no result. None: every row is its own.
        backend: a name in `BACKENDS`; see `choose_backend`.

    Returns:
        Float[R, Q, N, H] in q's dtype, accumulated in float32; padding queries and empty rows are zeros.

    Raises:
        ValueError: the backend is unknown, K does not divide N, or the window is not positive.

    Source: Kwon et al. 2023 (vLLM), section 4.1; window as in transformers' `masking_utils.py`, sinks as in its
        `gpt_oss/modeling_gpt_oss.py`.
    """
    num_heads, num_kv_heads = q.shape[2], k_pages.shape[1]
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of: {', '.join(BACKENDS)}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} kv heads; check num_kv_heads")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window is {window} tokens, expected at least 1; pass None for full attention")
    return BACKENDS[backend](
        q,
        k_pages,
        v_pages,
        page_table,
        kv_len,
        q_len,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        owner=owner,
    )
