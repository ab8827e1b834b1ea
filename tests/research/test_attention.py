"""Attention functions of the user's: a rule about positions against transformers' window, on a mesh, and wrong ones."""

import json
import shutil

import jax.numpy as jnp
import pytest
from conftest import load_golden
from mesh_tools import on_mesh

import jaxinfer
from jaxinfer import LLM, SamplingParams
from jaxinfer.research import masked_attention

SETTINGS = {"max_model_len": 80, "max_num_seqs": 4, "page_size": 8, "num_kv_pages": 40, "max_num_batched_tokens": 32}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def test_window_as_a_rule_equals_transformers_sliding_window(tmp_path):
    golden = load_golden("mistral")  # with a window of 12
    shutil.copytree(golden.path, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": None}))
    jaxinfer.register_attention("last-12", masked_attention(lambda query, key: key > query - 12))
    with LLM(tmp_path / "model", attention_backend="last-12", **SETTINGS) as llm:
        found = llm.generate(golden.prompts, GREEDY, use_tqdm=False)
        assert "layers.0.attention.probs" not in llm.sites()
        assert "layers.0.attention.heads" in llm.sites()
    assert [list(out.token_ids) for out in found] == golden.greedy


def test_rule_that_hides_nothing_changes_nothing_and_one_that_hides_much_holds_on_a_mesh(few_programs):
    prompts = [list(range(20 + i, 60 + i)) for i in range(3)]
    jaxinfer.register_attention("all", masked_attention(lambda query, key: key >= 0))
    jaxinfer.register_attention("strided", masked_attention(lambda query, key: (query - key) % 3 == 0))
    texts = {}
    for name, layout in (("auto", (1, 1)), ("all", (1, 1)), ("strided", (1, 1)), ("strided", (1, 2))):
        with on_mesh("llama", layout, attention_backend=name) as llm:
            texts[name, layout] = [out.token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert texts["all", (1, 1)] == texts["auto", (1, 1)]
    assert texts["strided", (1, 1)] == texts["strided", (1, 2)] != texts["auto", (1, 1)]


def test_function_that_is_registered_anew_changes_no_llm_that_runs(few_programs):
    prompts = [list(range(20, 60))]
    jaxinfer.register_attention("changing", masked_attention(lambda query, key: key > query - 8))
    with on_mesh("llama", (1, 1), attention_backend="changing") as llm:
        jaxinfer.register_attention("changing", masked_attention(lambda query, key: key >= 0))
        before = llm.generate(prompts, GREEDY)[0].token_ids
    with on_mesh("llama", (1, 1), attention_backend="changing") as llm:
        assert llm.generate(prompts, GREEDY)[0].token_ids != before


@pytest.mark.parametrize(
    ("name", "function", "error", "message"),
    [
        ("xla", masked_attention(lambda q, k: k >= 0), ValueError, "'xla' is built in"),
        ("mine", lambda *arrays, **options: arrays[0][:1], ValueError, "must return q's shape and dtype"),
        (
            "mine",
            lambda q, *rest, **options: q if q[0, 0, 0, 0] > 0 else -q,
            ValueError,
            "cannot be traced: TracerBool",
        ),
        ("mine", masked_attention(lambda q, k: jnp.ones(3, bool)), ValueError, "'mine' cannot be traced"),
    ],
)
def test_wrong_attention_function_is_an_error_where_it_is_registered(name, function, error, message):
    with pytest.raises(error, match=message):
        jaxinfer.register_attention(name, function)
    with pytest.raises(ValueError, match="attention_backend must be one of auto, reference, xla, pallas"):
        jaxinfer.EngineConfig(attention_backend="mine")
