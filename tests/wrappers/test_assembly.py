"""How long a context an engine may serve, by the model's positions."""

from __future__ import annotations

import pytest
from conftest import GOLDEN

from jaxinfer.checkpoint.directory import read_json
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.models.registry import parse_model_config
from jaxinfer.wrappers.assembly import context_length


@pytest.mark.parametrize(
    ("case", "own", "covered"),
    [
        ("gpt2", 256, 256),  # a learned vector for each position, none beyond
        ("gqa", 256, 256),
        ("phi3_long", 256, 256),
        ("rope_dynamic", 64, 256),
    ],
)
def test_context_length_ends_with_the_positions(case: str, own: int, covered: int) -> None:
    config = parse_model_config(read_json(GOLDEN / case / "config.json"))
    assert context_length(EngineConfig(), config) == own
    assert context_length(EngineConfig(max_model_len=covered), config) == covered
    with pytest.raises(ValueError, match=f"max_model_len must be <= {covered}, the model's context, got {covered + 1}"):
        context_length(EngineConfig(max_model_len=covered + 1), config)
