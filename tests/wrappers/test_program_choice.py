"""Which programs there are, and that what runs in a program's stead gives the same tokens without any compilation."""

import numpy as np
import pytest
from wrapper_tools import FakeProgram, make_wrapper

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import LogitEdits, Request
from jaxinfer.wrappers.chains import ChainRule
from jaxinfer.wrappers.program_choice import ProgramChoice
from jaxinfer.wrappers.programs import ProgramCache
from jaxinfer.wrappers.step_batch import SamplerVariant
from jaxinfer.wrappers.step_shapes import StepShapes


class FakePrograms(ProgramCache):
    """Programs that are compiled when a test says so; the others wait for the background."""

    def __init__(self, ready):
        super().__init__({}, {})
        self._programs = {key: FakeProgram(lambda: None) for key in ready}

    is_complete = False


def choice_of(ready=(), *, max_num_seqs=64, **fields):
    shapes = StepShapes(EngineConfig(max_num_seqs=max_num_seqs, **fields), max_model_len=8192, coarse=True)
    return ProgramChoice(FakePrograms(ready), shapes), shapes


@pytest.mark.parametrize(("max_num_seqs", "expected"), [(64, 22), (128, 24), (256, 22)])
def test_covering_programs_of_a_gpu_are_at_most_24(max_num_seqs, expected):
    choice, _ = choice_of(max_num_seqs=max_num_seqs)
    covering = choice.covering_programs()
    assert len(covering) == len(set(covering)) == expected
    assert set(covering) <= set(choice.all_programs())


@pytest.mark.parametrize("fields", [{}, {"draft_model": "prompt-lookup"}, {"pipeline_parallel_size": 4}])
@pytest.mark.parametrize("max_num_seqs", [1, 20, 64])
def test_covering_programs_suffice_for_every_step(max_num_seqs, fields):
    covering = choice_of(max_num_seqs=max_num_seqs, **fields)[0].covering_programs()
    choice, shapes = choice_of(covering, max_num_seqs=max_num_seqs, **fields)
    for needed in shapes.all_shapes():
        shape = choice.shape(needed)
        assert shape.holds(needed) and ("forward", shape) in covering
        for num_top in (None, 20):
            assert choice.sampler(shape.num_logits, SamplerVariant.FULL, num_top, is_edited=True) in covering
            for variant in SamplerVariant:
                assert choice.sampler(shape.num_logits, variant, num_top, is_edited=False) in covering
    assert {("copy", choice.copy_size(number)) for number in (1, 4, 16)} <= set(covering)


def test_shape_takes_the_smallest_that_is_ready_with_its_samplers():
    full = ("sample", 80, SamplerVariant.FULL, 20)
    _, shapes = choice_of()
    needed, middle, largest = (shapes.shape(num_decode=rows, num_prefill=0, num_logits=rows) for rows in (8, 32, 64))
    assert (middle.num_logits, largest.num_logits) == (32, 80)
    ready = [("forward", middle), ("forward", largest), full, ("sample_edited", 80, 20)]
    assert choice_of(ready)[0].shape(needed) == largest  # nothing could sample 32 rows
    ready += [("sample", 32, SamplerVariant.FULL, 20), ("sample_edited", 32, 20)]
    assert choice_of(ready)[0].shape(needed) == middle
    assert choice_of([*ready, ("forward", needed)])[0].shape(needed) == needed
    assert choice_of()[0].shape(needed) == needed  # nothing is ready: the step waits for its own program


def test_sampler_keeps_to_what_was_asked_for_where_it_can():
    def chosen(*ready, variant=SamplerVariant.GREEDY, num_top=None):
        return choice_of([("sample", 8, *entry) for entry in ready])[0].sampler(8, variant, num_top, is_edited=False)[
            2:
        ]

    full, greedy = SamplerVariant.FULL, SamplerVariant.GREEDY
    assert chosen((full, 20), (full, None), (greedy, 20), (greedy, None)) == (greedy, None)
    assert chosen((full, 20), (full, None), (greedy, 20)) == (greedy, 20)
    assert chosen((full, 20), (full, None)) == (full, None)
    assert chosen((full, None), num_top=20) == (greedy, 20)  # no program that reports log-probabilities
    assert chosen((full, 20), num_top=32) == (greedy, 32)  # a wide beam search compiles its own


def test_programs_of_chains_are_for_decode_steps_that_chains_can_have():
    shapes = StepShapes(EngineConfig(max_num_seqs=64), max_model_len=8192, coarse=True)
    rule = ChainRule(length=8, max_rows=32)
    keys = [key for key in ProgramChoice(FakePrograms(()), shapes, rule).all_programs() if key[0] == "chain"]
    rows = {key[1].num_decode for key in keys}
    assert rows == {1, 8, 16, 32} and len(keys) == len(rows) * len(SamplerVariant)
    assert not any(key[1].num_prefill for key in keys)
    assert not [key for key in choice_of()[0].all_programs() if key[0] == "chain"]


def test_chain_is_there_once_the_background_has_compiled_it(monkeypatch):
    shapes = StepShapes(EngineConfig(max_num_seqs=64), max_model_len=8192, coarse=True)
    asked = []
    monkeypatch.setattr(FakePrograms, "compile_next", lambda self, *keys: asked.extend(keys))
    shape = shapes.shape(num_decode=1, num_prefill=0, num_logits=1)
    key = ("chain", shape, 4, SamplerVariant.GREEDY)
    for ready in ((), (key,)):
        choice = ProgramChoice(FakePrograms(ready), shapes, ChainRule(length=4))
        assert choice.has_chain(shape, SamplerVariant.GREEDY) == bool(ready)
    assert asked == [key]


