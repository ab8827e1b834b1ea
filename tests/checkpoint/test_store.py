"""Stores: the bytes asked for, each counted once, and errors that name file and tensor."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint import store
from jaxinfer.checkpoint.store import MemoryStore, SafetensorsStore, TensorStore

WHOLE = (slice(0, 6), slice(0, 4))
FLOATS = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def table(dtype="float32") -> np.ndarray:
    return (np.arange(24).reshape(6, 4) / 8).astype(dtype)


def saved(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture(params=["safetensors", "memory", "memory_jax"])
def one_table(request, tmp_path: Path) -> TensorStore:
    if request.param == "safetensors":
        return SafetensorsStore([saved(tmp_path / "a.safetensors", table=table())])
    return MemoryStore({"table": table() if request.param == "memory" else jnp.asarray(table())})


@pytest.mark.parametrize(
    "index", [WHOLE, (slice(2, 5), slice(0, 4)), (slice(1, 6), slice(1, 3)), (slice(3, 3), slice(0, 4))]
)
@pytest.mark.parametrize("block_bytes", [1, 40, 2**20])
def test_read_any_slice_equals_array(one_table: TensorStore, index, block_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(store, "_BLOCK_BYTES", block_bytes)
    assert isinstance(one_table, TensorStore)
    assert list(one_table.names()) == ["table"] and one_table.shape("table") == (6, 4)
    out = np.full(table()[index].shape, -1, np.float32)
    one_table.read("table", index, out)
    assert np.array_equal(out, table()[index])
    if isinstance(one_table, SafetensorsStore):
        assert one_table.bytes_read == out.nbytes


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_read_float_dtypes_casts_to_out(source: str, target: str, tmp_path: Path) -> None:
    tensors = SafetensorsStore([saved(tmp_path / "a.safetensors", table=table(FLOATS[source]))])
    out = np.zeros((6, 4), FLOATS[target])
    tensors.read("table", WHOLE, out)
    assert np.array_equal(out, table(FLOATS[target]))  # the values are exact in every dtype
    assert tensors.bytes_read == table(FLOATS[source]).nbytes


@pytest.mark.parametrize("in_file", [True, False])
def test_read_value_beyond_dtype_raises(in_file: bool, tmp_path: Path) -> None:
    values = np.full((2, 2), 1e6, np.float32)
    where = tmp_path / "a.safetensors"
    tensors = SafetensorsStore([saved(where, big=values)]) if in_file else MemoryStore({"big": values})
    with pytest.raises(ValueError, match=f"tensor big in {where if in_file else 'params'} holds values beyond float16"):
        tensors.read("big", (slice(0, 2), slice(0, 2)), np.zeros((2, 2), np.float16))


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool"])
def test_read_integer_tensor_raises(dtype: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", table=table(dtype))
    tensors = SafetensorsStore([path])
    with pytest.raises(ValueError, match=f"tensor table in {path} is .*; supported: F64, F32, F16, BF16"):
        tensors.read("table", WHOLE, np.zeros((6, 4), np.float32))


@pytest.mark.parametrize("values", [table("int64"), table("bool"), jnp.asarray(table("int8")), [[1, 2], [3, 4]]])
def test_read_integers_in_memory_raises(values) -> None:
    with pytest.raises(ValueError, match=r"tensor table in params is (int|bool).*, expected floating-point"):
        MemoryStore({"table": values}).read("table", (slice(0, 2), slice(0, 2)), np.zeros((2, 2), np.float32))


def test_read_nested_lists_of_floats_are_arrays() -> None:
    out = np.zeros((1, 2), np.float32)
    MemoryStore({"table": [[1.0, 2.0], [3.0, 4.0]]}).read("table", (slice(1, 2), slice(0, 2)), out)
    assert out.tolist() == [[3.0, 4.0]]


def test_open_several_files_finds_every_tensor(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{name}.safetensors", **{name: table()}) for name in "ab"]
    tensors = SafetensorsStore(paths)
    assert sorted(tensors.names()) == ["a", "b"]
    assert [tensors.where(name) for name in "ab"] == [str(path) for path in paths]


def test_open_name_in_two_files_raises(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{name}.safetensors", table=table()) for name in "ab"]
    with pytest.raises(ValueError, match=f"tensor table is in both {paths[0]} and {paths[1]}"):
        SafetensorsStore(paths)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent"])
def test_open_damaged_file_names_it(damage: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", table=table())
    whole = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes({"truncated": whole[:-8], "garbage": b"\x80\x04nonsense" * 9, "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{path} is not a complete safetensors file"):
        SafetensorsStore([path])
