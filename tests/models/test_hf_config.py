"""config.json: required fields, defaults, both spellings of rotary settings, errors that name the field."""

from __future__ import annotations

import dataclasses

import pytest

from jaxinfer.config.model_config import ModelConfig, RopeConfig
from jaxinfer.models.hf_config import parse_rope, parse_windows, require, require_count
from jaxinfer.models.llama import parse_config
from jaxinfer.models.registry import parse_model_config

FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
RULES = {
    "default": ({}, {"original_max_len": 64}),
    "linear": ({"factor": 4}, {"factor": 4.0, "original_max_len": 64}),
    "dynamic": ({"factor": 2.0}, {"factor": 2.0, "original_max_len": 64}),
    "llama3": (
        {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 3, "original_max_position_embeddings": 32},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_len": 32},
    ),
    "yarn": (
        {"factor": 4.0, "beta_fast": 16, "attention_factor": 1.5, "mscale": None, "truncate": False},
        {"factor": 4.0, "beta_fast": 16.0, "attention_factor": 1.5, "truncate": False, "original_max_len": 64},
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_parse_rope_every_spelling_gives_same_config(kind: str) -> None:
    settings, expected = RULES[kind]
    spellings = [
        {"rope_parameters": settings | {"rope_type": kind, "rope_theta": 500.0}},
        {"rope_parameters": settings | {"rope_type": kind}, "rope_theta": 500},
        {"rope_scaling": settings | {"rope_type": kind}, "rope_theta": 500.0},
        {"rope_scaling": settings | {"type": kind}, "rope_theta": 500.0},
        {"rope_scaling": settings | {"type": "other", "rope_type": kind}, "rope_theta": 500.0},
    ]
    if kind == "default":
        spellings += [{"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": None}]
    for spelling in spellings:
        assert parse_rope(FIELDS | spelling) == RopeConfig(theta=500.0, kind=kind, **expected), spelling


def test_parse_rope_nothing_given_is_default() -> None:
    expected = RopeConfig(theta=10000.0, original_max_len=64)
    assert parse_rope(FIELDS) == parse_rope(FIELDS | {"rope_theta": None, "rope_parameters": {}}) == expected
    assert parse_rope(FIELDS, default_theta=7.0).theta == 7.0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rope_type": "spiral"}, ValueError, "rope type 'spiral' is not supported; known: default, linear"),
        ({"rope_type": "longrope"}, ValueError, "rope type 'longrope' needs a list short_factor, got None"),
        ({"type": "su", "short_factor": [1, 0]}, ValueError, "short_factor must be > 0, got 0"),
        ({"rope_type": ["yarn"]}, ValueError, "rope type .'yarn'. is not supported"),
        ({"rope_type": "yarn"}, ValueError, "rope type 'yarn' needs a factor"),
        ({"rope_type": "linear", "factor": None}, ValueError, "rope type 'linear' needs a factor"),
        ({"rope_type": "linear", "factor": "4"}, TypeError, "rope factor must be a number"),
        ({"rope_type": "linear", "factor": 0.5}, ValueError, "rope factor must be >= 1, got 0.5"),
        ({"rope_type": "linear", "factor": float("nan")}, ValueError, "rope factor must be finite, got nan"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": True}, TypeError, "rope beta_fast must be a number"),
        ({"rope_theta": "big"}, TypeError, "rope_theta must be a number > 0"),
        ({"rope_theta": 0}, ValueError, "rope_theta must be > 0, got 0"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": 0, "beta_slow": 0}, ValueError, "rope beta_slow must be > 0"),
        ({"rope_type": "yarn", "factor": 2, "beta_slow": 64}, ValueError, "rope beta_slow must .* got 64.0 and 32.0"),
        ({"rope_type": "yarn", "factor": 2, "rope_theta": 1}, ValueError, "rope theta must be > 1 for yarn, got 1"),
        ({"rope_type": "yarn", "factor": 2, "truncate": "false"}, TypeError, "rope truncate must be True or False"),
        ({"original_max_position_embeddings": 0}, ValueError, "original_max_position_embeddings must be >= 1, got 0"),
        ({"partial_rotary_factor": 0}, ValueError, "partial_rotary_factor must be 1"),
        ({"original_max_position_embeddings": 1.5}, TypeError, "original_max_position_embeddings must be an int"),
        ({"partial_rotary_factor": 0.5}, ValueError, "partial_rotary_factor must be 1"),
        ("yarn", ValueError, "rotary settings must be an object, got 'yarn'"),
    ],
)
def test_parse_rope_wrong_settings_name_field(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"config.json: {message}|^{message}"):
        parse_rope(FIELDS | {"rope_parameters": settings})


def test_parse_config_llama_fields_become_numbers() -> None:
    expected = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=9,
        hidden_size=8,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=2,
        ffn_size=12,
        max_position_embeddings=64,
        rope=RopeConfig(original_max_len=64),
    )
    assert parse_config(FIELDS) == expected
    assert parse_config(FIELDS | {"head_dim": None, "num_key_value_heads": None, "hidden_act": "silu"}) == expected


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "architectures"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, ValueError, "config.json has no '{name}', which architecture .'LlamaForCausalLM'. needs"),
        ("8", TypeError, "config.json: {name} must be an int >= 1, got '8'"),
        (True, TypeError, "config.json: {name} must be an int"),
        (0, ValueError, "config.json: {name} must be >= 1, got 0"),
    ],
)
def test_parse_config_wrong_field_names_it(name: str, value, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.format(name=name)):
        parse_config(FIELDS | {name: value})
    with pytest.raises(ValueError, match=f"has no '{name}'"):
        parse_config({key: value for key, value in FIELDS.items() if key != name})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_act": "gelu"}, ValueError, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_key_value_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_key_value_heads": 0}, ValueError, "config.json: num_key_value_heads must be >= 1, got 0"),
        ({"head_dim": 0}, ValueError, "config.json: head_dim must be >= 1, got 0"),
        ({"head_dim": 3}, ValueError, "head_dim must be even"),
        ({"max_position_embeddings": 10**15}, ValueError, r"max_position_embeddings must be in 2\.\.\d+, got 1000000"),
        ({"rope_theta": 0}, ValueError, "config.json: rope_theta must be > 0, got 0"),
        ({"partial_rotary_factor": 0}, ValueError, "config.json: partial_rotary_factor must be 1"),
        ({"original_max_position_embeddings": 0}, ValueError, "original_max_position_embeddings must be >= 1, got 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ValueError, "'dynamic' needs 4 rotated dims .* got 2"),
        ({"rms_norm_eps": "1e-5"}, TypeError, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": -1.0}, ValueError, "rms_norm_eps must be >= 0"),
    ],
)
def test_parse_config_unfit_numbers_raise(change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_config(FIELDS | change)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *((architecture, "tie_word_embeddings") for architecture in ("LlamaForCausalLM", "Gemma2ForCausalLM")),
        *((architecture, "attention_bias") for architecture in ("LlamaForCausalLM", "Gemma2ForCausalLM")),
        *((architecture, "attention_bias") for architecture in ("Olmo2ForCausalLM", "Qwen3ForCausalLM")),
        *(("Qwen3MoeForCausalLM", name) for name in ("attention_bias", "norm_topk_prob", "use_sliding_window")),
        ("LlamaForCausalLM", "mlp_bias"),
        ("Qwen2ForCausalLM", "use_sliding_window"),
        ("GPT2LMHeadModel", "tie_word_embeddings"),
    ],
)
def test_parse_model_config_flag_that_is_no_bool_is_named(architecture: str, name: str) -> None:
    fields = (
        FIELDS | GPT2 | EXPERTS | {"moe_intermediate_size": 5, "sliding_window": 4} | {"architectures": [architecture]}
    )
    assert parse_model_config(fields | {name: None}) == parse_model_config(fields | {name: False})
    for value in ("false", 0):
        with pytest.raises(TypeError, match=f"config.json: {name} must be True or False, got {value!r}"):
            parse_model_config(fields | {name: value})


