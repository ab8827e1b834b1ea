"""A family from outside the package: registered by name, run by the unchanged engine."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil

import pytest

from jaxinfer import LLM, ModelFamily, SamplingParams, register_model
from jaxinfer.models import llama, registry
from jaxinfer.models.decoder import TransformerDecoder

NAME = "BackwardsForCausalLM"


class Backwards(TransformerDecoder):
    """Llama that finds token v where Llama has token V - 1 - v."""

    def embed(self, token_ids, positions):
        return super().embed(self.config.vocab_size - 1 - token_ids, positions)


FAMILY = ModelFamily(parse_config=llama.parse_config, build=Backwards, tensor_names=llama.TENSOR_NAMES)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register_model(NAME, FAMILY)


def test_register_model_checkpoint_runs_through_the_unchanged_engine(registered, gqa, tmp_path) -> None:
    shutil.copytree(gqa.path, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"architectures": [NAME]}))
    prompts = [[fields["vocab_size"] - 1 - token for token in prompt] for prompt in gqa.prompts]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with LLM(tmp_path / "model", max_num_seqs=2, page_size=8, num_kv_pages=32, max_model_len=64) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(output.token_ids) for output in outputs] == [greedy[:1] for greedy in gqa.greedy]


def test_register_model_taken_name_raises(registered) -> None:
    register_model(NAME, FAMILY)  # the same family again is no conflict
    for name in (NAME, "LlamaForCausalLM"):
        with pytest.raises(ValueError, match=f"architecture '{name}' is taken"):
            register_model(name, dataclasses.replace(FAMILY))


@pytest.mark.parametrize(("name", "family"), [(3, FAMILY), ("Name", llama)])
def test_register_model_wrong_type_raises(name, family) -> None:
    with pytest.raises(TypeError, match="needs a str and a ModelFamily"):
        inspect.unwrap(register_model)(name, family)  # without the tests' own type checker


def test_parse_model_config_family_names_another_architecture_raises(monkeypatch, gqa) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    config = llama.parse_config(json.loads((gqa.path / "config.json").read_text()))
    register_model(NAME, dataclasses.replace(FAMILY, parse_config=lambda fields: config))
    with pytest.raises(ValueError, match=r"of 'BackwardsForCausalLM' returned .* 'LlamaForCausalLM'"):
        registry.parse_model_config({"architectures": [NAME]})


def test_known_architectures_lists_registered_names(registered) -> None:
    assert {NAME, "LlamaForCausalLM"} <= set(registry.known_architectures())
    assert registry.find_family(NAME) is FAMILY
    with pytest.raises(ValueError, match=f"known: {NAME}, .*LlamaForCausalLM"):
        registry.find_family("other")
