"""The wrapper against transformers' results, and what a step does to device memory."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from shape_checker import assert_shapes
from wrapper_tools import FakeProgram, decode_step, make_random_wrapper, make_wrapper, prefill_step

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.constraints.constraint import TokenSet
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.request import LogitEdits, Request
from jaxinfer.wrappers import decoder_wrapper
from jaxinfer.wrappers.step_arrays import HeadInputs
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShapes

# float32 on both sides; sums in another order differ by about 1e-5.
TOLERANCE = 2e-4


@pytest.fixture
def one_prefill_shape(monkeypatch) -> None:
    """Pads every step to three prefill rows and 16 logit rows, so that a test compiles two programs."""
    smallest = StepShapes.shape
    sizes = {"num_decode": 0, "num_prefill": 3, "num_logits": 16}
    monkeypatch.setattr(StepShapes, "shape", lambda self, **_: smallest(self, **sizes))


def assert_logits_equal_transformers(golden, **fields):
    wrapper = make_wrapper(golden.path, max_model_len=64, max_num_batched_tokens=48, **fields)
    for number, prompt in enumerate(golden.prompts):
        positions = golden.expected[f"positions_{number}"]
        logits = wrapper.logits(prefill_step(wrapper, prompt, logit_index=positions))
        np.testing.assert_allclose(
            logits[: len(positions)], golden.expected[f"logits_{number}"], atol=TOLERANCE, rtol=0
        )
    wrapper.close()


@pytest.mark.usefixtures("one_prefill_shape")
def test_logits_golden_checkpoints_equal_transformers(golden):
    assert_logits_equal_transformers(golden)


@pytest.mark.usefixtures("one_prefill_shape")
@pytest.mark.parametrize("case", ["olmo2", "phi3", "gpt2"])
def test_logits_two_tensor_shards_equal_transformers(case):
    """Families whose storage or norms cut across heads."""
    assert_logits_equal_transformers(load_golden(case), tensor_parallel_size=2)


def test_logits_dynamic_rope_beyond_the_trained_context_equal_transformers():
    golden = load_golden("rope_dynamic")
    prompt, positions = golden.expected["long_prompt"].tolist(), golden.expected["long_positions"]
    wrapper = make_wrapper(golden.path, max_model_len=len(prompt))
    logits = wrapper.logits(prefill_step(wrapper, prompt, logit_index=positions))
    np.testing.assert_allclose(logits[: len(positions)], golden.expected["long_logits"], atol=TOLERANCE, rtol=0)


@pytest.fixture
def wrapper(gqa):
    wrapper = make_wrapper(gqa.path)
    yield wrapper
    wrapper.close()


def test_launch_every_logit_position_samples_each_next_token(wrapper, gqa):
    text = gqa.prompts[1] + gqa.greedy[1]
    start = len(gqa.prompts[1]) - 1
    batch = prefill_step(wrapper, text[:-1], logit_index=range(start, len(text) - 1))
    tokens = wrapper.collect(wrapper.launch(batch)).token_ids
    assert tokens[: len(gqa.greedy[1])].tolist() == gqa.greedy[1]


def test_launch_decode_steps_feed_back_on_the_device(wrapper, gqa):
    handles = [wrapper.launch(prefill_step(wrapper, gqa.prompts[0], pages=range(1, 5)))]
    handles += [wrapper.launch(decode_step(wrapper, [0])) for _ in range(10)]
    tokens = [int(wrapper.collect(handle).token_ids[0]) for handle in handles]
    assert tokens == gqa.greedy[0][:11]


def test_launch_chunks_equal_the_whole_prompt(wrapper, gqa):
    prompt = gqa.prompts[2]
    whole = wrapper.logits(prefill_step(wrapper, prompt))[0]
    for start, stop in ((0, 13), (13, 20)):
        wrapper.launch(prefill_step(wrapper, prompt[start:stop], slot=1, start=start, pages=range(10, 16)))
    last = wrapper.logits(prefill_step(wrapper, prompt[20:], slot=1, start=20, pages=range(10, 16)))[0]
    np.testing.assert_allclose(last, whole, atol=1e-5)


def test_launch_page_copies_come_before_writes(wrapper, gqa):
    """A fork: slot 1 shares slot 0's first page and gets a copy of the half-filled second one."""
    prompt, text = gqa.prompts[0], gqa.prompts[0] + gqa.greedy[0]
    wrapper.launch(prefill_step(wrapper, text[:12], pages=[1, 2, 3]))
    fork = prefill_step(wrapper, text[12:13], slot=1, start=12, pages=[1, 7, 8], page_copies=[(2, 7), (3, 8), (5, 6)])
    # The step that copies page 2 may write to it as well; the copy must have read it before.
    tokens = wrapper.collect(wrapper.launch(fork)).token_ids
    assert tokens[0] == text[13]
    overwritten = prefill_step(wrapper, [9, 9, 9, 9], slot=0, start=8, pages=[1, 2], page_copies=[(2, 9)])
    wrapper.launch(overwritten)
    again = prefill_step(wrapper, text[12:13], slot=1, start=12, pages=[1, 9])
    assert wrapper.collect(wrapper.launch(again)).token_ids[0] == text[13]
    assert len(prompt) < 12


def test_launch_padding_rows_write_only_the_dump_page(wrapper, gqa):
    wrapper.launch(prefill_step(wrapper, gqa.prompts[1], pages=[3, 4, 5]))
    before = [np.asarray(cache.keys) for cache in wrapper.caches]
    wrapper.launch(decode_step(wrapper, []))
    wrapper.launch(decode_step(wrapper, [0]))
    for old, cache in zip(before, wrapper.caches, strict=True):
        changed = np.argwhere(np.asarray(cache.keys) != old)
        assert set(changed[:, 0]) <= {0, 5}
        assert {offset for page, offset in changed[:, [0, 2]] if page == 5} == {len(gqa.prompts[1]) % 8}


