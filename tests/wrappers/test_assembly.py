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


def test_context_length_whose_page_table_is_absurd_raises() -> None:
    config = parse_model_config(read_json(GOLDEN / "gqa" / "config.json") | {"max_position_embeddings": 2**30})
    with pytest.raises(
        ValueError, match=r"would take 32 GiB for max_num_seqs 64 .* 1073741824 tokens; lower max_model_"
    ):
        context_length(EngineConfig(page_size=8), config)
    assert context_length(EngineConfig(page_size=8, max_model_len=2**20), config) == 2**20