def test_require_missing_or_null_raises() -> None:
    assert require({"a": 0}, "a") == 0 and require_count({"a": 3}, "a") == 3
    for fields in ({}, {"a": None}):
        with pytest.raises(ValueError, match="has no 'a'"):
            require(fields, "a")


SLIDE, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("architecture", "change", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 7}, ()),
        ("MistralForCausalLM", {}, ()),
        ("MistralForCausalLM", {"sliding_window": None}, ()),
        ("MistralForCausalLM", {"sliding_window": 7}, (7, 7, 7)),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 1}, ()),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": True}, (None, 7, 7)),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 0, "use_sliding_window": True}, (7, 7, 7)),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 28, "use_sliding_window": True}, ()),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 7, "layer_types": [SLIDE, FULL, SLIDE], "use_sliding_window": True},
            (7, None, 7),
        ),
    ],
)
def test_parse_model_config_windows_are_by_layer(architecture, change, windows) -> None:
    config = parse_model_config(FIELDS | {"architectures": [architecture]} | change)
    assert config.architecture == architecture
    assert config.windows == windows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no 'sliding_window'"),
        ({"sliding_window": 0}, "sliding_window must be >= 1, got 0"),
        ({"sliding_window": 4, "layer_types": [SLIDE]}, "layer_types must be a list of 3 names"),
        ({"sliding_window": 4, "layer_types": SLIDE}, "layer_types must be a list of 3 names"),
        ({"sliding_window": 4, "layer_types": [FULL, "chunked_attention", FULL]}, "got 'chunked_attention'"),
    ],
)
def test_parse_windows_unfit_fields_raise(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_windows(FIELDS | change, first_layer=0)


def test_parse_qwen2_lacks_max_window_layers_raises() -> None:
    fields = FIELDS | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4}
    with pytest.raises(ValueError, match="no 'max_window_layers'"):
        parse_model_config(fields)


