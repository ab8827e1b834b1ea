"""Saves and loads trees of arrays in Orbax's format; the only module that imports Orbax.

Owns: the form of a saved tree, errors about files.
Does not know: what the arrays are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

_MARK = "_CHECKPOINT_METADATA"
"""A file that every checkpoint of Orbax has."""


def save(directory: str | Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays to a new directory; each device writes what it holds.

    Raises:
      FileExistsError: there is such a directory already.
    """
    from orbax.checkpoint import StandardCheckpointer  # takes a second, which only those who save should wait

    path = Path(directory).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another directory for the weights or remove it")
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(path, dict(tree))


def load(directory: str | Path, *, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what save has written, as a like tree of jax.ShapeDtypeStruct with shardings says.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: it holds another tree, or arrays of other shapes, or a file in it is damaged or missing.
    """
    from orbax.checkpoint import StandardCheckpointer

    path = Path(directory).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no saved weights at {path}")
    shapes = dict(like)
    with StandardCheckpointer() as checkpointer:
        with _naming_damage(path):
            metadata = checkpointer.metadata(path).item_metadata if (path / _MARK).exists() else None
        if metadata is None:
            raise ValueError(
                f"{path} was not written by save_weights, or is damaged; LLM(directory) loads what export has written"
            )
        saved = {_name(key): entry for key, entry in _leaves(metadata.tree)}
        wanted = {_name(key): entry for key, entry in _leaves(shapes)}
        for name, entry in wanted.items():
            found = saved.get(name)
            if found is None or tuple(found.shape) != entry.shape:
                what = "no such array" if found is None else str(list(found.shape))
                raise ValueError(
                    f"{name} must have shape {list(entry.shape)}, got {what} in {path}; weights are saved as they lie "
                    "on a mesh, so load them into an LLM of the same model and parallel sizes (export for others)"
                )
        with _naming_damage(path):
            return checkpointer.restore(path, shapes)


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # For arrays that it cannot read, Orbax raises an Exception of no kind, with TensorStore's whole state as text.
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise
        reason = str(error).partition(". See full")[0]
        raise ValueError(f"{path} is damaged or incomplete, save the weights again ({reason})") from error


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(path: Any) -> str:
    return ".".join(str(key.key) for key in path)
