"""The one decoder: every number of a ModelConfig changes the program that is built, or is refused."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from jaxinfer.communication.mesh import abstract_mesh
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.model_config import ModelConfig, RopeConfig
from jaxinfer.models.decoder import DecoderLayer
from jaxinfer.wrappers.assembly import abstract_model, lay_out
from jaxinfer.wrappers.step_programs import StepPrograms
from jaxinfer.wrappers.step_shapes import StepShapes

NUMBERS = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "ffn_size": 24,
    "max_position_embeddings": 64,
}
BASE = ModelConfig(**NUMBERS, rope=RopeConfig(theta=1e4))
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 12}
CHANGES = {
    "rope": {"rope": None},
    "norm_eps": {"norm_eps": 1e-3},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "attention_out_bias": {"attention_out_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "qk_norm": {"qk_norm": "head"},
    "windows": {"windows": (4, None)},
    "local_rope": {"local_rope": RopeConfig(theta=100.0), "windows": (4, None)},
    "attention_scale": {"attention_scale": 3.0},
    "attention_softcap": {"attention_softcap": 5.0},
    "logit_softcap": {"logit_softcap": 5.0},
    "embedding_scale": {"embedding_scale": 3.0},
    "activation": {"activation": "relu"},
    "mlp_gate": {"mlp_gate": False},
    "norm_kind": {"norm_kind": "layer"},
    "norm_places": {"norm_places": "both"},
    "norm_offset": {"norm_offset": 1.0},
    "num_experts": EXPERTS,
    "experts_per_token": EXPERTS | {"experts_per_token": 3},
    "expert_ffn_size": EXPERTS | {"expert_ffn_size": 20},
    "normalise_experts": EXPERTS | {"normalise_experts": False},
    "dense_layers": EXPERTS | {"dense_layers": (0,)},
}
WITHOUT = {"local_rope": {"windows": (4, None)}} | dict.fromkeys(list(CHANGES)[-4:], EXPERTS)
"""What a change is compared with, where that is not the plain BASE."""


def programs_of(config: ModelConfig) -> str:
    """The traces of a step's layers and of its logits."""
    engine = EngineConfig(max_model_len=32, max_num_seqs=2, dtype="float32")
    placed, shapes = lay_out(config, engine, "cpu"), StepShapes(engine, max_model_len=32)
    programs = StepPrograms(
        abstract_model(config, placed),
        shapes=shapes,
        cache_shape=placed.cache_shape(config, num_pages=8, page_size=16),
        dtype=jnp.dtype("float32"),
        mesh=abstract_mesh(1, 1),
    )
    shape = shapes.shape(num_decode=2, num_prefill=0, num_logits=0)
    return f"{programs.forward(shape).jaxpr} {programs.logits(shape.num_logits).jaxpr}"


def test_changes_name_every_number_that_has_a_default() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(ModelConfig)} - set(NUMBERS)


@pytest.mark.parametrize("name", CHANGES)
def test_decoder_every_number_changes_the_program(name) -> None:
    plain = dataclasses.replace(BASE, **WITHOUT.get(name, {}))
    assert programs_of(dataclasses.replace(BASE, **CHANGES[name])) != programs_of(plain)


@pytest.mark.parametrize(("windows", "kinds"), [((), 1), ((4, None, 4, None), 2), ((4, 8, 2, None), 4)])
def test_decoder_equal_layers_are_traced_once(windows, kinds, monkeypatch) -> None:
    traced, run = [], DecoderLayer.__call__
    monkeypatch.setattr(DecoderLayer, "__call__", lambda layer, *rest: traced.append(layer) or run(layer, *rest))
    text = programs_of(dataclasses.replace(BASE, num_layers=4, windows=windows))
    assert len(traced) == kinds
    assert text.count("name=run_layer") == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_kind": "layer", "norm_offset": 1.0}, "norm_kind 'layer' has no norm_offset"),
        ({"norm_kind": "layer", "qk_norm": "head"}, "norm_kind 'layer' has no qk_norm"),
        ({"rope": None, "local_rope": RopeConfig(theta=100.0)}, "local_rope needs rope"),
        (EXPERTS | {"mlp_gate": False}, "experts have a gate"),
        (EXPERTS | {"mlp_bias": True}, "experts have no bias"),
    ],
    ids=str,
)
def test_config_what_no_layer_computes_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)
