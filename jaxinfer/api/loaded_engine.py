"""An engine with its model on the devices, and with the draft model that the settings name.

Owns: the order of loading, the checks that a draft model fits, the common life of both models.
Does not know: tokenizers, text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.checkpoint import directory
from jaxinfer.checkpoint.store import SafetensorsStore, TensorStore
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.engine.draft_model import DraftModel
from jaxinfer.engine.drafting import PROMPT_LOOKUP, Drafter, PromptLookup
from jaxinfer.engine.dynamic_engine import DynamicEngine, EngineStats
from jaxinfer.models.registry import parse_model_config
from jaxinfer.wrappers.assembly import assemble, context_length, footprint
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.jax_start import start_jax


class LoadedEngine:
    """A model ready to run requests; starts JAX if it does not run yet.

    Args:
      model_config: its numbers.
      store: its tensors.
      config: the engine's settings.

    Raises:
      FileNotFoundError: no such draft model.
      ValueError: tensors that do not fit, a mesh the model cannot be laid out on, no room for KV pages; a draft model
        with another vocabulary or too short a context.
    """

    def __init__(self, model_config: ModelConfig, store: TensorStore, config: EngineConfig):
        start_jax(gpu_memory_utilization=config.gpu_memory_utilization)
        self.max_model_len = context_length(config, model_config)
        self._page_size = config.page_size
        draft = find_draft(config, model_config, max_model_len=self.max_model_len)
        draft_store = None if draft is None else draft.open()  # a missing file must not cost the loading of the model
        beside = None if draft is None else footprint(draft.model_config, draft.config)
        self.wrapper = assemble(model_config, store, config, beside=beside)
        self._draft_wrapper: DecoderWrapper | None = None
        if draft is not None and draft_store is not None:  # with pages beside those of the model it drafts for
            draft_config = dataclasses.replace(draft.config, num_kv_pages=self.wrapper.num_pages)
            self._draft_wrapper = assemble(draft.model_config, draft_store, draft_config, role="draft model")
        drafter = _make_drafter(config, self._draft_wrapper)
        self.engine = DynamicEngine(self.wrapper, config, max_model_len=self.max_model_len, drafter=drafter)

    @property
    def longest_request(self) -> int:
        """Tokens of prompt and output together of the longest request there can be: max_model_len, or all pages."""
        return min(self.max_model_len, self.wrapper.num_pages * self._page_size)

    def warmup(self) -> None:
        """Compiles every program that serving can need."""
        for wrapper in self._wrappers:
            wrapper.warmup()

    def stats(self) -> EngineStats:
        """The engine's, with the compilations of both models."""
        num_compilations = sum(wrapper.num_compilations for wrapper in self._wrappers)
        return dataclasses.replace(self.engine.stats(), num_compilations=num_compilations)

    def close(self) -> None:
        """Frees device memory; the engine cannot be used afterwards."""
        for wrapper in self._wrappers:
            wrapper.close()

    @property
    def _wrappers(self) -> list[DecoderWrapper]:
        return [wrapper for wrapper in (self.wrapper, self._draft_wrapper) if wrapper is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A draft model that is not loaded yet.

    Args:
      path: its directory.
      model_config: its numbers.
      config: the engine's settings, for this model.
    """

    path: Path
    model_config: ModelConfig
    config: EngineConfig

    def open(self) -> SafetensorsStore:
        """Its tensors, of which none is read yet."""
        return SafetensorsStore(directory.weight_files(self.path))


def find_draft(config: EngineConfig, model: ModelConfig, *, max_model_len: int) -> Draft | None:
    """The draft model that the settings name; None if they name none, or prompt lookup.

    Args:
      config: the engine's settings.
      model: the model to draft for.
      max_model_len: its context.

    Raises:
      FileNotFoundError, ValueError: as LoadedEngine, but for missing weights.
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


def _make_drafter(config: EngineConfig, draft_wrapper: DecoderWrapper | None) -> Drafter | None:
    if draft_wrapper is not None:
        return DraftModel(draft_wrapper, config.num_draft_tokens)
    return PromptLookup(config.num_draft_tokens) if config.draft_model == PROMPT_LOOKUP else None
