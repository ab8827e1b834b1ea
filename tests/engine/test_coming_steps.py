"""Which shapes of steps are foreseen, and that an engine's steps are those that its scheduler has foreseen."""

import pytest
from engine_tools import finish, make_engine, request

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.coming_steps import Work, coming_shapes
from jaxinfer.wrappers.step_shapes import StepShapes

SHAPES = StepShapes(EngineConfig(max_num_seqs=16, max_num_batched_tokens=512), max_model_len=256)


def rows(running, waiting=()):
    """The decode and prefill rows of the shapes that are foreseen."""
    return [(shape.num_decode, shape.num_prefill) for shape in coming_shapes(SHAPES, running, waiting)]


def test_coming_shapes_of_equal_sequences_are_one():
    assert rows([Work(0, 9)] * 12) == [(16, 0)]
    assert rows([Work(0, 9)]) == [(1, 0)]


def test_coming_shapes_shrink_as_sequences_end():
    assert rows([Work(0, number) for number in range(1, 13)]) == [(16, 0), (8, 0), (1, 0)]
    assert rows([Work(0, 5)] * 4 + [Work(0, 9)] * 8) == [(16, 0), (8, 0)]


def test_coming_shapes_of_a_prompt_that_is_partly_computed_come_first():
    assert rows([Work(0, 9)] * 3 + [Work(100, 9)]) == [(16, 8), (8, 0)]
    assert rows([Work(10_000, 9)]) == [(0, 32), (1, 0)]  # as many rows as a step can have


def test_coming_shapes_waiting_sequences_join_together_where_slots_are_free_and_else_one_by_one():
    assert rows([Work(0, 9)] * 14, [Work(64, 9)] * 2) == [(16, 8), (16, 0)]
    assert rows([Work(0, 9)] * 16, [Work(64, 9), Work(16, 9), Work(64, 9)]) == [(16, 0), (16, 4), (16, 1)]


def test_coming_shapes_nothing_left_to_do_foresees_nothing():
    assert rows([Work(0, 0)]) == rows([]) == []


@pytest.mark.parametrize("run_ahead", [True, False])
def test_scheduler_foresees_the_steps_of_an_engine(run_ahead):
    """The shapes that are foreseen after the first step are those that all other steps take."""
    engine, wrapper = make_engine(
        max_num_seqs=16, max_num_batched_tokens=512, max_model_len=128, num_kv_pages=400, run_ahead=run_ahead
    )
    for number in range(40):
        engine.add_request(request(number, [number, *range(19)], max_tokens=4 + 2 * number))
    engine.step()
    foreseen = engine._scheduler.coming_shapes()
    wrapper.batches.clear()
    finish(engine)
    assert {batch.shape for batch in wrapper.batches} == set(foreseen)
    assert len(foreseen) == 4


def test_scheduler_knows_what_the_prefix_cache_has():
    engine, _ = make_engine(max_num_seqs=2, max_num_batched_tokens=512, max_model_len=400, num_kv_pages=400)
    prompt = [number % 7 for number in range(300)]
    for number in range(3):
        engine.add_request(request(number, [*prompt, number], max_tokens=40))
    engine.step()
    # 90 tokens of the second prompt are left, then both decode; of the third prompt, one token is not in the cache.
    assert [shape.num_prefill for shape in engine._scheduler.coming_shapes()] == [8, 0, 1]


@pytest.mark.parametrize("fields", [{}, {"pipeline_parallel_size": 2}])
def test_scheduler_foresees_nothing_in_pipelines_and_for_scored_prompts(fields):
    engine, _ = make_engine(**fields)
    engine.add_request(request(0, [1, 2, 3], prompt_logprobs=None if fields else 1))
    engine.step()
    assert engine._scheduler.coming_shapes() == []
