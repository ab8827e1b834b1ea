"""The user's door: arguments, errors, streaming, threads, interrupts, compile counts."""

import _thread
import logging
import shutil
import threading
import weakref
from dataclasses import replace

import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from held_steps import few_steps
from safetensors.numpy import load_file

import jaxinfer
from jaxinfer import LLM, BeamSearchParams, EngineClosedError, RequestFailedError, SamplingParams
from jaxinfer.checkpoint.directory import read_json
from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6)
SMALL = {"max_num_seqs": 4, "page_size": 8, "num_kv_pages": 64, "max_num_batched_tokens": 64, "max_model_len": 128}


@pytest.fixture(scope="module")
def path():
    return load_golden("gqa").path


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, **SMALL) as llm:
        yield llm


def test_generate_shapes_of_input_and_output_agree(llm):
    one = llm.generate("hello", GREEDY)
    ids = llm.generate(list(one.prompt_token_ids), GREEDY)
    many = llm.generate(["hello", list(one.prompt_token_ids), "other"], GREEDY, use_tqdm=False)
    assert one.prompt == "hello"
    assert ids.prompt is None
    assert one.text == ids.text == many[0].text == many[1].text
    assert [entry.prompt for entry in many] == ["hello", None, "other"]
    assert llm.generate([], GREEDY) == []
    assert str(one) == one.text
    assert one.finished
    assert one.outputs[0].finish_reason == one.finish_reason == "length"
    assert len(one.token_ids) == 6
    assert one.metrics.arrival_time <= one.metrics.first_token_time <= one.metrics.finished_time


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_generate_arrays_of_ids_are_ids(llm, array):
    assert llm.generate(array([5, 6, 7]), GREEDY).token_ids == llm.generate([5, 6, 7], GREEDY).token_ids


@pytest.mark.parametrize("tokenizer", [3, object()])
def test_tokenizer_that_is_none_says_what_it_lacks(tokenizer):
    with pytest.raises(TypeError, match=rf"tokenizer must be .*got {type(tokenizer).__name__} without .*encode_plain"):
        LLM(load_golden("gqa").path, tokenizer=tokenizer)


