"""jaxinfer: LLM text generation on GPU meshes in JAX and Flax.

The public names, which public_names.py lists, are imported when the first of them is used. They bring JAX and Flax,
which take a second to import and which `jaxinfer --help` does not need.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.public_names import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        names = import_module("jaxinfer.public_names")
        for public in ("__all__", *names.__all__):
            globals().setdefault(public, getattr(names, public))  # what a test has put in its place stays there
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module("jaxinfer.public_names").__all__})


__version__ = version("jaxinfer")