@pytest.mark.parametrize(
    ("architecture", "features"),
    [
        ("MistralForCausalLM", (False, False, "none")),
        ("Olmo2ForCausalLM", (False, False, "projection")),
        ("Phi3ForCausalLM", (False, False, "none")),
        ("Qwen2ForCausalLM", (True, False, "none")),
        ("Qwen3ForCausalLM", (False, False, "head")),
    ],
)
def test_parse_model_config_family_decides_biases_and_norms(architecture, features) -> None:
    config = parse_model_config(FIELDS | {"architectures": [architecture]})
    assert (config.attention_bias, config.attention_out_bias, config.qk_norm) == features
    assert config.head_dim == (128 if architecture == "Qwen3ForCausalLM" else 2)


GEMMA2, GEMMA3 = (FIELDS | {"architectures": [f"Gemma{number}ForCausalLM"]} for number in (2, 3))


def test_parse_gemma2_defaults_are_the_family_s() -> None:
    config = parse_model_config(GEMMA2)
    assert config.windows == (4096, None, 4096)
    assert (config.attention_softcap, config.logit_softcap) == (50, 30)
    assert (config.attention_scale, config.embedding_scale) == (1 / 16, 8**0.5)
    assert (config.activation, config.norm_places, config.norm_offset) == ("gelu_pytorch_tanh", "both", 1)
    assert config.tie_word_embeddings and config.qk_norm == "none" and config.local_rope is None


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 300, "rope_scaling": {"rope_type": "linear", "factor": 8}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300},
            }
        },
    ],
)
def test_parse_gemma3_both_spellings_give_two_rotary_rules(rotary) -> None:
    config = parse_model_config(GEMMA3 | rotary)
    assert config.rope == RopeConfig(theta=5e5, kind="linear", factor=8.0, original_max_len=64)
    assert config.local_rope == RopeConfig(theta=300.0, original_max_len=64)
    assert config.rope_for(None) is config.rope and config.rope_for(7) is config.local_rope


def test_parse_gemma3_every_sixth_layer_sees_all() -> None:
    config = parse_model_config(GEMMA3 | {"num_hidden_layers": 7, "sliding_window": 9})
    assert config.windows == (9, 9, 9, 9, 9, None, 9)
    assert (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)
    assert config.qk_norm == "head" and config.attention_softcap is None and config.logit_softcap is None
    every_third = parse_model_config(GEMMA3 | {"sliding_window": 9, "sliding_window_pattern": 3})
    assert every_third.windows == (9, 9, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_activation": "relu"}, ValueError, "hidden_act must be 'gelu_pytorch_tanh', got 'relu'"),
        ({"query_pre_attn_scalar": 0}, ValueError, "query_pre_attn_scalar must be > 0, got 0"),
        ({"attn_logit_softcapping": -1.0}, ValueError, "attention_softcap must be > 0, got -1"),
        ({"final_logit_softcapping": "30"}, TypeError, "logit_softcap must be a number > 0"),
        ({"use_bidirectional_attention": True}, ValueError, "use_bidirectional_attention must be false"),
        ({"rope_local_base_freq": 0}, ValueError, "rope_theta must be > 0, got 0"),
        ({"sliding_window_pattern": 0}, ValueError, "sliding_window_pattern must be >= 1, got 0"),
    ],
)
def test_parse_gemma3_unfit_fields_raise(change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_model_config(GEMMA3 | change)


@pytest.mark.parametrize(
    ("windows", "message"), [((4,), "one entry a layer, 3, got 1"), ((None, 0, None), "window must be >= 1, got 0")]
)
def test_model_config_unfit_windows_raise(windows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(parse_config(FIELDS), windows=windows)


PHI3 = FIELDS | {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 256}
FACTORS = {"short_factor": [1.0], "long_factor": [4.0]}


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 64},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}},
    ],
)
def test_parse_phi3_every_spelling_of_longrope(rotary) -> None:
    config = parse_model_config(PHI3 | rotary)
    expected = RopeConfig(kind="longrope", factor=4.0, original_max_len=64, short_factors=(1.0,), long_factors=(4.0,))
    assert config.rope == expected