def test_collect_logprobs_equal_transformers(wrapper, gqa):
    text = gqa.prompts[2] + gqa.greedy[2]
    start = len(gqa.prompts[2]) - 1
    batch = prefill_step(wrapper, text[:-1], logit_index=range(start, len(text) - 1), num_top=20)
    result = wrapper.collect(wrapper.launch(batch))
    assert_shapes(result)
    count = len(gqa.greedy[2])
    np.testing.assert_allclose(result.logprobs.logprob[:count], gqa.expected["logprobs_2"], atol=TOLERANCE)
    assert (result.logprobs.rank[:count] == 1).all()
    np.testing.assert_array_equal(result.logprobs.top_ids[:count, 0], gqa.greedy[2])


@pytest.fixture(scope="module")
def broad_wrapper():
    """Weights and KV pages far larger than the activations of a few tokens."""
    wrapper = make_random_wrapper(
        {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2048, "head_dim": 64},
        max_num_seqs=4,
        max_model_len=64,
        num_kv_pages=1023,
        max_num_batched_tokens=16,
    )
    yield wrapper
    wrapper.close()


def test_forward_program_every_shape_copies_neither_pages_nor_weights(broad_wrapper):
    """The buffer assignment: pages are aliased, and the temporaries are smaller than any weight matrix or pool."""
    arrays = broad_wrapper._arrays.all
    large = [array for array in arrays if array.nbytes >= 2**20]
    assert len(large) > 6
    for shape in broad_wrapper.shapes.all_shapes():
        compiled = broad_wrapper.compiled("forward", shape)
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= broad_wrapper.kv_bytes, shape
        assert memory.temp_size_in_bytes < 2**19, shape
        for array in large:
            dims = "f32[" + ",".join(map(str, array.shape))
            assert not re.search(re.escape(dims) + r"\]\S* copy\(", compiled.as_text()), shape


def blank_program(name, *arguments):
    """A program that takes and returns arrays like the real one, and computes nothing."""
    if name == "forward":
        (shape,) = arguments
        hidden, rows = jnp.zeros((shape.num_logits, 1)), [jnp.zeros(shape.num_logits, jnp.int32)]
        prompts = jnp.zeros((shape.num_prefill * PREFILL_BLOCK, 1)) if shape.scored else None
        head_inputs = HeadInputs(hidden, rows, prompts)
        return FakeProgram(lambda leaves, state, caches, ring, words: (state, caches, ring, head_inputs))
    num_columns = {"score": 42, "sample_edited": 1, "sample": 1}.get(name, 0)
    result = jnp.zeros((arguments[0] if arguments else 0, num_columns), jnp.int32)
    functions = {
        "copy": lambda caches, copies: caches,
        "edit": lambda edits, words: edits,
        "allow": lambda edits, words: edits,
        "score": lambda leaves, hidden, targets: result,
        "sample": lambda leaves, state, hidden, rows: (state, result),
        "sample_edited": lambda leaves, state, edits, hidden, rows: (state, edits, result),
    }
    return FakeProgram(functions[name])


def test_launch_has_its_programs_before_it_takes_the_lock_that_all_models_share(wrapper, gqa, monkeypatch):
    """Two samples with edits, a mask and a scored prompt take all that a launch can run."""
    asked = []

    def get(name, *arguments):
        asked.append((name, decoder_wrapper._LAUNCHING.locked()))
        return blank_program(name, *arguments)

    monkeypatch.setattr(wrapper._programs, "get", get)
    config = EngineConfig(max_num_seqs=2, page_size=8, num_kv_pages=40, max_num_batched_tokens=128)
    engine = DynamicEngine(wrapper, config, max_model_len=256)
    fields = {
        "prompt_token_ids": tuple(gqa.prompts[0]),
        "max_tokens": 2,
        "edits": LogitEdits(logit_bias=((1, 0.0),), presence_penalty=0.5),
        "constraint": TokenSet(range(320), 320),
    }
    engine.add_request(Request(request_id="a", prompt_logprobs=0, **fields))
    engine.add_request(Request(request_id="b", **fields), prefix_source="a")
    while engine.has_unfinished():
        engine.step()
    assert {name for name, _ in asked} == {"copy", "forward", "score", "edit", "allow", "sample_edited"}
    assert not any(locked for _, locked in asked)


def test_launch_while_another_model_compiles_does_not_wait(wrapper, gqa, monkeypatch):
    other = make_wrapper(gqa.path)
    step = prefill_step(wrapper, gqa.prompts[0])
    compiling, may_go_on = threading.Event(), threading.Event()

    def slow(*key):
        compiling.set()
        assert may_go_on.wait(60)
        return blank_program(*key)

    monkeypatch.setattr(other._programs, "get", slow)
    monkeypatch.setattr(wrapper._programs, "get", blank_program)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(other.launch, step)
        try:
            assert compiling.wait(60)
            launched = pool.submit(wrapper.launch, step).result(60)
            assert not waiting.done()
        finally:
            may_go_on.set()
        assert wrapper.collect(launched).token_ids.tolist() == other.collect(waiting.result(60)).token_ids.tolist()
    other.close()


def test_close_frees_device_memory(gqa):
    wrapper = make_wrapper(gqa.path)
    arrays = wrapper._arrays.all
    wrapper.close()
    assert all(array.is_deleted() for array in arrays)


def test_num_pages_without_a_number_is_what_all_slots_can_use(gqa):
    wrapper = make_wrapper(gqa.path, num_kv_pages=None, max_num_seqs=3, max_model_len=64)
    assert wrapper.num_pages == 3 * 8
    wrapper.close()
