"""The engine's own window: against transformers' and against a rule about positions, in a pool that cannot hold the
texts, whose given-back pages other texts fill, with NaN as well."""

import json
import shutil

import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import on_mesh

import jaxinfer
from jaxinfer import LLM, EngineConfig, RequestFailedError, SamplingParams
from jaxinfer.research import add, masked_attention

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
TIGHT = {"max_model_len": 80, "max_num_seqs": 3, "page_size": 8, "num_kv_pages": 9, "max_num_batched_tokens": 16}
PROMPTS = [[(7 * place + number) % 290 for place in range(24)] for number in range(5)]
"""With their outputs, each takes 8 of the 9 pages if none is given back."""
WINDOW = {"sliding_window": 11, "sink_tokens": 4}


def ids(outputs):
    return [out.token_ids for out in outputs]


@pytest.mark.parametrize("source", ["model", "settings"])
@pytest.mark.parametrize("backend", ["xla", "reference", pytest.param("pallas", marks=pytest.mark.matrix)])
def test_window_of_model_or_settings_equals_transformers_in_a_tight_pool(source, backend, tmp_path):
    golden = load_golden("mistral")  # with a window of 12
    path = shutil.copytree(golden.path, tmp_path / "model") / "config.json"
    if source == "settings":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": None}))
    own = {"sliding_window": 12} if source == "settings" else {}
    with LLM(path.parent, attention_backend=backend, **TIGHT, **own) as llm:
        found = llm.generate(golden.prompts, GREEDY, use_tqdm=False)
        assert llm.stats().kv_pages_total < sum(-(-(len(out.prompt_token_ids) + 24) // 8) for out in found)
    assert [list(out.token_ids) for out in found] == golden.greedy


@pytest.fixture(scope="module")
def by_rule():
    """Greedy tokens by model, where a rule hides what the window hides and no page is given back."""
    jaxinfer.register_attention("rule", masked_attention(lambda query, key: (key < 4) | (key > query - 11)))
    found = {}

    def of(model):
        if model not in found:
            with on_mesh(model, (1, 1), attention_backend="rule", **TIGHT | {"num_kv_pages": 60}) as llm:
                found[model] = ids(llm.generate(PROMPTS, LONG, use_tqdm=False))
        return found[model]

    return of


MATRIX = pytest.mark.matrix


@pytest.mark.parametrize(
    ("model", "layout", "fields"),
    [
        ("llama", (1, 1), {}),
        ("llama", (1, 1), {"draft_model": "prompt-lookup"}),
        ("gemma3", (2, 2), {"attention_backend": "reference"}),
        *(
            pytest.param(model, layout, fields, marks=MATRIX)
            for model in ("llama", "gemma3", "gpt2", "mixtral")
            for layout in ((1, 1), (2, 2), (4, 2))
            for fields in (
                {"attention_backend": "pallas"},
                {"draft_model": "checkpoint", "num_draft_tokens": 3},
                {"enable_prefix_caching": False, "run_ahead": False},
            )
        ),
    ],
)
def test_window_and_sinks_equal_a_rule_in_a_pool_that_cannot_hold_the_texts(model, layout, fields, by_rule):
    if fields.get("draft_model") == "checkpoint":
        fields = fields | {"draft_model": str(load_golden(f"mesh/{model}").path)}
    with on_mesh(model, layout, **TIGHT | WINDOW | fields) as llm:
        assert ids(llm.generate(PROMPTS, LONG, use_tqdm=False)) == by_rule(model)
        again = [[*prompt, *tokens[:20]] for prompt, tokens in zip(PROMPTS, by_rule(model), strict=True)]
        going_on = llm.generate(again, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True), use_tqdm=False)
        assert ids(going_on) == [tokens[20:] for tokens in by_rule(model)]


@pytest.mark.parametrize("backend", ["xla", *(pytest.param(name, marks=MATRIX) for name in ("reference", "pallas"))])
def test_given_back_pages_that_a_failing_request_fills_with_nan_harm_nobody(backend, by_rule, few_programs):
    fails = SamplingParams(max_tokens=9, interventions=[add.at("layers.0.mlp.input", vector=np.full(64, 3e38))])
    settings = TIGHT | WINDOW | {"attention_backend": backend, "enable_prefix_caching": False}
    with on_mesh("llama", (1, 1), **settings) as llm:

        def fail(count):
            for _ in range(count):
                with pytest.raises(RequestFailedError, match="drive the model to NaN"):
                    llm.generate(PROMPTS[1] * 2, fails)

        fail(1)  # the stream would end before the programs were compiled
        stream = llm.stream(PROMPTS[0], LONG)
        fail(8)
        *_, out = stream
        assert out.token_ids == by_rule("llama")[0]


def test_chat_without_limit_may_be_as_long_as_the_context():
    with on_mesh("llama", (1, 1), **TIGHT | WINDOW) as llm:
        assert llm._longest_request == 80
    with on_mesh("llama", (1, 1), **TIGHT) as llm:
        assert llm._longest_request == 72


def test_wrong_windows_are_errors():
    with pytest.raises(ValueError, match=r"sliding_window must be in 1\.\.1073741824, got 0"):
        EngineConfig(sliding_window=0)
    with pytest.raises(ValueError, match=r"sink_tokens must be in 0\.\.1073741824, got -1"):
        EngineConfig(sink_tokens=-1)
    with pytest.raises(ValueError, match="sink_tokens needs a sliding_window beside it, got sink_tokens 4 alone"):
        EngineConfig(sink_tokens=4)
