"""The decoder that notebooks/own_model.ipynb writes: short, registered from outside, the same on a mesh."""

import numpy as np
import pytest
from execute_notebooks import read

from jaxinfer import LLM, SamplingParams
from jaxinfer.models import registry
from jaxinfer.research import scale

MOST_LINES = 60


@pytest.fixture
def notebook(monkeypatch) -> dict:
    """The names that its cells define, up to the engine's first LLM."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    names: dict = {}
    for cell in read("own_model").cells:
        if cell.cell_type == "code":
            source, begins, _ = cell.source.partition("llm = LLM.from_params(")
            exec(source, names)
            if begins:
                return names
    raise AssertionError("the notebook makes no LLM")


def test_decoder_has_few_lines():
    (cell,) = (cell for cell in read("own_model").cells if "class ParallelDecoder" in cell.source)
    assert len([line for line in cell.source.splitlines() if line.strip()]) <= MOST_LINES


@pytest.mark.matrix
def test_decoder_is_served_with_its_sites_on_a_mesh(notebook):
    found = []
    for stages, shards in ((1, 1), (2, 2)):
        sizes = {"pipeline_parallel_size": stages, "tensor_parallel_size": shards}
        with LLM.from_params(notebook["CONFIG"], notebook["weights"], **notebook["ENGINE"], **sizes) as llm:
            greedy = {"temperature": 0.0, "max_tokens": 6}
            halved = scale.at("layers.*.mlp.neurons", factor=0.5)
            params = [
                SamplingParams(capture=["layers.3.residual"], **greedy),
                SamplingParams(interventions=[halved], **greedy),
            ]
            found.append(llm.generate([list(range(3, 30))] * 2, params, use_tqdm=False))
    for one, other in zip(*found, strict=True):
        assert one.token_ids == other.token_ids
    assert found[0][0].token_ids != found[0][1].token_ids
    captured = [outputs[0].captures["layers.3.residual"] for outputs in found]
    np.testing.assert_allclose(*captured, atol=1e-4)
