"""XLA's persistent compilation cache, on by default, private to the user.

Owns: where the cache lies, and the check that no other user can write to it: cached programs are run, so whoever can
write to the cache can run code as this user.
Does not know: programs.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import jax

logger = logging.getLogger(__name__)


def cache_directory() -> Path:
    """The directory of the cache: JAXINFER_CACHE_DIR if set, else jaxinfer/xla under XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("JAXINFER_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer" / "xla"


def enable_persistent_cache() -> None:
    """Turns the cache on, unless the user has configured one.

    A directory that cannot be made, or that other users own or can write to, is not used; a warning in the log says so.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat()
    except OSError as error:
        logger.warning("compiling without a persistent cache: %s (set JAXINFER_CACHE_DIR to a writable place)", error)
        return
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        logger.warning("compiling without a persistent cache: %s is writable by others", directory)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
