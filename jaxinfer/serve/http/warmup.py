"""Warmup: compiles programs while the server answers already.

Owns: the thread, and whether it is done.
Does not know: what is compiled.
"""

from __future__ import annotations

import logging
import threading

from jaxinfer.api.llm import LLM
from jaxinfer.errors import EngineClosedError

logger = logging.getLogger("jaxinfer")


class Warmup:
    """Compiles what requests need, so that none has to wait.

    Args:
      llm: the model.
      wanted: whether to do it at all.
    """

    def __init__(self, llm: LLM, *, wanted: bool):
        self._llm = llm
        self.is_done = not wanted
        """Whether requests find their programs compiled."""
        if wanted:
            threading.Thread(target=self._run, name="jaxinfer-warmup", daemon=True).start()

    def _run(self) -> None:
        try:
            self._llm.warmup(background=True)
        except EngineClosedError:
            return
        except Exception:  # whatever it is, the server answers requests, only later
            logger.exception("the warm-up failed; requests wait for their programs")
        self.is_done = True
