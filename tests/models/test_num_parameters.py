"""ModelConfig.num_parameters against the weights that transformers stored."""

from __future__ import annotations

import json

from safetensors.numpy import load_file

from jaxinfer.models.registry import parse_model_config


def test_num_parameters_equals_stored_weights(golden) -> None:
    config = parse_model_config(json.loads((golden.path / "config.json").read_text()))
    stored = {name: array for path in golden.path.glob("*.safetensors") for name, array in load_file(path).items()}
    assert config.num_parameters == sum(array.size for array in stored.values())
