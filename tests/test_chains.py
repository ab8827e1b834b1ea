"""Several decode steps in one launch give the tokens of single steps, with all models, samplers and meshes."""

import threading

import numpy as np
import pytest
from conftest import load_golden
from mesh_tools import MODELS, on_mesh
from test_equalities import BASE, alone, outputs_of

from jaxinfer import LLM, SamplingParams
from jaxinfer.research.interventions import add
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.programs import ProgramCache


@pytest.fixture
def chains(monkeypatch):
    """The number of steps of every chain; their programs are compiled at once instead of in the background."""
    found, launch_chain = [], DecoderWrapper.launch_chain

    def counted(self, batches):
        found.append(len(batches))
        return launch_chain(self, batches)

    monkeypatch.setattr(DecoderWrapper, "launch_chain", counted)
    monkeypatch.setattr(ProgramCache, "compile_next", lambda self, *keys: [self.get(*key) for key in keys])
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"num_kv_pages": 10}, marks=pytest.mark.matrix),
        pytest.param({"run_ahead": False, "max_num_seqs": 16}, marks=pytest.mark.matrix),
        pytest.param({"attention_backend": "pallas"}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_chain_tokens_of_every_sampler_are_those_of_single_steps(fields, chains):
    with LLM(load_golden("gqa").path, **BASE | {"steps_per_launch": 4} | fields) as llm:
        assert outputs_of(llm) == alone()
        assert llm.stats().kv_pages_used == 0
    assert chains and set(chains) == {4}


PLACES = [("llama", (1, 1)), ("mixtral", (1, 2)), *((model, layout) for model in MODELS for layout in [(1, 1), (1, 4)])]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(*place, marks=() if number < 2 else pytest.mark.matrix)
        for number, place in enumerate(dict.fromkeys(PLACES))
    ],
)
def test_chain_of_plain_requests_on_a_mesh(model, layout, chains):
    prompts = [[5, 9, 2, 7], [3] * 20]
    params = [SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True), SamplingParams(max_tokens=18, seed=3)]
    found = []
    for steps in (1, 4):
        with on_mesh(model, layout, steps_per_launch=steps) as llm:
            found.append([output.token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1]
    assert chains


def test_chain_beside_requests_that_have_none(chains):
    """Log-probabilities, logit edits, constraints, beams and stop strings, before and after plain requests."""
    kinds = [
        {"logprobs": 2},
        {"repetition_penalty": 1.3},
        {"structured": {"regex": "[ab]+"}},
        {"stop": ["a"]},
        {"n": 2},
        {"prompt_logprobs": 1},
        {"capture": ["layers.1.residual"]},
    ]
    params = [SamplingParams(max_tokens=11, temperature=0.8, seed=number, **kind) for number, kind in enumerate(kinds)]
    plain = SamplingParams(max_tokens=13, temperature=0.8, seed=1, ignore_eos=True)
    found = []
    for steps in (1, 4):
        with LLM("demo", num_kv_pages=64, max_num_seqs=8, steps_per_launch=steps) as llm:
            alone = [[choice.token_ids for choice in llm.generate("In the", entry).outputs] for entry in params]
            all_of_them = llm.generate(["In the"] * 9, [plain, *params, plain], use_tqdm=False)
            found.append((alone, [[choice.token_ids for choice in output.outputs] for output in all_of_them]))
    assert found[0] == found[1]
    assert chains


@pytest.mark.parametrize("is_capture", [True, False])
def test_chain_is_not_begun_before_taps_that_begin_later(is_capture, chains):
    length, found = 6, []
    for steps in (1, 4):
        with LLM("demo", num_kv_pages=64, max_num_seqs=8, steps_per_launch=steps) as llm:
            prompt = llm.tokenizer.encode("In the beginning God")[:length]
            if is_capture:
                taps = {"capture": ["layers.1.residual"], "capture_tokens": slice(length + 6, length + 12)}
            else:
                width = llm.model_config.hidden_size
                vector = np.linspace(-3, 3, width, dtype=np.float32)
                taps = {"interventions": [add.at("layers.1.residual", tokens=slice(length + 6, None), vector=vector)]}
            params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, **taps)
            plain = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
            outputs = [llm.generate(prompt, entry) for entry in (params, plain, params)]
            found.append([output.token_ids for output in outputs])
            if is_capture:
                assert outputs[0].captures["layers.1.residual"].shape[0] == 6
    assert found[0] == found[1]
    assert chains  # of the plain request


