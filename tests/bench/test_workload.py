"""Traces and prompts: what is drawn follows from the seed, wrong files name their line."""

import numpy as np
import pytest

from jaxinfer.bench.workload import TraceEntry, draw_trace, random_prompts, read_trace, with_poisson_arrivals

SHAPE = {"prompt_len": 100, "output_len": 20, "spread": 0.5}


@pytest.mark.parametrize("distribution", ["uniform", "lognormal"])
def test_draw_trace_equal_seeds_give_equal_traces(distribution):
    drawn = draw_trace(50, distribution=distribution, seed=3, **SHAPE)
    assert drawn == draw_trace(50, distribution=distribution, seed=3, **SHAPE)
    assert drawn != draw_trace(50, distribution=distribution, seed=4, **SHAPE)


def test_draw_trace_lengths_keep_mean_and_range():
    uniform = [entry.prompt_len for entry in draw_trace(4000, distribution="uniform", seed=0, **SHAPE)]
    assert min(uniform) >= 50 and max(uniform) <= 150
    lognormal = [entry.prompt_len for entry in draw_trace(4000, distribution="lognormal", seed=0, **SHAPE)]
    assert min(lognormal) >= 1 and max(lognormal) <= 400
    # Standard errors of the means: 29 / sqrt(4000) = 0.5 and 53 / sqrt(4000) = 0.8.
    assert abs(np.mean(uniform) - 100) < 3 and abs(np.mean(lognormal) - 100) < 5


def test_draw_trace_no_spread_gives_the_means():
    for distribution in ("uniform", "lognormal"):
        drawn = draw_trace(3, distribution=distribution, prompt_len=7, output_len=1, spread=0.0, seed=0)
        assert drawn == [TraceEntry(prompt_len=7, output_len=1)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distribution": "zipf"}, "distribution must be one of uniform, lognormal, got 'zipf'"),
        ({"spread": 1.5}, r"spread must be in \[0, 1\], got 1.5"),
        ({"output_len": 0}, "output_len must be >= 1, got 0"),
    ],
)
def test_draw_trace_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        draw_trace(2, **{"distribution": "uniform", "seed": 0, **SHAPE, **change})


def test_with_poisson_arrivals_rate_is_kept_and_seeded():
    trace = [TraceEntry(prompt_len=1, output_len=1)] * 4000
    times = [entry.arrival_time for entry in with_poisson_arrivals(trace, 10.0, seed=1)]
    assert times == sorted(times)
    assert times == [entry.arrival_time for entry in with_poisson_arrivals(trace, 10.0, seed=1)]
    assert abs(times[-1] - 400) < 30  # 400 s expected, standard deviation 6.3
    with pytest.raises(ValueError, match="request_rate must be > 0 requests per second, got 0"):
        with_poisson_arrivals(trace, 0, seed=1)


def test_read_trace_lines_become_entries(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt_len": 3, "output_len": 4}\n\n{"prompt_len": 5, "output_len": 6, "arrival_time": 1.5}\n')
    assert read_trace(file) == [
        TraceEntry(prompt_len=3, output_len=4),
        TraceEntry(prompt_len=5, output_len=6, arrival_time=1.5),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[3, 4]", r"line 2: expected a JSON object, got \[3, 4\]"),
        ('{"prompt_len": 3}', "line 2: output_len is missing"),
        ('{"prompt_len": 0, "output_len": 4}', "line 2: prompt_len must be >= 1, got 0"),
        (
            '{"prompt_len": 3, "output_len": 4, "arival_time": 0}',
            "line 2: unknown argument 'arival_time'; did you mean",
        ),
        ('{"prompt_len": 3, "output_len": 4, "arrival_time": -1}', "line 2: arrival_time must be >= 0 seconds, got -1"),
    ],
)
def test_read_trace_wrong_line_is_named(tmp_path, line, message):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt_len": 3, "output_len": 4}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_trace(file)


def test_read_trace_empty_or_missing_raises(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="holds no requests"):
        read_trace(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such trace file"):
        read_trace(tmp_path / "none")


def test_random_prompts_share_prefix_and_follow_seed():
    prompts = random_prompts([5, 9, 2], vocab_size=1000, seed=(1, 2), prefix_len=4)
    assert [len(prompt) for prompt in prompts] == [5, 9, 2]
    assert prompts[0][:4] == prompts[1][:4] and prompts[2] == prompts[0][:2]
    assert prompts[0][4:] != prompts[1][4:5]
    assert prompts == random_prompts([5, 9, 2], vocab_size=1000, seed=(1, 2), prefix_len=4)
    assert prompts != random_prompts([5, 9, 2], vocab_size=1000, seed=(1, 3), prefix_len=4)
    assert max(max(prompt) for prompt in random_prompts([500], vocab_size=7, seed=(0,))) == 6