def tokens_of(engine, requests):
    """Runs requests to their end; the tokens of each, and the engine's number of compilations after every step."""
    found, compilations = {}, []
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished():
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event.token_id)
        compilations.append(engine.stats().num_compilations)
    return found, compilations


def test_warmup_in_the_background_steps_run_larger_programs_and_give_the_same_tokens(gqa, monkeypatch):
    """The background is held up, so that only the covering programs are there."""
    sampled = {"max_tokens": 6, "temperature": 0.9, "seed": 5}
    requests = [
        Request(request_id="greedy", prompt_token_ids=tuple(gqa.prompts[0]), max_tokens=6, temperature=0.0),
        Request(request_id="sampled", prompt_token_ids=tuple(gqa.prompts[1]), logprobs=2, **sampled),
        Request(request_id="plain", prompt_token_ids=tuple(gqa.prompts[2]), **sampled),
        Request(
            request_id="edited",
            prompt_token_ids=tuple(gqa.prompts[2]),
            edits=LogitEdits(logit_bias=((1, 0.5),)),
            max_tokens=6,
        ),
    ]
    fields = {"max_num_seqs": 1, "max_num_batched_tokens": 16}
    config = EngineConfig(**fields, page_size=8, num_kv_pages=40)
    results = []
    for background in (False, True):
        wrapper = make_wrapper(gqa.path, **fields)
        engine = DynamicEngine(wrapper, config, max_model_len=256)
        if background:
            monkeypatch.setattr(ProgramCache, "_work", lambda self: None)
            wrapper.warmup(background=True)
            before = wrapper.num_compilations
            assert before == len(wrapper._choice.covering_programs()) <= 24
        tokens, compilations = tokens_of(engine, requests)
        results.append(tokens)
        assert not background or set(compilations) == {before}
        wrapper.close()
    assert results[0] == results[1]
    assert all(len(tokens) == 6 for tokens in results[0].values())
    np.testing.assert_array_equal(results[0]["greedy"], gqa.greedy[0][:6])


def test_compile_ahead_begins_with_the_sampler_of_the_step_and_goes_on_with_what_comes(monkeypatch):
    asked = []
    monkeypatch.setattr(ProgramCache, "may_compile_beside", True)  # on a single core too
    monkeypatch.setattr(ProgramCache, "compile_next", lambda self, *keys: asked.extend(keys))
    shapes = StepShapes(EngineConfig(max_num_seqs=64), max_model_len=8192)
    first, second = (shapes.shape(num_decode=rows, num_prefill=0, num_logits=rows) for rows in (8, 1))
    greedy = SamplerVariant.GREEDY
    choice = ProgramChoice(ProgramCache({}, {}), shapes)
    choice.compile_ahead(first, lambda: [first, second], greedy, None, is_edited=False)
    assert asked == [("sample", 8, greedy, None)] * 2 + [("forward", second), ("sample", 1, greedy, None)]
    asked.clear()
    choice.compile_ahead(first, lambda: [second], greedy, 20, is_edited=True)
    assert asked == [("sample_edited", 8, 20), ("forward", second), ("sample_edited", 1, 20)]
    asked.clear()
    tuned = ProgramChoice(ProgramCache({}, {}, {"forward": lambda shape: shape}), shapes)
    tuned.compile_ahead(first, lambda: pytest.fail("was asked"), greedy, None, is_edited=False)
    assert asked == [("sample", 8, greedy, None)]


def test_compile_ahead_foresees_nothing_for_a_program_that_is_there_or_where_it_may_not():
    shapes = StepShapes(EngineConfig(max_num_seqs=64), max_model_len=8192)
    shape = shapes.shape(num_decode=8, num_prefill=0, num_logits=8)
    ready = ProgramCache({}, {})
    ready._programs[("forward", shape)] = FakeProgram(lambda: None)
    for programs in (ready, ProgramCache({}, {}, in_order=True), FakePrograms(())):
        choice = ProgramChoice(programs, shapes)
        choice.compile_ahead(shape, lambda: pytest.fail("was asked"), SamplerVariant.GREEDY, None, is_edited=False)


def test_programs_of_coming_steps_are_compiled_in_the_background_and_give_the_same_tokens(gqa, monkeypatch):
    results = []
    for works_ahead in (False, True):
        monkeypatch.setattr(ProgramCache, "may_work_ahead", works_ahead)
        wrapper = make_wrapper(gqa.path, max_num_seqs=2)
        engine = DynamicEngine(wrapper, EngineConfig(max_num_seqs=2, page_size=8, num_kv_pages=40), max_model_len=256)
        requests = [
            Request(request_id=str(i), prompt_token_ids=tuple(prompt), max_tokens=4 + 4 * i, temperature=0.0)
            for i, prompt in enumerate(gqa.prompts[:3])
        ]
        for request in requests:
            engine.add_request(request)
        engine.step()
        wrapper.wait_for_programs()
        before = wrapper.num_compilations
        tokens, compilations = tokens_of(engine, [])
        assert (compilations[-1] == before) == works_ahead  # else the programs of decode steps had to be compiled
        results.append(tokens)
        wrapper.close()
    assert results[0] == results[1]
