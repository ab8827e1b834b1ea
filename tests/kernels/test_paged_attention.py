"""Conformance of every paged attention backend: numpy softmax on contiguous K/V, then the oracle, then invariants."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import count_kernels, lowered_for_gpu
from jaxtyping import jaxtyped

from jaxinfer.kernels import pallas, xla
from jaxinfer.kernels.paged_attention import BACKENDS, choose_backend, paged_attention, segmented_attention
from jaxinfer.kernels.segment import Segment

PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, TABLE_WIDTH = 8, 2, 16, 5
KV_LENS = [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE + 5, TABLE_WIDTH * PAGE_SIZE]
SCALE = HEAD_DIM**-0.5
FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "page_window": {"window": PAGE_SIZE},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "sink_tokens": {"window": 5, "sink_tokens": 10},
    "all": {"window": 11, "sink_tokens": 3, "softcap": 3.0, "sinks": True},
}
F32 = {"rtol": 2e-5, "atol": 2e-6}  # only the order of float32 additions differs
BF16 = {"rtol": 2e-2, "atol": 2e-2}  # weights and the result round to 8 bits of mantissa
FAST_BACKENDS = sorted(set(BACKENDS) - {"reference"})


# Pallas' interpreter takes seconds to compile: CI runs the features together, `-m matrix` each alone and the rest.
MATRIX = pytest.mark.matrix


def in_matrix(backend):
    return pytest.param(backend, marks=MATRIX if backend == "pallas" else ())


CASES = [
    pytest.param(backend, name, marks=MATRIX if backend == "pallas" and name != "all" else ())
    for backend in FAST_BACKENDS
    for name in FEATURES
]


@functools.cache
def attention(backend, names, window, sink_tokens, softcap):
    """The typechecked contract under jit, compiled once per static setting."""
    from beartype import beartype  # here, since the programs for GPUs are lowered without it too

    checked = jaxtyped(typechecker=beartype)(paged_attention)

    def call(sinks, sequence_id, *arrays):
        sinks = sinks if "sinks" in names else None
        return checked(
            *arrays,
            scale=SCALE,
            window=window,
            sink_tokens=sink_tokens,
            softcap=softcap,
            sinks=sinks,
            sequence_id=sequence_id,
            backend=backend,
        )

    return jax.jit(call)


def attend(
    case,
    backend,
    dtype=jnp.float32,
    *,
    window=None,
    sink_tokens=0,
    softcap=None,
    sinks=False,
    sequence_id=None,
    **replaced,
):
    arrays = case.arrays | replaced
    floats = [jnp.asarray(arrays[name], dtype) for name in ("q", "k_pages", "v_pages")]
    ints = [jnp.asarray(arrays[name], jnp.int32) for name in ("page_table", "kv_len", "q_len")]
    call = attention(backend, ("sinks",) if sinks else (), window, sink_tokens, softcap)
    out = call(jnp.asarray(case.sinks), sequence_id, *floats, *ints)
    assert out.dtype == dtype
    return np.asarray(out, np.float32)


def make_case(num_queries=1, group=4, kv_lens=tuple(KV_LENS), seed=0, head_dim=HEAD_DIM):
    """Contiguous K/V scattered over shuffled pages; every page and tail that no row reaches is NaN."""
    rng = np.random.default_rng(seed)
    kv_len, num_rows = np.array(kv_lens), len(kv_lens)
    q_len = np.minimum(kv_len, rng.integers(1, num_queries + 1, num_rows))
    q_len[-1] = min(kv_len[-1], num_queries)
    q = rng.normal(size=(num_rows, num_queries, NUM_KV_HEADS * group, head_dim)).astype(np.float32)
    kv = rng.normal(size=(2, num_rows, NUM_KV_HEADS, TABLE_WIDTH * PAGE_SIZE, head_dim)).astype(np.float32)
    pages = np.full((2, num_rows * TABLE_WIDTH + 1, NUM_KV_HEADS, PAGE_SIZE, head_dim), np.nan, np.float32)
    table = rng.permutation(num_rows * TABLE_WIDTH).reshape(num_rows, TABLE_WIDTH) + 1
    for row, length in enumerate(kv_len):
        for p in range(length):
            pages[:, table[row, p // PAGE_SIZE], :, p % PAGE_SIZE] = kv[:, row, :, p]
        table[row, -(-length // PAGE_SIZE) :] = 0  # the dump page
    arrays = {"q": q, "k_pages": pages[0], "v_pages": pages[1], "page_table": table, "kv_len": kv_len, "q_len": q_len}
    return SimpleNamespace(arrays=arrays, kv=kv, sinks=rng.normal(size=NUM_KV_HEADS * group).astype(np.float32))


def numpy_attention(case, *, window=None, sink_tokens=0, softcap=None, sinks=False):
    """One softmax per (row, query, head) in float64."""
    q, kv_len, q_len = (case.arrays[name] for name in ("q", "kv_len", "q_len"))
    out = np.zeros(q.shape)
    group = q.shape[2] // NUM_KV_HEADS
    for row, query, head in np.ndindex(q.shape[:3]):
        if query >= q_len[row]:
            continue
        end = kv_len[row] - q_len[row] + query + 1
        start = 0 if window is None else max(0, end - window)
        seen = [*range(min(sink_tokens, start)), *range(start, end)]
        k, v = case.kv[:, row, head // group, seen].astype(np.float64)
        score = k @ q[row, query, head] * SCALE
        if softcap is not None:
            score = softcap * np.tanh(score / softcap)
        weight = np.exp(score)
        out[row, query, head] = weight @ v / (weight.sum() + (np.exp(case.sinks[head]) if sinks else 0.0))
    return out


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("num_queries", [1, 3, 16])
def test_reference_contiguous_kv_equals_numpy_softmax(num_queries, features):
    case = make_case(num_queries)
    np.testing.assert_allclose(
        attend(case, "reference", **FEATURES[features]), numpy_attention(case, **FEATURES[features]), **F32
    )


@pytest.mark.parametrize(("backend", "features"), CASES)
@pytest.mark.parametrize("num_queries", [1, 3, 16])
def test_paged_attention_shuffled_pages_equals_reference(num_queries, features, backend):
    case = make_case(num_queries, seed=1)
    expected = attend(case, "reference", **FEATURES[features])
    np.testing.assert_allclose(attend(case, backend, **FEATURES[features]), expected, **F32)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("num_queries", [1, 3, 16])
def test_paged_attention_pages_out_of_sight_may_hold_anything(num_queries, backend):
    case, options = make_case(num_queries, seed=1), FEATURES["all"]
    expected = attend(case, backend, **options)
    hidden = 0
    for row, (kv_len, q_len) in enumerate(zip(case.arrays["kv_len"], case.arrays["q_len"], strict=True)):
        end_of_hidden = (kv_len - q_len - options["window"] + 1) // PAGE_SIZE
        for page in case.arrays["page_table"][row, 1 : max(end_of_hidden, 1)]:  # the first page has the sink tokens
            hidden += 1
            for name in ("k_pages", "v_pages"):
                case.arrays[name][page] = np.nan
    assert hidden
    np.testing.assert_array_equal(attend(case, backend, **options), expected)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("features", [pytest.param("plain", marks=MATRIX), "all"])
def test_paged_attention_texts_side_by_side_do_not_share_nan(features, backend):
    case, row = make_case(16, seed=1), -2
    expected = attend(case, backend, **FEATURES[features])
    case.arrays["v_pages"][case.arrays["page_table"][row, 0]] = np.nan
    found = attend(case, backend, **FEATURES[features])
    assert np.isnan(found[row]).any()
    np.testing.assert_array_equal(np.delete(found, row, axis=0), np.delete(expected, row, axis=0))


def prompt_pieces():
    """Prompts of 40 tokens from position 0 and of 20 from position 7, in rows of 16, then padding; and their ids."""
    case = make_case(16, 2, kv_lens=(40, 27))
    texts, starts, lengths = [0, 0, 0, 1, 1, 0, 0], [0, 16, 32, 7, 23, 0, 0], [16, 16, 8, 16, 4, 0, 0]
    q = np.random.default_rng(5).normal(size=(7, 16, 2 * NUM_KV_HEADS, HEAD_DIM))
    changed = {"q": q, "page_table": case.arrays["page_table"][texts], "q_len": np.array(lengths)}
    case.arrays |= changed | {"kv_len": np.add(starts, lengths)}
    return case, jnp.asarray([5, 5, 5, 2, 2, 9, 9])


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("features", [pytest.param("plain", marks=MATRIX), "all"])
def test_paged_attention_rows_of_one_sequence_equal_rows_of_their_own(features, backend):
    case, sequence_id = prompt_pieces()
    expected = attend(case, "reference", **FEATURES[features])
    np.testing.assert_allclose(attend(case, backend, sequence_id=sequence_id, **FEATURES[features]), expected, **F32)


@pytest.mark.parametrize("backend", [in_matrix(name) for name in FAST_BACKENDS])
@pytest.mark.parametrize("group", [1, 8, *(pytest.param(group, marks=MATRIX) for group in (7, 16))])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_paged_attention_group_size_equals_reference(num_queries, group, backend):
    case = make_case(num_queries, group)
    expected = attend(case, "reference", **FEATURES["all"])
    np.testing.assert_allclose(attend(case, backend, **FEATURES["all"]), expected, **F32)


@MATRIX
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_queries", [1, 16])
def test_paged_attention_head_size_equals_reference(num_queries, head_dim, backend):
    case = make_case(num_queries, 2, head_dim=head_dim)
    expected = attend(case, "reference", **FEATURES["all"])
    np.testing.assert_allclose(attend(case, backend, **FEATURES["all"]), expected, **F32)


@MATRIX
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_paged_attention_other_dtypes_equal_float32_reference(backend, dtype):
    case = make_case(3)
    out = attend(case, backend, jnp.dtype(dtype), **FEATURES["all"])
    np.testing.assert_allclose(
        out, attend(case, "reference", **FEATURES["all"]), **(F32 if dtype == "float32" else BF16)
    )


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("features", ["plain", pytest.param("all", marks=MATRIX)])
def test_segmented_attention_equals_attention_of_each_segment(features, backend):
    """Decode rows, then rows of 16 of which the last one is short, then rows of 3 tokens to verify."""
    cases = [make_case(1, 2, seed=2), make_case(16, 2, seed=3), make_case(3, 2, kv_lens=(9, 20), seed=4)]
    options = {name: value for name, value in FEATURES[features].items() if name != "sinks"}
    expected = [attend(case, "reference", **options).reshape(-1, 2 * NUM_KV_HEADS, HEAD_DIM) for case in cases]
    segments, start = [], 0
    for case in cases:  # the pages of all lie in one pool
        rows = {name: jnp.asarray(case.arrays[name], jnp.int32) for name in ("kv_len", "q_len")}
        table = jnp.asarray(case.arrays["page_table"] + start, jnp.int32)
        own = jnp.arange(len(rows["kv_len"]), dtype=jnp.int32)
        queries = case.arrays["q"].shape[1]
        segments.append(Segment(page_table=table, sequence_id=own, num_queries=queries, **rows))
        start += len(case.arrays["k_pages"])
    flat = (case.arrays["q"].reshape(-1, 2 * NUM_KV_HEADS, HEAD_DIM) for case in cases)
    tokens = jnp.asarray(np.concatenate(list(flat)), jnp.float32)
    pages = (jnp.asarray(np.concatenate([case.arrays[name] for case in cases])) for name in ("k_pages", "v_pages"))
    call = functools.partial(segmented_attention, scale=SCALE, backend=backend, **options)
    found = jax.jit(call)(tokens, *pages, segments)
    np.testing.assert_allclose(found, np.concatenate(expected), **F32)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("num_queries", [1, 16])
def test_paged_attention_bfloat16_equals_float32_reference(num_queries, backend):
    case = make_case(num_queries)
    out = attend(case, backend, jnp.bfloat16, **FEATURES["all"])
    np.testing.assert_allclose(out, attend(case, "reference", **FEATURES["all"]), **BF16)


@pytest.mark.parametrize("backend", [in_matrix(name) for name in sorted(BACKENDS)])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_paged_attention_padding_queries_and_empty_rows_are_zeros(num_queries, backend):
    case = make_case(num_queries)
    padding = np.arange(num_queries) >= case.arrays["q_len"][:, None]
    q = np.where(padding[..., None, None], np.nan, case.arrays["q"])
    out = attend(case, backend, sinks=True, q=q)
    assert np.isfinite(out).all()
    assert not out[padding].any()
    assert not out[case.arrays["kv_len"] == 0].any()
    assert out[~padding].all(axis=(-1, -2)).any()


@pytest.mark.parametrize("backend", [in_matrix(name) for name in sorted(BACKENDS)])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_paged_attention_page_numbers_and_row_order_change_no_bit(num_queries, backend):
    case = make_case(num_queries)
    expected = attend(case, backend)
    order = np.random.default_rng(1).permutation(len(KV_LENS))
    shuffle = np.random.default_rng(2).permutation(case.arrays["k_pages"].shape[0])  # new page number -> old
    changed = {name: case.arrays[name][order] for name in ("q", "kv_len", "q_len")}
    changed["page_table"] = np.argsort(shuffle)[case.arrays["page_table"][order]]
    changed |= {name: case.arrays[name][shuffle] for name in ("k_pages", "v_pages")}
    np.testing.assert_array_equal(attend(case, backend, **changed), expected[order])


@pytest.mark.parametrize("num_queries", [1, 3])
def test_paged_attention_xla_groups_of_rows_equal_one_group(num_queries, monkeypatch):
    case = make_case(num_queries)
    expected = attend(case, "xla", **FEATURES["all"])
    monkeypatch.setattr(xla, "_MAX_ROWS", 2)  # seven rows: the last group is padded
    call = functools.partial(paged_attention, scale=SCALE, **FEATURES["all"] | {"sinks": jnp.asarray(case.sinks)})
    arrays = [jnp.asarray(a, jnp.float32 if a.dtype == np.float32 else jnp.int32) for a in case.arrays.values()]
    np.testing.assert_allclose(jax.jit(call)(*arrays), expected, **F32)


@pytest.mark.parametrize("backend", [in_matrix(name) for name in sorted(BACKENDS)])
def test_paged_attention_large_scores_stay_finite(backend):
    case = make_case(1)
    out = attend(case, backend, q=case.arrays["q"] * 1e4)
    assert np.isfinite(out).all()
    assert np.abs(out[-1]).max() > 0


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_paged_attention_under_shard_map_equals_plain_call(backend):
    case = make_case(1)
    arrays = [jnp.asarray(a, jnp.float32 if a.dtype == np.float32 else jnp.int32) for a in case.arrays.values()]
    mesh = jax.make_mesh((1,), ("tp",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    heads, none = jax.P(None, None, "tp"), jax.P()
    pages = jax.P(None, "tp")
    call = functools.partial(paged_attention, scale=SCALE, backend=backend)
    specs = (heads, pages, pages, none, none, none)
    sharded = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False))
    np.testing.assert_array_equal(sharded(*arrays), attend(case, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"backend": "cuda"}, "choose one of"), ({"window": 0}, "at least 1"), ({"heads": 3}, "do not divide")],
)
def test_paged_attention_bad_argument_raises(change, message):
    arrays = make_case(1).arrays | {}
    arrays["q"] = arrays["q"][:, :, : change.pop("heads", None)]
    with pytest.raises(ValueError, match=message):
        paged_attention(*map(jnp.asarray, arrays.values()), scale=SCALE, **change)
    tokens, *pages = (jnp.asarray(arrays[name]) for name in ("q", "k_pages", "v_pages"))
    with pytest.raises(ValueError, match=message):
        segmented_attention(tokens[:, 0], *pages, [], scale=SCALE, **{"backend": "pallas", **change})


def long_prompt():
    """150 tokens behind 40 that are cached, in rows of 16: the prefill kernel's first tiles of keys need no mask."""
    rng = np.random.default_rng(3)
    starts = 40 + 16 * np.arange(10)
    lengths = np.minimum(190 - starts, 16)
    shape = (NUM_KV_HEADS, 16, HEAD_DIM)  # pages of 16
    arrays = {
        "q": rng.normal(size=(10, 16, 2 * NUM_KV_HEADS, HEAD_DIM)),
        "k_pages": rng.normal(size=(14, *shape)),
        "v_pages": rng.normal(size=(14, *shape)),
        "page_table": np.tile(rng.permutation(13)[:12] + 1, (10, 1)),
        "kv_len": starts + lengths,
        "q_len": lengths,
    }
    return SimpleNamespace(arrays=arrays, sinks=np.zeros(2 * NUM_KV_HEADS))


