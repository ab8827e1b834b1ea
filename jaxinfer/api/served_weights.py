"""The weights of an LLM: reading, replacing, putting to sleep, saving and loading them.

Owns: what has to happen around a change (requests wait, the prefix cache is flushed, the version grows).
Does not know: how arrays lie on a mesh, prompts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxinfer.api.export import export_checkpoint
from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.api.runner import Runner
from jaxinfer.checkpoint import orbax
from jaxinfer.config.validation import require_choice
from jaxinfer.errors import EngineClosedError
from jaxinfer.text.controller import TextGenerationController
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.parameters import as_tree, replacements

Pause = Literal["wait", "abort"]
PAUSES = ("wait", "abort")
_ASLEEP = "the LLM sleeps; call wake_up() first"


class ServedWeights:
    """The weights of all replicas of a model, which one process holds; any thread may use it.

    Args:
      engines: the replicas.
      runner: runs their requests.
    """

    def __init__(self, engines: Sequence[LoadedEngine], runner: Runner):
        self._engines = engines
        self._runner = runner
        self._changing = threading.RLock()  # one change after the other
        self.version = 0
        """How often the weights were replaced."""

    @property
    def params(self) -> dict[str, Any]:
        """A replica's parameters as nested dicts; see LLM.params."""
        return as_tree(self._decoder.params)

    def update(self, tree: Mapping[str, Any], *, only: Callable[[str], bool] | None, pause: Pause) -> int:
        """Replaces parameters and returns the new version; see LLM.update_weights."""
        require_choice("pause", pause, PAUSES)
        if only is not None and not callable(only):
            raise TypeError(f"only must be a function of a parameter's name, got {only!r}")
        with self._changing:
            first = self._decoder
            new = replacements(tree, first.param_shapes, only=only)  # before anybody has to wait
            version = self.version + 1

            def replace(loaded: LoadedEngine, controller: TextGenerationController) -> None:
                decoder, shapes = loaded.decoder, loaded.decoder.param_shapes
                own = {
                    name: array if decoder is first else jax.device_put(array, shapes[name].sharding)
                    for name, array in new.items()
                }
                decoder.replace_params(own)
                loaded.engine.flush_prefix_cache()
                controller.weights_version = self.version = version

            self._runner.between_requests(replace, abort=pause == "abort")
            return version

    def sleep(self, *, pause: Pause) -> None:
        """Frees the devices; see LLM.sleep."""
        require_choice("pause", pause, PAUSES)
        for engine in self._engines:
            _ = engine.decoder  # several processes cannot sleep
        with self._changing:
            self._runner.between_requests(
                lambda loaded, _: loaded.sleep(), abort=pause == "abort", refuse=EngineClosedError(_ASLEEP)
            )

    def wake_up(self) -> None:
        """Takes requests again; see LLM.wake_up."""
        with self._changing:
            self._runner.between_requests(lambda loaded, _: loaded.wake_up())

    def save(self, directory: str | Path) -> None:
        """Writes the parameters with Orbax; see LLM.save_weights."""
        with self._changing:
            orbax.save(directory, self.params)

    def load(self, directory: str | Path, *, pause: Pause) -> int:
        """Replaces the parameters by saved ones; see LLM.load_weights."""
        with self._changing:
            like = as_tree(self._decoder.param_shapes)
            return self.update(orbax.load(directory, like=like), only=None, pause=pause)

    def export(self, directory: str | Path, config_fields: Mapping[str, Any], *, source: Path | None) -> None:
        """Writes a checkpoint; see LLM.export."""
        with self._changing:
            export_checkpoint(directory, self._first, config_fields, source=source)

    @property
    def _decoder(self) -> DecoderWrapper:
        return self._first.decoder

    @property
    def _first(self) -> LoadedEngine:
        """The first replica that has not stopped; the others are copies of it."""
        if not self._runner.is_running:
            raise EngineClosedError("the LLM is closed")
        return next((engine for engine in self._engines if engine.is_open), self._engines[0])