@pytest.mark.parametrize("where", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_parse_phi3_part_of_a_head_is_rotated(where) -> None:
    config = parse_model_config(PHI3 | {"head_dim": 8} | where)
    assert config.rope.rotated_dims(config.head_dim) == 4


def test_parse_phi3_longrope_of_one_position_raises() -> None:
    rotary = {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 1}
    with pytest.raises(ValueError, match="rope original_max_len must be >= 2 for longrope, got 1"):
        parse_model_config(PHI3 | rotary)


def test_parse_phi3_wrong_number_of_factors_raises() -> None:
    rotary = {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0]}}
    with pytest.raises(ValueError, match="longrope needs 1 factors for 2 dims, got 2"):
        parse_model_config(PHI3 | rotary)


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 32,
    "n_embd": 8,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 64,
}


def test_parse_gpt2_defaults_are_the_family_s() -> None:
    config = parse_model_config(GPT2 | {"n_inner": None})
    assert (config.ffn_size, config.head_dim, config.num_kv_heads) == (32, 2, 4)
    assert (config.rope, config.norm_kind, config.activation, config.norm_eps) == (None, "layer", "gelu_new", 1e-5)
    assert config.tie_word_embeddings and config.attention_bias and config.mlp_bias and not config.mlp_gate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"activation_function": "swish"}, "activation_function must be one of silu, .*, got 'swish'"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head, got 8 and 3"),
        ({"n_positions": None}, "no 'n_positions'"),
    ],
)
def test_parse_gpt2_unfit_fields_raise(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model_config(GPT2 | change)


EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def test_mixtral_defaults_are_transformers() -> None:
    """What MixtralConfig has for fields that a file leaves out."""
    sizes = {"architectures": ["MixtralForCausalLM"], "num_attention_heads": 8, "hidden_size": 16}
    config = parse_model_config(FIELDS | EXPERTS | sizes)
    assert (config.rope.theta, config.num_kv_heads, config.norm_eps) == (1e6, 8, 1e-5)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (4, 2, 12)
    assert config.normalise_experts and config.expert_layers == {0, 1, 2} and config.windows == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"head_dim": 2, "num_experts": 4, "normalise_experts": False, "dense_layers": (), "windows": ()}),
        ({"num_experts": None, "norm_topk_prob": True}, {"num_experts": 4, "normalise_experts": True}),
        ({"num_experts": 6}, {"num_experts": 6}),
        ({"mlp_only_layers": [2], "decoder_sparse_step": 1}, {"dense_layers": (2,)}),
        ({"decoder_sparse_step": 2}, {"dense_layers": (0, 2)}),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}, {"windows": (7, 7, 7)}),
    ],
)
def test_qwen3_moe_fields_are_transformers(change, expected) -> None:
    fields = FIELDS | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 5} | change
    config = parse_model_config(fields)
    assert config.expert_ffn_size == 5 and config.qk_norm == "head"
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 5}, "experts_per_token must be .* got 5"),
        ({"mlp_only_layers": "2"}, "mlp_only_layers must be a list of layer numbers, got '2'"),
        ({"num_local_experts": None}, "num_local_experts"),
    ],
)
def test_qwen3_moe_wrong_fields_are_named(change, message) -> None:
    fields = FIELDS | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 5} | change
    with pytest.raises(ValueError, match=message):
        parse_model_config(fields)
