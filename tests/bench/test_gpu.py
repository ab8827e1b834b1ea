"""The plan's names and order, what is skipped, a section that hangs; marks from records."""

import sys
import time

import pytest
from conftest import GOLDEN

from jaxinfer.bench import gpu, marks
from jaxinfer.bench.gpu import Outcome, Section, choose, full_plan, run, tiny_plan

PLAN = full_plan(GOLDEN, GOLDEN)
RECORD = {"device": {"memory_bytes": 24e9}}


def test_full_plan_begins_with_kernels_and_fits_its_marks():
    assert [section.name for section in PLAN][:3] == ["kernels", "8b", "0.6b"]
    assert {mark.section for mark in marks.MARKS} <= {section.name for section in PLAN}
    assert sum(section.expected_s for section in PLAN) < 600


def test_plans_have_equal_engine_settings_for_a_shape():
    """Programs of earlier sections are found in the compilation cache only if all settings are equal."""
    for name in ("8b", "trace-8b", "peer-8b", "8b-int8"):
        (section,) = choose(PLAN, [name])
        assert section.arguments[section.arguments.index("--num-kv-pages") + 1] == "2432"


def test_choose_keeps_the_order_of_the_names():
    assert [section.name for section in choose(PLAN, ["golden", "8b"])] == ["golden", "8b"]
    assert choose(PLAN, []) == PLAN
    with pytest.raises(ValueError, match="sections must be one of kernels"):
        choose(tiny_plan(GOLDEN), ["none"])


@pytest.fixture
def commands_are_python(monkeypatch, tmp_path):
    """Sections' arguments are Python programs."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$4"\n')
    program.chmod(0o700)
    monkeypatch.setattr(gpu.sys, "executable", str(program))


def test_run_section_that_hangs_is_stopped_and_saved(commands_are_python, tmp_path):
    plan = [
        Section(name="slow", arguments=("import time; time.sleep(60)",), limit_s=1),
        Section(name="broken", arguments=("raise ValueError('no such model')",)),
        Section(name="good", arguments=("print('a table')",)),
    ]
    saved, shown, started = [], [], time.monotonic()
    run(plan, 60, shown.append, save=lambda outcomes: saved.append(len(outcomes)), keep=tmp_path)
    assert time.monotonic() - started < 30 and saved == [1, 2, 3]
    (outcomes,) = [run(plan, 60, shown.append)]
    assert [outcome.status for outcome in outcomes] == ["timed out", "FAILED", "ok"]
    assert outcomes[1].note == "ValueError: no such model" and "a table" in shown
    assert (tmp_path / "good.txt").read_text() == "a table\n"


def test_run_skips_what_cannot_fit(monkeypatch):
    monkeypatch.setattr(gpu, "_run_section", lambda section, *_: done(section.name, RECORD))
    plan = [
        Section(name=name, arguments=("x",), memory_bytes=size) for name, size in (("a", 0), ("b", 36e9), ("c", 1e9))
    ]
    assert [outcome.status for outcome in run(plan, 60, print)] == ["ok", "skipped", "ok"]
    late = [Section(name="d", arguments=("x",), expected_s=300)]
    assert run(late, 60, print)[0].note == "60 s of the budget left; raise budget_seconds"


def done(name, record):
    return Outcome(name=name, status="ok", seconds=1.0, note="", record=record)


def test_marks_seen_and_both_goals():
    rows = [{"kind": "decode", "batch_size": 1, "ms": 10.0, "floor_ms": 4.0, "host_share": 0.25}]
    rows += [{"kind": "decode", "batch_size": 32, "ms": 10.0, "floor_ms": 5.0, "host_share": None}]
    sides = [{"peer": {"seconds": 3.0}, "ours": {"seconds": 2.0}}]
    records = {"8b": {"result": {"rows": rows}}, "trace-8b": {"result": {"rows": sides}}}
    seen = {mark.name: mark.seen(records) for mark in marks.MARKS}
    assert seen["8b decode B=1, % of floor"] == "40" and seen["8b decode B=32, % of floor"] == "50"
    assert (
        seen["8b decode B=32, host time exposed, %"]
        == seen["8b decode B=128, % of floor"]
        == seen["kernels right, %"]
        == "-"
    )
    assert seen["8b trace, times transformers' continuous batching"] == "1.5"
    assert marks.render(records).splitlines()[0].split() == ["mark", "seen", "first", "goal", "final", "goal"]


def test_marks_peer_that_failed_has_no_ratio():
    rows = [{"peer": None, "ours": {"seconds": 2.0}, "failure": "out of memory"}]
    record = {"command": "compare_apart", "result": {"rows": rows}}
    assert next(mark for mark in marks.MARKS if mark.section == "trace-8b").seen({"trace-8b": record}) == "-"
    assert marks.headline(record) == "ours 2.00 s, the peer failed: out of memory"
