"""Runs a small program that works on what nobody has vetted, away from this process's secrets and with limits.

Owns: how such a child process is started, what it inherits, what the operating system lets it do.
Does not know: what the programs do. It imports nothing of the package, for the child process runs this file first.

A child has none of this process's environment variables (tokens and passwords are often there), can write no file, may
have few files open, and leaves no core dump. On Linux it also gives up the network, where the kernel lets users make
namespaces of their own; many containers do not, and other systems have no such call: there the child keeps the network.
Nothing here keeps a program from reading files that this user may read. Windows has none of the limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

try:
    import resource
except ImportError:  # Windows
    resource = None

NUM_FILES = 16
"""Files that may be open at once: the three pipes, and a module or two while Python imports something late."""
_FOR_EVERY_PROGRAM = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": NUM_FILES}
_KEPT_VARIABLES = ("PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Without which some installations' Python does not start."""
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def command(program: Path, *arguments: str, limits: Mapping[str, int]) -> list[str]:
    """The command line of a confined program.

    Args:
      program: a Python file with a function main(arguments: list[str]); what it imports when it is loaded is imported
        before the limits apply.
      arguments: for main.
      limits: by the names of the module resource (RLIMIT_AS, in bytes; RLIMIT_CPU, in seconds, ...); a system that
        does not know one goes without it.
    """
    # -P: the siblings of this file are no modules of the program's.
    return [sys.executable, "-P", __file__, json.dumps(dict(limits)), str(program), *arguments]


def environment(import_paths: Iterable[str]) -> dict[str, str]:
    """The environment variables of a confined program: what Python needs to start, and where modules are found."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, import_paths))}


def main() -> None:
    """Loads the program named on the command line, closes the door behind it and runs it."""
    limits, path, *arguments = sys.argv[1:]
    program = _load(Path(path))
    _leave_network()
    for name, value in (_FOR_EVERY_PROGRAM | json.loads(limits)).items():
        _limit(name, value)
    program.main(arguments)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module they are in
    spec.loader.exec_module(module)
    return module


def _leave_network() -> None:
    """Moves this process into a network without devices, if the kernel lets it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit(name: str, value: int) -> None:
    """Lowers a limit for good, within the one there is."""
    if resource is None or not hasattr(resource, name):
        return
    number = getattr(resource, name)
    hard = resource.getrlimit(number)[1]
    lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # a system that has the name but not the limit
        resource.setrlimit(number, (lowered, lowered))


if __name__ == "__main__":
    main()
