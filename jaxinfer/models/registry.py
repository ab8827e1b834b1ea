"""Which architecture is which family.

Owns: the Decoder protocol that the wrapper drives, and the table of families.
Does not know: any family's insides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.layers.attention import TokenBatch
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.models.layout import Layout


@runtime_checkable
class Decoder(Protocol):
    """The per-shard forward pass of a decoder-only model (a Flax nnx module)."""

    def embed(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token ids, and where they stand in their texts, to the residual stream."""
        ...

    def run_layers(
        self, x: Float[Array, "T D"], caches: Sequence[LayerCache], batch: TokenBatch
    ) -> tuple[Float[Array, "T D"], list[LayerCache]]:
        """This stage's layers."""
        ...

    def final_norm(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """What stands between the last layer and the head."""
        ...

    @property
    def head(self) -> VocabularyEmbedding:
        """The module that scores hidden states."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily:
    """One family: how to read its config, build it and find its tensors.

    Args:
      parse_config: config.json's fields -> ModelConfig.
      build: (config, layout) -> nnx module with the Decoder protocol.
      tensor_names: parameter path -> the checkpoint tensors stacked in it along the output features, one a part or a
        single one that holds all parts; "{layer}" and "{expert}" stand for their numbers (a parameter of
        all experts has the tensors of each, one expert after the other).
      transposed: paths of parameters that checkpoints store [in, out].
      base_prefix: what the names of a checkpoint without a head lack at the beginning.
      ignored: regular expression of tensors (without base_prefix) that are no parameters.
    """

    parse_config: Callable[[Mapping[str, Any]], ModelConfig]
    build: Callable[[ModelConfig, Layout], Any]
    tensor_names: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    base_prefix: str = ""
    ignored: str | None = None


_MODULES = {
    "GPT2LMHeadModel": "jaxinfer.models.gpt2",
    "Gemma2ForCausalLM": "jaxinfer.models.gemma2",
    "Gemma3ForCausalLM": "jaxinfer.models.gemma3",
    "LlamaForCausalLM": "jaxinfer.models.llama",
    "MistralForCausalLM": "jaxinfer.models.mistral",
    "MixtralForCausalLM": "jaxinfer.models.mixtral",
    "Olmo2ForCausalLM": "jaxinfer.models.olmo2",
    "Phi3ForCausalLM": "jaxinfer.models.phi3",
    "Qwen2ForCausalLM": "jaxinfer.models.qwen2",
    "Qwen3ForCausalLM": "jaxinfer.models.qwen3",
    "Qwen3MoeForCausalLM": "jaxinfer.models.qwen3_moe",
}


# Families from outside the package, by architecture; filled by register_model only.
_REGISTERED: dict[str, ModelFamily] = {}


def register_model(architecture: str, family: ModelFamily) -> None:
    """Makes a family from outside the package known to everything that reads a config.json.

    Args:
      architecture: its name in config.json's `architectures`.
      family: how to read its config, build it and find its tensors. The ModelConfig its parse_config returns must
        carry this architecture.

    Raises:
      TypeError: architecture is no string, or family no ModelFamily.
      ValueError: the name is taken by another family.
    """
    if not isinstance(architecture, str) or not isinstance(family, ModelFamily):
        raise TypeError(f"register_model needs a str and a ModelFamily, got {architecture!r} and {family!r}")
    if architecture in _MODULES or _REGISTERED.get(architecture, family) is not family:
        raise ValueError(f"architecture {architecture!r} is taken; register the family under another name")
    _REGISTERED[architecture] = family


def known_architectures() -> list[str]:
    """Names that find_family knows, sorted."""
    return sorted([*_MODULES, *_REGISTERED])


def find_family(architecture: str) -> ModelFamily:
    """The family of an architecture name, as in config.json's `architectures`.

    Raises:
      ValueError: nobody knows it; the message lists the known ones.
    """
    if architecture in _REGISTERED:
        return _REGISTERED[architecture]
    if architecture not in _MODULES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(known_architectures())}")
    return importlib.import_module(_MODULES[architecture]).FAMILY


def parse_model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json of any known family.

    Raises:
      ValueError: no or an unknown architecture, remote code, numbers that do not fit, or a family whose config names
        another architecture.
    """
    if "auto_map" in fields:
        raise ValueError("config.json asks for remote code (auto_map), which is never executed; remove the field")
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"config.json must name one architecture, got {architectures!r}")
    config = find_family(architectures[0]).parse_config(fields)
    if config.architecture != architectures[0]:
        raise ValueError(
            f"the family of {architectures[0]!r} returned a ModelConfig of architecture {config.architecture!r}; "
            "its parse_config must keep the name, or another family would be built"
        )
    return config