@pytest.mark.parametrize("features", ["plain", *(pytest.param(name, marks=MATRIX) for name in ("window", "softcap"))])
def test_paged_attention_pallas_long_prompt_equals_reference(features):
    case, sequence_id = long_prompt(), jnp.full(10, 3)
    expected = attend(case, "reference", **FEATURES[features])
    np.testing.assert_allclose(attend(case, "pallas", sequence_id=sequence_id, **FEATURES[features]), expected, **F32)


def test_paged_attention_pallas_splits_of_one_row_equal_reference(monkeypatch):
    monkeypatch.setattr(pallas, "_DECODE_TILE", 16)
    case = make_case(1, kv_lens=(TABLE_WIDTH * PAGE_SIZE, 3))
    call = functools.partial(paged_attention, scale=SCALE, window=33, sinks=jnp.asarray(case.sinks), backend="pallas")
    arrays = [jnp.asarray(a, jnp.float32 if a.dtype == np.float32 else jnp.int32) for a in case.arrays.values()]
    # Jitted anew, since the function that was traced before knows nothing of the new tile.
    monkeypatch.setattr(
        pallas, "_decode", jax.jit(pallas._decode.__wrapped__, static_argnames=("settings", "interpret"))
    )
    found = jax.jit(call)(*arrays)
    assert pallas._num_splits(4, TABLE_WIDTH * PAGE_SIZE) == 2
    np.testing.assert_allclose(found, attend(case, "reference", window=33, sinks=True), **F32)


