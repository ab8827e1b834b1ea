"""Starts a small program that works on untrusted input in a child process, without this process's secrets, with limits.

Owns: how such a child process is started, what it inherits, what the operating system lets it do.
Does not know: what the programs do. It imports nothing of the package, because the child process runs this file first.

A child gets none of this process's environment variables (they often hold tokens and passwords) except the few that
Python needs to start. It can write no file, may open few files, and leaves no core dump. On Linux it also gives up the
network if the kernel lets ordinary users create namespaces; in many containers and on other systems it does not, and
the child keeps the network. Nothing here stops a program from reading files that this user may read. On Windows there
are none of these limits.
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
"""Files that the child may have open at once: its three standard streams, and some for modules imported late."""
_FOR_EVERY_PROGRAM = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": NUM_FILES}
_KEPT_VARIABLES = ("PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Environment variables that a child keeps, because some installations of Python do not start without them."""
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def command(program: Path, *arguments: str, limits: Mapping[str, int]) -> list[str]:
    """Makes the command line that runs a program with limits.

    Args:
      program: a Python file with a function main(arguments: list[str]). It is loaded, with all that it imports at the
        top, before the limits apply.
      arguments: passed to main.
      limits: values of limits by their names in Python's module resource, such as RLIMIT_AS in bytes or RLIMIT_CPU in
        seconds; a limit that the system does not know is ignored.
    """
    # -P keeps the folder of this file off sys.path, so that the program cannot import its siblings by accident.
    return [sys.executable, "-P", __file__, json.dumps(dict(limits)), str(program), *arguments]


def environment(import_paths: Iterable[str]) -> dict[str, str]:
    """Makes the environment of a confined program: what Python needs to start, and import_paths as PYTHONPATH."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, import_paths))}


def main() -> None:
    """Loads the program named on the command line, gives up the network, sets the limits and runs the program."""
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
    sys.modules[spec.name] = module  # dataclasses look up the module of their class here
    spec.loader.exec_module(module)
    return module


def _leave_network() -> None:
    """Moves this process into a network namespace of its own, which has no devices, if the kernel allows it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit(name: str, value: int) -> None:
    """Lowers a limit of this process for good; a hard limit that is lower already stays."""
    if resource is None or not hasattr(resource, name):
        return
    number = getattr(resource, name)
    hard = resource.getrlimit(number)[1]
    lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):  # some systems define a limit but cannot set it
        resource.setrlimit(number, (lowered, lowered))


if __name__ == "__main__":
    main()
