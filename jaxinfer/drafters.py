"""Who proposes tokens, as the engine's settings say.

Owns: loading a draft model, the checks that it fits the model it drafts for.
Does not know: how drafts are made or verified.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxinfer.checkpoint import directory
from jaxinfer.checkpoint.store import SafetensorsStore
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.engine.draft_model import DraftModel
from jaxinfer.engine.drafting import PROMPT_LOOKUP, Drafter, PromptLookup
from jaxinfer.models.registry import parse_model_config
from jaxinfer.wrappers.assembly import Footprint, assemble, context_length, footprint
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper


@dataclass(frozen=True, slots=True)
class DraftCheckpoint:
    """A draft model that is not loaded yet.

    Args:
      config: its numbers.
      store: its tensors.
    """

    config: ModelConfig
    store: SafetensorsStore

    def footprint(self, config: EngineConfig) -> Footprint:
        """What it will take of a device's memory."""
        return footprint(self.config, config)

    def load(self, config: EngineConfig, *, num_pages: int) -> DecoderWrapper:
        """Its wrapper, with pages beside those of the model it drafts for."""
        return assemble(self.config, self.store, dataclasses.replace(config, num_kv_pages=num_pages))


def find_draft_checkpoint(config: EngineConfig, model: ModelConfig, *, max_model_len: int) -> DraftCheckpoint | None:
    """The draft model that the settings name, None if they name none.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: it has another vocabulary, or its context is shorter than max_model_len.
    """
    if config.draft_model is None or config.draft_model == PROMPT_LOOKUP:
        return None
    path = directory.resolve(config.draft_model)
    draft = parse_model_config(directory.read_json(path / "config.json"))
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"draft_model must have the vocabulary of the model, {model.vocab_size} tokens, got "
            f"{draft.vocab_size} in {config.draft_model}; use a smaller model of the same family"
        )
    try:
        context_length(dataclasses.replace(config, max_model_len=max_model_len), draft)
    except ValueError as error:
        raise ValueError(f"draft_model {config.draft_model}: {error}; lower max_model_len") from error
    return DraftCheckpoint(draft, SafetensorsStore(directory.weight_files(path)))


def make_drafter(config: EngineConfig, draft_wrapper: DecoderWrapper | None) -> Drafter | None:
    """The drafter that the settings ask for.

    Args:
      config: the engine's settings.
      draft_wrapper: of the draft model, if they name one.
    """
    if draft_wrapper is not None:
        return DraftModel(draft_wrapper, config.num_draft_tokens)
    return PromptLookup(config.num_draft_tokens) if config.draft_model == PROMPT_LOOKUP else None
