"""LoadedEngine: an engine whose model, and draft model if there is one, are loaded onto the devices.

Owns: the order of loading, the checks that a draft model suits the model, warming up and closing both together.
Does not know: tokenizers, text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.api.shared_engine import SharedReplica
from jaxinfer.checkpoint import directory
from jaxinfer.checkpoint.store import SafetensorsStore, TensorStore
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.engine.draft_model import DraftModel
from jaxinfer.engine.drafting import PROMPT_LOOKUP, Drafter, PromptLookup
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.engine.stats import EngineStats
from jaxinfer.models.registry import parse_model_config
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.assembly import assemble, context_length, footprint
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.jax_start import start_jax
from jaxinfer.wrappers.memory import Footprint


class LoadedEngine:
    """An engine ready to run requests. Making one starts JAX, if it does not run yet, and loads the weights.

    Args:
      model_config: the model's architecture and sizes.
      store: the model's weights.
      config: the engine's settings.
      replica: which of config.data_parallel_size replicas of the model this one runs, from 0.
      shared: the replica as the processes of a run hold it; None if this process runs alone.

    Raises:
      FileNotFoundError: there is no such draft model.
      ValueError: the weights do not match model_config, the model cannot be laid out on the mesh, or there is no memory
        for KV pages; or the draft model has another vocabulary or too short a context.
      GatherError: another process that holds a part of the replica could not load it.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        store: TensorStore,
        config: EngineConfig,
        *,
        replica: int = 0,
        shared: SharedReplica | None = None,
    ):
        self.model_config = model_config
        self.is_open = True
        """Whether the model is still on the devices, or asleep."""
        start_jax(gpu_memory_utilization=config.gpu_memory_utilization)
        with contextlib.nullcontext() if shared is None else shared.holders.loading(f"loading replica {replica}"):
            self.max_model_len = context_length(config, model_config)
            draft = find_draft(config, model_config, max_model_len=self.max_model_len)
            # A missing file is noticed before the model is loaded.
            draft_store = None if draft is None else draft.open()
            beside = None if draft is None else footprint(draft.model_config, draft.config)
            self.wrapper = _load(model_config, store, config, replica=replica, shared=shared, beside=beside)
            self._draft_wrapper: AbstractModelInferenceWrapper | None = None
            if draft is not None and draft_store is not None:  # the draft model gets as many KV pages as the model
                draft_config = dataclasses.replace(draft.config, num_kv_pages=self.wrapper.num_pages)
                self._draft_wrapper = _load(
                    draft.model_config, draft_store, draft_config, replica=replica, shared=shared, is_draft=True
                )
        drafter = _make_drafter(config, self._draft_wrapper)
        self.engine = DynamicEngine(self.wrapper, config, max_model_len=self.max_model_len, drafter=drafter)

    def warmup(self, *, background: bool = False) -> None:
        """Compiles every program that a request can need; background as LLM.warmup's."""
        for wrapper in self._wrappers:
            wrapper.warmup(background=background)

    def stats(self) -> EngineStats:
        """The engine's statistics; num_compilations counts those of both models."""
        num_compilations = sum(wrapper.num_compilations for wrapper in self._wrappers)
        return dataclasses.replace(self.engine.stats(), num_compilations=num_compilations)

    @property
    def decoder(self) -> DecoderWrapper:
        """The wrapper of the model itself, for what only a process that holds all of the model can do.

        Raises:
          ValueError: several processes hold the model together.
        """
        if not isinstance(self.wrapper, DecoderWrapper):
            raise ValueError("the weights can be read and replaced where one process holds the whole model")
        return self.wrapper

    def sleep(self) -> None:
        """Frees the devices; the weights of the model stay on the host. No request may run."""
        self.engine.flush_prefix_cache()
        self.engine.forget_steps()
        for wrapper in self._wrappers:
            if isinstance(wrapper, DecoderWrapper):
                wrapper.sleep()

    def wake_up(self) -> None:
        """Brings back what sleep has taken from the devices."""
        for wrapper in self._wrappers:
            if isinstance(wrapper, DecoderWrapper):
                wrapper.wake_up()

    def close(self) -> None:
        """Frees device memory; the engine cannot be used afterwards."""
        self.is_open = False
        for wrapper in self._wrappers:
            wrapper.close()

    @property
    def _wrappers(self) -> list[AbstractModelInferenceWrapper]:
        return [wrapper for wrapper in (self.wrapper, self._draft_wrapper) if wrapper is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A draft model that was found and suits its model, but is not loaded yet.

    Args:
      path: its checkpoint directory.
      model_config: its architecture and sizes.
      config: the engine's settings, with max_model_len set to that of the model it drafts for.
    """

    path: Path
    model_config: ModelConfig
    config: EngineConfig

    def open(self) -> SafetensorsStore:
        """Opens its weight files; no tensor is read yet."""
        return SafetensorsStore(directory.weight_files(self.path))


def find_draft(config: EngineConfig, model: ModelConfig, *, max_model_len: int) -> Draft | None:
    """Finds the draft model that the settings name; None if they name none, or prompt lookup, which needs no model.

    Args:
      config: the engine's settings.
      model: the model to draft for.
      max_model_len: the context length of that model, which the draft model must have too.

    Raises:
      FileNotFoundError: there is no such draft model. Its weight files are not looked for yet.
      ValueError: the draft model has another vocabulary or too short a context.
    """
    if config.draft_model is None or config.draft_model == PROMPT_LOOKUP:
        return None
    try:
        path = directory.resolve(config.draft_model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"draft_model: {error}") from error
    draft = parse_model_config(directory.read_json(path / "config.json"))
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"draft_model must have the vocabulary of the model, {model.vocab_size} tokens, got "
            f"{draft.vocab_size} in {config.draft_model}; use a smaller model of the same family"
        )
    config = dataclasses.replace(config, max_model_len=max_model_len)
    try:
        context_length(config, draft)
    except ValueError as error:
        raise ValueError(f"draft_model {config.draft_model}: {error}; lower max_model_len") from error
    return Draft(path=path, model_config=draft, config=config)


def _load(
    model_config: ModelConfig,
    store: TensorStore,
    config: EngineConfig,
    *,
    replica: int,
    shared: SharedReplica | None,
    beside: Footprint | None = None,
    is_draft: bool = False,
) -> AbstractModelInferenceWrapper:
    """Loads a model onto the devices of this process, and makes it part of the run if there is one."""
    if shared is not None and not shared.holders.are_here:
        return shared.join_remote(model_config, config, is_draft=is_draft)
    decoder = assemble(
        model_config,
        store,
        config,
        beside=beside,
        role="draft model" if is_draft else "model",
        replica=replica,
        holders=None if shared is None else shared.holders,
    )
    return decoder if shared is None else shared.join(decoder, model_config, is_draft=is_draft)


def _make_drafter(config: EngineConfig, draft_wrapper: AbstractModelInferenceWrapper | None) -> Drafter | None:
    if draft_wrapper is not None:
        return DraftModel(draft_wrapper, config.num_draft_tokens)
    return PromptLookup(config.num_draft_tokens) if config.draft_model == PROMPT_LOOKUP else None
