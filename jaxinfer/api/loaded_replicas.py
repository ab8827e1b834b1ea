"""The replicas of a model that this process runs or leads.

Owns: which of them are loaded here, and what runs requests on all of them.
Does not know: tokenizers, text.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.api.replicas import ReplicatedRunner
from jaxinfer.api.runner import LocalRunner, Runner
from jaxinfer.api.shared_engine import SharedEngine
from jaxinfer.api.shared_runners import FollowingRunner, LeadingRunner
from jaxinfer.checkpoint.store import TensorStore
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.distributed import LeaderRun
from jaxinfer.records.provenance import Provenance
from jaxinfer.text.controller import TextGenerationController


class LoadedReplicas:
    """All replicas of a model, or those of which this process holds a part if it follows in a run.

    Args:
      model_config, store, config: as LoadedEngine's.
      shared: the engine as all processes of a run hold it; None if this process runs alone.

    Raises:
      As LoadedEngine.
    """

    def __init__(
        self, model_config: ModelConfig, store: TensorStore, config: EngineConfig, shared: SharedEngine | None
    ):
        self._config = config
        self._shared = shared
        if shared is None:
            parts = dict.fromkeys(range(config.data_parallel_size))
        else:
            parts = {part.replica: part for part in shared.replicas()}
        self.engines = [
            LoadedEngine(model_config, store, config, replica=number, shared=part) for number, part in parts.items()
        ]
        num_pages = min(loaded.wrapper.num_pages for loaded in self.engines)
        if shared is not None:
            num_pages = shared.least("KV pages of all replicas", num_pages)
        for loaded in self.engines:  # whichever replica gets a request, and whichever process checks it
            loaded.engine.lower_page_limit(num_pages)
        self.longest_request = self.engines[0].engine.longest_request
        """Tokens of prompt and output that one request can have on every replica; the same on all processes."""

    def make_runner(self, controllers: Sequence[TextGenerationController], provenance: Provenance) -> Runner:
        """What runs requests.

        Args:
          controllers: one for each of the engines.
          provenance: of the outputs.
        """
        shared = self._shared
        if shared is None:
            return self._make_local_runner(controllers)
        if isinstance(shared.run, LeaderRun):
            return LeadingRunner(self._make_local_runner(controllers), shared.run, shared.number)
        return FollowingRunner(self.engines[0].stats(), shared.run, shared.number, provenance)

    def _make_local_runner(self, controllers: Sequence[TextGenerationController]) -> Runner:
        runners = [LocalRunner(*pair) for pair in zip(self.engines, controllers, strict=True)]
        return runners[0] if len(runners) == 1 else ReplicatedRunner(runners, self._config)