def test_generate_params_one_each(llm):
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (1, 3)]
    assert [len(entry.token_ids) for entry in llm.generate(["a", "b"], params, use_tqdm=False)] == [1, 3]
    with pytest.raises(ValueError, match="got 2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], params)


def test_generate_logprobs_always_hold_the_sampled_token(llm):
    params = SamplingParams(temperature=1.5, max_tokens=8, logprobs=2, seed=1, ignore_eos=True)
    output = llm.generate("hello", params)
    assert len(output.logprobs) == 8
    for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry[token_id].decoded_token == llm.tokenizer.token_text(token_id)
        assert 2 <= len(entry) <= 3
        ranks = sorted(value.rank for value in entry.values())
        assert ranks[:2] == [1, 2]
    total = sum(entry[t].logprob for t, entry in zip(output.token_ids, output.logprobs, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_generate_errors_come_before_anything_is_queued(llm):
    before = llm.stats().prompt_tokens
    with pytest.raises(ValueError, match="empty"):
        llm.generate(["fine", "fine too", []], GREEDY)
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.generate("x", {"max_tokens": 3})
    with pytest.raises(TypeError):
        llm.generate(5, GREEDY)
    assert llm.stats().prompt_tokens == before
    assert llm.generate("fine", GREEDY).finished


def test_generate_min_tokens_suspends_stop_strings(llm):
    wishes = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    text = llm.generate("hello", SamplingParams(**wishes)).text
    early = llm.generate("hello", SamplingParams(**wishes, stop=text[0]))
    late = llm.generate("hello", SamplingParams(**wishes, stop=text[0], min_tokens=6))
    assert early.text == "" and early.finish_reason == "stop"
    assert len(early.token_ids) < 6 <= len(late.token_ids)
    assert text.startswith(late.text) and late.text.startswith(text[0])


def test_stream_grows_and_equals_generate(llm):
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=12, ignore_eos=True)
    outputs = list(llm.stream("hello", params))
    assert "".join(entry.delta for entry in outputs) == outputs[-1].text == llm.generate("hello", params).text
    lengths = [len(entry.token_ids) for entry in outputs]
    assert lengths == sorted(set(lengths)), "each one has something new, if only several tokens at once"
    assert [entry.finished for entry in outputs] == [length == 12 for length in lengths]


def test_stream_raises_at_the_call(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.stream([])
    with pytest.raises(ValueError, match="max_model_len"):
        llm.stream([1] * 128)
    with pytest.raises(TypeError, match="one prompt"):
        llm.stream(["a", "b"])


@pytest.mark.parametrize("make", [np.array, jnp.array, iter])
def test_stream_takes_ids_in_any_container(llm, make):
    assert list(llm.stream(make([5, 6, 7]), GREEDY))[-1].token_ids == llm.generate([5, 6, 7], GREEDY).token_ids


@pytest.mark.parametrize("started", [False, True])
def test_stream_closing_aborts_the_request(llm, started):
    stream = llm.stream("hello", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    if started:
        next(stream)
    stream.close()
    assert list(stream) == []
    llm.generate("other", GREEDY)
    assert llm.stats().num_requests_running == 0


def test_stream_dropped_without_closing_aborts_the_request(llm):
    llm.stream("hello", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    llm.generate("other", GREEDY)
    assert llm.stats().num_requests_running == 0


def test_generate_from_many_threads_equals_one_by_one(llm):
    prompts = [f"prompt {number}" for number in range(8)]
    expected = [llm.generate(prompt, GREEDY).text for prompt in prompts]
    found = {}
    threads = [
        threading.Thread(target=lambda p=prompt: found.update({p: llm.generate(p, GREEDY).text})) for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == expected


@pytest.mark.usefixtures("interruptible")
def test_generate_interrupt_aborts_the_requests_and_not_the_engine(llm):
    def for_ever():
        while True:
            llm.generate(["hello"] * 8, SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)

    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for_ever()
    timer.join()
    assert llm.generate("hello", GREEDY).finished
    stats = llm.stats()
    assert stats.num_requests_running == stats.num_requests_waiting == 0


def test_closed_llm_says_so(path):
    llm = LLM(path, **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError, match="closed"):
        llm.generate("x", GREEDY)


def test_closed_llm_leaves_another_one_running(llm, path):
    expected = llm.generate("hello", GREEDY).text
    stream = llm.stream("hello", GREEDY)
    with few_steps(other := LLM(path, **SMALL)), other:
        running = other.stream("hello", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        next(running)
    with pytest.raises(EngineClosedError, match="closed"):
        list(running)
    assert "".join(output.delta for output in stream) == expected == llm.generate("hello", GREEDY).text


def test_llm_whose_last_reference_goes_on_the_engines_thread_frees_its_memory(path):
    """As when the garbage collector happens to run there."""
    llm = LLM(path, **SMALL)
    loaded, thread, died = llm._loaded, llm._runner.driver._thread, weakref.ref(llm)
    submission = llm.prepare("hello", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    references, closed = [llm], []
    loaded.close = lambda close=loaded.close: closed.append(close())
    llm._runner.driver._on_end = loaded.close
    ticket = llm.start(submission, on_update=lambda ticket: references.clear())
    del llm
    thread.join(60)
    assert not thread.is_alive() and died() is None and closed == [None]
    with pytest.raises(EngineClosedError, match="closed"):
        ticket.next_output(60)


def test_generate_token_that_cannot_be_decoded_fails_its_own_request(llm, path):
    class Broken(ByteTokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            if len(token_ids) > 5 and token_ids[0] == 120:
                raise ArithmeticError("no text")
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    with LLM(path, tokenizer=Broken(), **SMALL) as other:
        beside = other.stream("hello", replace(GREEDY, stop="no such text"))
        for stop in (None, "no such text"):
            with pytest.raises(RequestFailedError, match="ArithmeticError: no text") as caught:
                other.generate("xxxxx", replace(GREEDY, stop=stop, max_tokens=20))
            assert isinstance(caught.value.__cause__, ArithmeticError)
        assert list(beside)[-1].token_ids == llm.generate(list(b"hello"), GREEDY).token_ids
        stats = other.stats()
        assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_pages_used) == (0, 0, 0)


def test_stream_closed_by_another_thread_ends_its_iterator(llm):
    with few_steps(llm):
        stream = llm.stream("hello", SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
        next(stream)
        timer = threading.Timer(0.05, stream.close)
        timer.start()
        assert not any(output.finished for output in stream)
        timer.join()


def test_start_up_line_names_mesh_dtype_weights_and_pages(path, caplog):
    with caplog.at_level(logging.INFO, logger="jaxinfer"), LLM(path, **SMALL):
        pass
    assert "mesh 1x1" in caplog.text
    assert "float32" in caplog.text
    assert "KV 64 pages of 8 tokens" in caplog.text


def test_top_level_generate_keeps_one_llm(path, monkeypatch):
    made = []
    original = LLM.__init__
    monkeypatch.setattr(LLM, "__init__", lambda self, *a, **k: (made.append(self), original(self, *a, **k))[1])
    options = {"model": path, "use_tqdm": False} | SMALL
    first = jaxinfer.generate("hello", max_tokens=4, **options)
    compilations = made[0].stats().num_compilations
    again = jaxinfer.generate("hello", max_tokens=4, **options)
    assert first.token_ids == again.token_ids
    assert made[0].stats().num_compilations == compilations
    assert len(made) == 1
    jaxinfer.generate("hello", max_tokens=4, **options | {"max_num_seqs": 2})
    assert len(made) == 2
    with pytest.raises(EngineClosedError):
        made[0].generate("x")
    made[1].close()
    jaxinfer.generate("hello", max_tokens=4, **options | {"max_num_seqs": 2})
    assert len(made) == 3, "a closed one is replaced"
    made[2].close()


def test_top_level_generate_with_other_settings_leaves_the_old_llm_to_those_who_use_it(path, monkeypatch):
    options = {"model": path, "use_tqdm": False, "ignore_eos": True} | SMALL
    generate, used, ended, begun, may_go_on = LLM.generate, [], [], threading.Event(), threading.Event()

    def held(self, *arguments, **fields):
        used.append(self)
        if self.config.max_num_seqs == SMALL["max_num_seqs"]:
            begun.set()
            assert may_go_on.wait(60)
        return generate(self, *arguments, **fields)

    monkeypatch.setattr(LLM, "generate", held)
    thread = threading.Thread(target=lambda: ended.append(jaxinfer.generate("a", **options)))
    thread.start()
    assert begun.wait(60)
    other = jaxinfer.generate("a", **options | {"max_num_seqs": 2})
    assert used[0].is_running
    may_go_on.set()
    thread.join()
    assert ended[0].token_ids == other.token_ids
    assert not used[0].is_running and used[1].is_running
    used[1].close()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"max_token": 3}, TypeError, "did you mean 'max_tokens'"),
        ({"page_sise": 8}, TypeError, "did you mean 'page_size'"),
        ({"temperature": -1}, ValueError, "temperature must be >= 0"),
        ({"page_size": 12}, ValueError, "page_size must be a power of two"),
        ({"sampling_params": SamplingParams(), "top_k": 3}, TypeError, "not both"),
        ({"model": "no/such/place"}, FileNotFoundError, "no such checkpoint"),
    ],
)
def test_top_level_generate_wrong_arguments(path, keywords, error, message):
    with pytest.raises(error, match=message):
        jaxinfer.generate("x", **{"model": path} | keywords)


def test_default_params_follow_the_generation_config(path, tmp_path):
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [1, 46]}'
    )
    with LLM(tmp_path / "copy", **SMALL) as llm:
        params = llm.default_params
        assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 20)
        golden = load_golden("gqa")
        output = llm.generate(golden.prompts[0], GREEDY)
        assert output.token_ids == (46,) == tuple(golden.greedy[0][:1])
        assert (output.finish_reason, output.outputs[0].stop_reason, output.text) == ("stop", None, "")


def test_from_params_equals_the_checkpoint(llm, path):
    tensors = load_file(path / "model.safetensors")
    nested: dict = {}
    for name, value in tensors.items():
        *parents, leaf = name.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[leaf] = value
    config = read_json(path / "config.json")
    expected = llm.generate([5, 6, 7], GREEDY).token_ids
    for params in (tensors, nested):
        with LLM.from_params(config, params, **SMALL) as other:
            assert other.generate([5, 6, 7], GREEDY).token_ids == expected
            with pytest.raises(ValueError, match="tokenizer"):
                other.generate("text", GREEDY)


@pytest.mark.parametrize(
    ("config", "params", "error", "message"),
    [
        (None, {}, TypeError, "config must be a mapping, got NoneType"),
        ({}, None, TypeError, "params must be a mapping, got NoneType"),
        ({}, [1], TypeError, "params must be a mapping, got list"),
        *(
            ({"eos_token_id": eos}, {}, ValueError, "config: eos_token_id must be an integer >= 0 or a list of such")
            for eos in ("x", True, -1, 2.0, [[1]])
        ),
    ],
)
def test_from_params_of_wrong_kinds_are_refused(config, params, error, message):
    with pytest.raises(error, match=message):
        LLM.from_params(config, params)


def test_tokenizer_argument_replaces_the_checkpoints(path):
    with LLM(path, tokenizer="byte", **SMALL) as llm:
        assert isinstance(llm.tokenizer, ByteTokenizer)
        assert llm.generate("abc", GREEDY).prompt_token_ids == (97, 98, 99)


def test_warmup_then_100_random_requests_of_every_kind_compile_nothing(path):
    compiled = []

    def listen(event: str, duration: float, **kwargs) -> None:
        if "compile" in event:
            compiled.append(event)

    random = np.random.default_rng(0)
    with LLM(path, **SMALL | {"max_num_seqs": 2, "num_kv_pages": 16, "max_num_batched_tokens": 16}) as llm:
        llm.warmup()
        before = llm.stats().num_compilations
        prompts = [random.integers(0, 320, random.integers(1, 70)).tolist() for _ in range(100)]
        params = [
            SamplingParams(
                max_tokens=int(random.integers(1, 12)),
                temperature=float(random.choice([0.0, 0.7, 1.3])),
                top_k=int(random.choice([0, 5, 100])),
                top_p=float(random.choice([0.5, 1.0])),
                min_p=float(random.choice([0.0, 0.1])),
                presence_penalty=float(random.choice([0.0, 0.0, 0.5])),
                logit_bias=[None, None, {int(random.integers(320)): 5.0}][random.integers(3)],
                logprobs=[None, 0, 3][random.integers(3)],
                n=[1, 1, 1, 3][random.integers(4)],
                prompt_logprobs=[None, None, 2][random.integers(3)],
                bad_words=[None, None, ["a"]][random.integers(3)],
            )
            for _ in prompts
        ]
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            outputs.append(llm.beam_search(prompts[0], BeamSearchParams(beam_width=2, max_tokens=5)))
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert all(output.finished for output in outputs)
        assert llm.stats().num_compilations == before
        assert llm.stats().num_preemptions > 0
    assert compiled == []
