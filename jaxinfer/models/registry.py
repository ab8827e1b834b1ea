"""The table of model families, by the architecture name in a checkpoint's config.json.

Owns: the Decoder protocol, which every family's model follows and wrappers/ calls, and the table of families.
Does not know: how a family reads its config or what its model computes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxinfer.config.model_config import ModelConfig
from jaxinfer.layers.attention import TokenBatch
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.layers.kv_cache import LayerCache
from jaxinfer.models.layout import Layout


@runtime_checkable
class Decoder(Protocol):
    """The per-shard forward pass of a decoder-only model (a Flax nnx module)."""

    def embed(self, token_ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Turns token ids, at these positions in their texts, into the residual stream."""
        ...

    def run_layers(
        self, x: Float[Array, "T D"], caches: Sequence[LayerCache], batch: TokenBatch
    ) -> tuple[Float[Array, "T D"], list[LayerCache]]:
        """Runs this pipeline stage's layers; returns the new residual stream and the written caches, one per layer."""
        ...

    def final_norm(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """Applies the norm between the last layer and the head."""
        ...

    @property
    def head(self) -> VocabularyEmbedding:
        """The module that scores hidden states."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily:
    """One model family: how to read its config, build its model and find its tensors in a checkpoint.

    Args:
      parse_config: turns the fields of config.json into a ModelConfig.
      build: turns (config, layout) into an nnx module that follows the Decoder protocol.
      tensor_names: for each parameter path, the checkpoint tensors that it is made of, concatenated along the output
        features. "layers.{layer}.attention.qkv.weight" has three, for queries, keys and values, or one that holds all
        three. "{layer}" stands for the layer's number. "{expert}" stands for an expert's number; such a parameter is
        made of the tensors of expert 0, then those of expert 1, and so on.
      transposed: paths of parameters that checkpoints store as [in, out] instead of [out, in].
      base_prefix: prefix of tensor names that checkpoints saved without a head omit, such as "transformer.".
      ignored: regular expression of tensor names (without base_prefix) that a checkpoint may hold and that are not
        parameters.
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


# Families from outside the package, by architecture. Only register_model adds to it.
_REGISTERED: dict[str, ModelFamily] = {}


def register_model(architecture: str, family: ModelFamily) -> None:
    """Adds a family from outside the package, so that checkpoints whose config.json names it can be loaded.

    Args:
      architecture: the family's name in `architectures` of config.json.
      family: how to read its config, build its model and find its tensors. The ModelConfig that its parse_config
        returns must have this architecture.

    Raises:
      TypeError: architecture is not a string, or family is not a ModelFamily.
      ValueError: another family has this name.
    """
    if not isinstance(architecture, str) or not isinstance(family, ModelFamily):
        raise TypeError(f"register_model needs a str and a ModelFamily, got {architecture!r} and {family!r}")
    if architecture in _MODULES or _REGISTERED.get(architecture, family) is not family:
        raise ValueError(f"architecture {architecture!r} is taken; register the family under another name")
    _REGISTERED[architecture] = family


def known_architectures() -> list[str]:
    """The architecture names that find_family accepts, sorted."""
    return sorted([*_MODULES, *_REGISTERED])


def find_family(architecture: str) -> ModelFamily:
    """The family of an architecture name, as in config.json's `architectures`.

    Raises:
      ValueError: the architecture is unknown; the message lists the known ones.
    """
    if architecture in _REGISTERED:
        return _REGISTERED[architecture]
    if architecture not in _MODULES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(known_architectures())}")
    return importlib.import_module(_MODULES[architecture]).FAMILY


def parse_model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json of any known family.

    Raises:
      TypeError, ValueError: a field is missing, wrong or not supported (among them the architecture), the file asks for
        remote code, or the family's parse_config returned another architecture.
    """
    if "auto_map" in fields:
        raise ValueError("config.json asks for remote code (auto_map), which is never executed; remove the field")
    architectures = fields.get("architectures")
    is_one = isinstance(architectures, list) and len(architectures) == 1
    if not is_one or not isinstance(architectures[0], str):
        raise ValueError(f"config.json must name one architecture, got {architectures!r}")
    config = find_family(architectures[0]).parse_config(fields)
    if config.architecture != architectures[0]:
        raise ValueError(
            f"the family of {architectures[0]!r} returned a ModelConfig of architecture {config.architecture!r}; "
            "its parse_config must keep the name, or another family would be built"
        )
    return config
