"""Replicas of a model behind one LLM: the texts of one, at the same time, and independent of each other's failures."""

from __future__ import annotations

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from held_steps import few_steps
from mesh_tools import MODELS, on_mesh, run

from jaxinfer import EngineClosedError, EngineConfig, SamplingParams
from jaxinfer.api.replicas import ReplicatedRunner
from jaxinfer.wrappers import decoder_wrapper

pytestmark = pytest.mark.usefixtures("few_programs")


def tokens_of(outputs):
    return [[entry.token_ids for entry in output.outputs] for output in outputs]


MATRIX = pytest.mark.matrix
CASES = [("llama", 1), *(pytest.param(model, 2, marks=MATRIX) for model in MODELS)]


@pytest.mark.parametrize(("model", "num_shards"), CASES)
def test_replicas_give_the_tokens_of_one_device_and_all_have_work(model, num_shards):
    with on_mesh(model, (1, 1), enable_prefix_caching=False) as llm:
        expected = tokens_of(run(llm, model))
    with on_mesh(model, (1, num_shards), data_parallel_size=2) as llm:
        meshes = [[device.id for device in loaded.wrapper.mesh.devices.flat] for loaded in llm._replicas]
        assert tokens_of(run(llm, model)) == expected
        each, whole = [loaded.stats() for loaded in llm._replicas], llm.stats()
    assert meshes == [[*range(num_shards)], [*range(num_shards, 2 * num_shards)]]
    assert all(stats.num_steps > 0 for stats in each)
    assert whole.num_requests_finished == len(expected) and whole.kv_pages_used == 0
    assert whole.num_steps == sum(stats.num_steps for stats in each)
    assert whole.kv_pages_total == 2 * each[0].kv_pages_total


def test_replicas_have_launches_in_flight_at_the_same_time():
    with on_mesh("llama", (1, 1), data_parallel_size=2) as llm:
        llm.generate([[1], [2], [3], [4]], SamplingParams(max_tokens=2))
        timelines = [record_launches(loaded.wrapper) for loaded in llm._replicas]
        llm.generate([[i] * 5 for i in range(8)], SamplingParams(max_tokens=20, ignore_eos=True))
    first, second = timelines
    overlapping = sum(a0 < b1 and b0 < a1 for a0, a1 in first for b0, b1 in second)
    assert min(len(first), len(second)) > 10
    assert overlapping >= min(len(first), len(second)) // 2


def record_launches(wrapper):
    """The (launch, collect) times of all steps from now on."""
    times, launch, collect = [], wrapper.launch, wrapper.collect
    begun = {}

    def timed_launch(batch):
        started = time.monotonic()
        handle = launch(batch)
        begun[id(handle)] = started
        return handle

    def timed_collect(handle):
        result = collect(handle)
        times.append((begun.pop(id(handle)), time.monotonic()))
        return result

    wrapper.launch, wrapper.collect = timed_launch, timed_collect
    return times


def slowed(collect):
    def later(handle):
        time.sleep(0.02)
        return collect(handle)

    return later


def test_replica_that_stops_fails_its_own_requests_only():
    endless = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0)
    with on_mesh("llama", (1, 1), data_parallel_size=2) as llm:
        for replica in llm._replicas:  # so slow that no stream ends before the replica breaks
            replica.wrapper.collect = slowed(replica.wrapper.collect)
        streams = [llm.stream([number] * 3, endless) for number in range(4)]
        for stream in streams:
            next(stream)
        owners = [llm._replicas.index(llm._runner._owners[stream._ticket]._loaded) for stream in streams]
        assert set(owners) == {0, 1}

        def fail(batch):
            raise ArithmeticError("a broken device")

        llm._replicas[1].wrapper.launch = fail
        for owner, stream in zip(owners, streams, strict=True):
            if owner == 1:
                with pytest.raises(EngineClosedError, match="ArithmeticError: a broken device"):
                    list(stream)
            else:
                assert len(list(stream)[-1].token_ids) == 60
        assert llm.is_running
        outputs = llm.generate([[number] for number in range(6)], endless)
        assert [len(output.token_ids) for output in outputs] == [60] * 6

        llm._replicas[0].wrapper.launch = fail
        with pytest.raises(EngineClosedError, match="a broken device"):
            llm.generate([1], endless)
        assert not llm.is_running


