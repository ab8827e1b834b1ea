"""A process of a run without a script of its own: it makes its part of every LLM that process 0 makes.

Owns: the loop of `jaxinfer follow`.
Does not know: what the leader computes.
"""

from __future__ import annotations

import contextlib
import json
import logging

from jaxinfer.api.llm import LLM
from jaxinfer.api.shared_engine import OPENING
from jaxinfer.communication.process_group import GatherError
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.distributed import FollowerRun
from jaxinfer.errors import EngineClosedError, ProcessLostError

logger = logging.getLogger("jaxinfer")


def follow_run(run: FollowerRun) -> bool:
    """Loads every model that the leader loads, with the leader's settings, and takes part in its steps until it ends.

    The leader names checkpoints by directory or hub id, which have to lead to the same files here.

    Returns:
      Whether all models could be loaded here.

    Raises:
      ProcessLostError: another process was lost or failed.
    """
    all_loaded = True
    while True:
        try:
            description = json.loads(run.calls.peek_opened())
        except ProcessLostError:
            raise
        except EngineClosedError:
            return all_loaded
        try:
            if description["model"] is None:
                raise ValueError("process 0 has weights in memory (LLM.from_params); run its script on all processes")
            EngineConfig(**description["engine"])
        except Exception as error:
            _refuse(run, error)
            all_loaded = False
            continue
        try:
            llm = LLM(description["model"], tokenizer=description["tokenizer"], **description["engine"])
        except GatherError:
            continue  # another process says what is wrong; the leader may go on and make another LLM
        except ProcessLostError:
            raise
        except Exception as error:
            logger.error("%s", error)
            all_loaded = False
            continue
        llm.close()  # makes no calls; its part of the steps goes on until the leader closes it


def _refuse(run: FollowerRun, error: Exception) -> None:
    """Lets the leader's LLM fail with an error of this process."""
    logger.error("%s", error)
    run.calls.next_opened()
    with contextlib.suppress(type(error)), run.group.together(OPENING):
        raise error