@pytest.mark.parametrize(
    ("num_blocks", "max_len", "expected"),
    [(8, 1152, 16), (8, 8320, 32), (256, 8320, 1), (1024, 131072, 16), (1, 64, 1), (1, 8, 1)],
)
def test_num_splits_fill_the_gpu_and_are_never_too_long(num_blocks, max_len, expected):
    assert pallas._num_splits(num_blocks, max_len) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", *(pytest.param(d, marks=MATRIX) for d in ("float32", "float16"))])
@pytest.mark.parametrize(
    ("num_rows", "num_queries", "group", "head_dim", "num_kernels"),
    [(2, 1, 4, 128, 2), (256, 1, 8, 64, 1), (2, 5, 7, 80, 2), (9, 16, 1, 96, 1), (8, 16, 4, 256, 1)],
)
def test_paged_attention_pallas_lowers_for_gpu(num_rows, num_queries, group, head_dim, num_kernels, dtype):
    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    pages = shape(30, 2, 16, head_dim, dtype=dtype)
    row = shape(num_rows)
    q = shape(num_rows, num_queries, 2 * group, head_dim, dtype=dtype)
    call = functools.partial(paged_attention, scale=SCALE, window=50, sink_tokens=4, softcap=2.0, backend="pallas")
    text = lowered_for_gpu(call, q, pages, pages, shape(num_rows, 40), row, row)
    assert count_kernels(text) == num_kernels and "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "xla"),
        ("gpu", None, "pallas"),
        ("gpu", "8.0", "pallas"),
        ("gpu", "7.5", "xla"),
        ("gpu", "gfx942", "xla"),
    ],
)
def test_choose_backend_auto_is_pallas_where_triton_compiles(platform, capability, expected):
    assert choose_backend("auto", platform, capability) == expected
    assert choose_backend("reference", platform, capability) == "reference"


def test_choose_backend_unknown_name_lists_choices():
    with pytest.raises(ValueError, match="auto, reference, xla, pallas"):
        choose_backend("flash", "cpu")