def test_replicas_that_sleep_refuse_and_a_stopped_one_keeps_nobody_from_the_weights():
    greedy = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
    with on_mesh("llama", (1, 1), data_parallel_size=2) as llm:
        llm.sleep()
        with pytest.raises(EngineClosedError, match="the LLM sleeps"):
            llm.generate([1], greedy)
        llm.wake_up()
        before = llm.generate([1], greedy)

        def fail(batch):
            raise ArithmeticError("a broken device")

        llm._replicas[0].wrapper.launch = fail
        while llm._replicas[0].is_open:
            with contextlib.suppress(EngineClosedError):
                llm.generate([1], greedy)
        assert llm.is_running
        llm.sleep()
        llm.wake_up()
        assert llm.update_weights(jax.tree.map(jnp.zeros_like, llm.params)) == 1
        after = llm.generate([1], greedy)
        assert (before.weights_version, after.weights_version) == (0, 1)
        assert set(after.token_ids) == {0}


def test_requests_with_a_common_beginning_share_a_replicas_pages():
    beginnings = [[i] * 24 for i in range(2)]
    with on_mesh("llama", (1, 1), data_parallel_size=2) as llm:
        for number in range(6):
            for beginning in beginnings:
                llm.generate([*beginning, number], SamplingParams(max_tokens=1))
        each = [loaded.stats() for loaded in llm._replicas]
    assert sum(stats.prefix_cache_hits for stats in each) == 2 * 5 * 24
    assert all(stats.prefix_cache_hits in (0, 5 * 24, 2 * 5 * 24) for stats in each)


def test_cancelled_and_closed_replicas_leave_nothing_behind():
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    before = threading.active_count()
    with on_mesh("llama", (1, 1), data_parallel_size=2) as llm:
        for number in range(4):
            with llm.stream([number], params) as stream:
                next(stream)
        llm.generate([1], SamplingParams(max_tokens=1))
        while any(loaded.stats().kv_pages_used for loaded in llm._replicas):
            time.sleep(0.01)
        with few_steps(llm):
            running = llm.stream([1], params)
            next(running)
            llm.close()
    with pytest.raises(EngineClosedError, match="closed"):
        list(running)
    assert threading.active_count() <= before + 1  # tqdm's monitor may have started


def test_too_few_devices_for_the_replicas_says_so():
    with pytest.raises(ValueError, match="5 replicas of a mesh of 1 pipeline x 2 tensor need 10 devices, found 8"):
        on_mesh("llama", (1, 2), data_parallel_size=5)


def test_replicas_refuse_what_the_smallest_one_has_too_few_pages_for(monkeypatch):
    fitting = iter([9, 7])
    monkeypatch.setattr(decoder_wrapper, "fitting_pages", lambda *_, **settings: next(fitting))
    with on_mesh("llama", (1, 1), data_parallel_size=2, num_kv_pages=None) as llm:
        assert [loaded.wrapper.num_pages for loaded in llm._replicas] == [9, 7]
        with pytest.raises(ValueError, match="needs 8 KV pages for 60 tokens, the pool has 7"):
            llm.generate([1] * 50, SamplingParams(max_tokens=10))
        assert llm._longest_request == 7 * 8


def test_drain_closes_all_replicas_to_new_requests_before_it_waits_for_the_first():
    asked = []

    class Replica:
        def __init__(self, name):
            self.name = name

        def drain(self, seconds):
            asked.append((self.name, seconds))

    ReplicatedRunner([Replica("a"), Replica("b")], EngineConfig()).drain(5.0)
    assert asked[:2] == [("a", 0.0), ("b", 0.0)]
    assert [name for name, _ in asked[2:]] == ["a", "b"] and 0 < asked[3][1] <= asked[2][1] <= 5
