"""Programs are compiled once each, whichever threads ask, and one does not wait for another."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from wrapper_tools import FakeProgram

from jaxinfer.wrappers.programs import ProgramCache

SECONDS = 30
"""After which a test that hangs fails."""


class FakeTrace:
    """Compiles by calling a function."""

    def __init__(self, build):
        self._build = build

    def lower(self):
        return self

    def compile(self, compiler_options):
        return self._build(compiler_options)


class HeldBuild:
    """Builds programs of a size once it may; keeps the sizes in the order in which they were begun."""

    def __init__(self):
        self.sizes, self.begun, self.may_end = [], threading.Event(), threading.Event()

    def __call__(self, size, options):
        self.sizes.append(size)
        self.begun.set()
        assert self.may_end.wait(SECONDS)
        return FakeProgram(lambda: size)


def cache_of(build, options=None, tuned_alike=None):
    """A cache of programs "step", which are whatever build(argument, options) returns."""
    traces = {"step": lambda size: FakeTrace(lambda options: build(size, options))}
    alike = {} if tuned_alike is None else {"step": tuned_alike}
    return ProgramCache(traces, {} if options is None else {"step": options}, alike)


def test_get_several_threads_compile_a_program_once_and_all_have_it():
    compiled, asked, waiting = [], threading.Barrier(4), threading.Event()

    def build(size, options):
        compiled.append(size)
        assert waiting.wait(SECONDS)
        return FakeProgram(lambda: size)

    programs = cache_of(build)

    def ask(_):
        asked.wait(SECONDS)
        return programs.get("step", 3)

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(ask, number) for number in range(4)]
        # Until the first one is done the others can only wait; were they to compile as well, they would have begun.
        threading.Timer(0.2, waiting.set).start()
        assert len({id(entry.result(SECONDS)) for entry in found}) == 1
    assert compiled == [3] and programs.num_compilations == 1


def test_get_another_program_does_not_wait():
    slow_begun, slow_may_end = threading.Event(), threading.Event()

    def build(size, options):
        if size == 1:
            slow_begun.set()
            assert slow_may_end.wait(SECONDS)
        return FakeProgram(lambda: size)

    programs = cache_of(build)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(programs.get, "step", 1)
        assert slow_begun.wait(SECONDS)
        assert programs.get("step", 2)() == 2 and not slow.done()
        slow_may_end.set()
        assert slow.result(SECONDS)() == 1


def test_get_after_a_failure_tries_again():
    compiled = []

    def build(size, options):
        compiled.append(size)
        if len(compiled) == 1:
            raise RuntimeError("out of memory")
        return FakeProgram(lambda: size)

    programs = cache_of(build)
    with pytest.raises(RuntimeError, match="out of memory"):
        programs.get("step", 1)
    assert programs.num_compilations == 0
    assert programs.get("step", 1) is programs.get("step", 1)
    assert compiled == [1, 1] and programs.num_compilations == 1


def test_compile_all_compiles_what_is_missing_with_its_options():
    compiled = []

    def build(size, options):
        compiled.append((size, options))
        return FakeProgram(lambda: size)

    programs = cache_of(build, lambda size: {"size": size})
    programs.get("step", 2)
    programs.compile_all([("step", 1), ("step", 2), ("step", 1)])
    assert sorted(compiled, key=lambda entry: entry[0]) == [(1, {"size": 1}), (2, {"size": 2})]
    programs.clear()
    programs.get("step", 1)
    assert programs.num_compilations == 3


def test_compile_all_first_of_equal_matrix_products_is_compiled_alone():
    """Programs 0 to 7 in two kinds; all but one of each kind may be compiled at once."""
    at_work, together, lock = [], [], threading.Lock()

    def build(size, options):
        with lock:
            at_work.append(size)
            together.append(list(at_work))
        time.sleep(0.02)
        with lock:
            at_work.remove(size)
        return FakeProgram(lambda: size)

    programs = cache_of(build, tuned_alike=lambda size: size % 2)
    programs.compile_all([("step", size) for size in range(8)])
    first = [next(sizes[-1] for sizes in together if sizes[-1] % 2 == kind) for kind in (0, 1)]
    for sizes in together:
        for kind, number in enumerate(first):
            alike = [size for size in sizes if size % 2 == kind]
            assert number not in alike or alike == [number]
    assert programs.num_compilations == 8


def test_compile_in_background_a_program_that_is_wanted_comes_next():
    build = HeldBuild()
    programs = cache_of(build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)  # one thread
        programs.compile_in_background([("step", size) for size in (1, 2, 3, 4)])
    assert build.begun.wait(SECONDS) and not programs.is_complete
    keys = [("step", 4), ("step", 5)]
    assert programs.first_ready(keys) == ("step", 4) and not programs.are_ready(keys[:1])
    build.may_end.set()
    programs.wait()
    assert programs.is_complete and build.sizes == [1, 4, 2, 3]
    assert programs.first_ready([("step", 9), ("step", 3)]) == ("step", 3)


def test_compile_in_background_a_failure_leaves_the_others(caplog):
    def build(size, options):
        if size == 2:
            raise RuntimeError("out of memory")
        return FakeProgram(lambda: size)

    programs = cache_of(build)
    programs.compile_in_background([("step", size) for size in (1, 2, 3)])
    programs.wait()
    assert programs.are_ready([("step", 1), ("step", 3)]) and not programs.are_ready([("step", 2)])
    assert "('step', 2)" in caplog.text and "out of memory" in caplog.text


def test_compile_next_compiles_once_and_does_not_try_a_failure_again(caplog):
    tried = []

    def build(size, options):
        tried.append(size)
        if size == 2:
            raise ValueError("size 2 does not compile")
        return FakeProgram(lambda: size)

    programs = cache_of(build)
    programs.get("step", 1)
    for _ in range(2):
        for size in (1, 2, 3):
            programs.compile_next(("step", size))
        programs.wait()
    assert sorted(tried) == [1, 2, 3]
    assert [programs.are_ready([("step", size)]) for size in (1, 2, 3)] == [True, False, True]
    assert caplog.text.count("could not be compiled") == 1


def test_compile_next_overtakes_what_the_background_has_to_do():
    build = HeldBuild()
    programs = cache_of(build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        programs.compile_in_background([("step", size) for size in (1, 2, 3)])
        assert build.begun.wait(SECONDS)
        programs.compile_next(("step", 3))
    build.may_end.set()
    programs.wait()
    assert build.sizes == [1, 3, 2]


def test_compile_next_keeps_the_order_of_its_programs():
    build = HeldBuild()
    programs = cache_of(build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)
        programs.compile_next(("step", 1))
        assert build.begun.wait(SECONDS)
        programs.compile_next(*(("step", size) for size in (5, 1, 4)))
        programs.compile_next(("step", 3), ("step", 4))
    build.may_end.set()
    programs.wait()
    assert build.sizes == [1, 3, 5, 4]


def test_compile_next_lets_half_of_the_cores_work():
    build = HeldBuild()
    programs = cache_of(build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 8)
        for size in range(6):
            programs.compile_next(("step", size))
        assert len(programs._workers) == 4
    build.may_end.set()
    programs.wait()
    assert sorted(build.sizes) == list(range(6)) and programs._workers == []


def test_may_work_ahead_needs_a_second_core_any_order_and_no_tuning(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert ProgramCache({}, {}).may_work_ahead
    assert not ProgramCache({}, {}, in_order=True).may_work_ahead
    tuned = cache_of(HeldBuild(), tuned_alike=lambda size: size)
    assert tuned.may_compile_beside and not tuned.may_work_ahead
    build = HeldBuild()
    programs = cache_of(build)
    programs.compile_in_background([("step", 1)])
    assert not programs.may_compile_beside and not programs.may_work_ahead
    build.may_end.set()
    programs.wait()
    assert programs.may_work_ahead
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert not ProgramCache({}, {}).may_compile_beside


def test_clear_keeps_no_program_that_is_compiled_later():
    build = HeldBuild()
    programs = cache_of(build)
    programs.compile_next(("step", 1))
    assert build.begun.wait(SECONDS) and programs.is_complete  # it is no warm-up
    programs.clear()
    programs.compile_next(("step", 2))
    build.may_end.set()
    programs.wait()
    assert not programs.are_ready([("step", 1)]) and programs.num_compilations == 1
    assert programs._workers == []


def test_clear_ends_the_background():
    build = HeldBuild()
    programs = cache_of(build)
    programs.compile_in_background([("step", size) for size in range(100)])
    assert build.begun.wait(SECONDS)
    programs.clear()
    build.may_end.set()
    programs.wait()
    assert programs.num_compilations < 100