def test_chain_streams_and_ends_early(chains):
    with LLM("demo", num_kv_pages=64, steps_per_launch=4) as llm:
        whole = llm.generate("In the", SamplingParams(max_tokens=40, temperature=0.0))
        pieces = list(llm.stream("In the", SamplingParams(max_tokens=40, temperature=0.0)))
        assert "".join(piece.delta for piece in pieces) == whole.text
        stream = llm.stream("In the", SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
        next(stream)
        stream.close()
        with llm.trace() as trace:
            llm.generate("In the", SamplingParams(max_tokens=21, temperature=0.0, ignore_eos=True))
        assert sum(row["decodes"] for row in trace.table.rows) >= 20
        assert llm.stats().kv_pages_used == 0
    assert chains


def test_chain_after_warm_up_compiles_nothing(chains):
    fields = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "num_kv_pages": 16, "steps_per_launch": 4}
    with LLM(load_golden("gqa").path, **BASE | fields) as llm:
        llm.warmup()
        before = llm.stats().num_compilations
        for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5)):
            llm.generate([1, 2, 3], SamplingParams(max_tokens=20, temperature=temperature, top_p=top_p))
        assert llm.stats().num_compilations == before
    assert chains


def test_chain_program_is_not_asked_for_where_no_chain_can_begin(monkeypatch):
    asked = []
    monkeypatch.setattr(
        ProgramCache, "compile_next", lambda self, *keys: asked.extend(key for key in keys if key[0] == "chain")
    )
    with LLM(load_golden("gqa").path, **BASE | {"max_num_seqs": 1, "steps_per_launch": 8}) as llm:
        short = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)  # one with the prompt, then seven
        llm.generate([[1, 2, 3], [4, 5]], short, use_tqdm=False)
        assert asked == []
        llm.generate([1, 2, 3], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    assert asked


def test_chain_program_is_compiled_in_the_background_while_steps_run_alone(monkeypatch):
    held, compile_it, launched, launch = threading.Event(), ProgramCache._try, [], DecoderWrapper.launch
    monkeypatch.setattr(ProgramCache, "_try", lambda self, key: held.wait() and compile_it(self, key))
    monkeypatch.setattr(DecoderWrapper, "launch", lambda self, batch: launched.append(batch) or launch(self, batch))
    fields = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "num_kv_pages": 16, "steps_per_launch": 4}
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with LLM(load_golden("gqa").path, **BASE | fields) as llm:
        tokens = llm.generate([1, 2, 3], params).token_ids
        assert len(tokens) == 20 == len(launched)
        held.set()
        llm.decoder.wait_for_programs()
        launched.clear()
        assert llm.generate([1, 2, 3], params).token_ids == tokens
    assert len(launched) < 8  # the prompt, and what is too short for a chain


def test_chain_pages_stay_in_place(chains):
    with LLM(load_golden("gqa").path, **BASE | {"num_kv_pages": 512, "steps_per_launch": 4}) as llm:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
        decoder = llm.decoder
        (key,) = [key for key in decoder._programs._programs if key[0] == "chain"]
        memory = decoder.compiled(*key).memory_analysis()
        assert memory.alias_size_in_bytes >= decoder.kv_bytes
        assert memory.temp_size_in_bytes < decoder.kv_bytes / 4
