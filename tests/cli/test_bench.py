"""Every command end to end with the smallest sizes; no time decides anything here."""

import contextlib
import itertools
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import GOLDEN, load_golden
from typer.testing import CliRunner

from jaxinfer.bench import compare_apart as apart_bench
from jaxinfer.bench import golden as golden_bench
from jaxinfer.bench import host as host_bench
from jaxinfer.bench import kernels as kernels_bench
from jaxinfer.bench import peers, report
from jaxinfer.bench.golden import TOLERANCES, GoldenCase, GoldenResult, largest_allowed_error
from jaxinfer.bench.growth import GrowthSeries
from jaxinfer.bench.latency import timed_runs
from jaxinfer.bench.profile import ProfileRow
from jaxinfer.bench.report import Summary
from jaxinfer.bench.session import Session, Target, engine_config
from jaxinfer.bench.static_batches import in_static_batches
from jaxinfer.bench.step_parts import StepParts
from jaxinfer.cli import bench as commands
from jaxinfer.models.registry import parse_model_config

GQA = str(load_golden("gqa").path)
LENGTHS = ("--prompt-len", 12, "--output-len", 6)
SMALL = ("--repeats", 1, "--batch-size", "2")
RATES = ("--read-mib", 1, "--matmul-size", 64)


@pytest.fixture
def run():
    def run(*arguments, code=0):
        result = CliRunner().invoke(commands.app, [*map(str, arguments)], env={"COLUMNS": "200"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(scope="module")
def kept():
    """One session for all tests: its programs are compiled once."""
    target = Target(model=GQA)
    config = parse_model_config(target.fields())
    engine = engine_config({"max_num_batched_tokens": 64}, config, num_seqs=2, num_tokens=96)
    with Session(config, target.store(config), engine) as session:
        yield session


@pytest.fixture
def session(kept, monkeypatch):
    class KeptSession(Session):
        def __new__(cls, *_):
            return contextlib.nullcontext(kept)

    monkeypatch.setattr("jaxinfer.bench.session.Session", KeptSession)
    return kept


def is_png(file):
    return file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_latency_json_has_versions_device_settings_and_rows(run, tmp_path):
    file, plot = tmp_path / "result.json", tmp_path / "plot.png"
    shown = run("latency", "--random-weights", GQA, *LENGTHS, *SMALL, "--json", file, "--plot", plot, "--page-size", 16)
    assert "decode ms/step" in shown.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"command", "versions", "device", "load_average", "command_line", "settings", "result"}
    assert record["command"] == "latency" and record["versions"]["jax"] == jax.__version__
    assert record["device"]["platform"] == "cpu" and record["settings"]["random_weights"] == GQA
    assert record["settings"]["engine"]["page_size"] == 16 and record["settings"]["engine"]["max_num_seqs"] == 2
    (row,) = record["result"]["rows"]
    assert (row["batch_size"], row["prompt_len"], row["output_len"]) == (2, 12, 6)
    assert row["total_ms"] == pytest.approx(row["prefill_ms"] + 5 * row["decode_ms"])
    assert row["decode_tokens_per_s"] == pytest.approx(2e3 / row["decode_ms"])
    assert is_png(plot)


def test_latency_dash_prints_json_only(run, session):
    assert json.loads(run("latency", "--model", GQA, *LENGTHS, *SMALL, "--json", "-").stdout)["command"] == "latency"


def test_steering_takes_turns_and_plain_requests_keep_their_outputs(run, session, monkeypatch):
    add, is_steered = session.engine.add_request, []

    def add_request(request):
        is_steered.append(bool(request.hooks))
        add(request)

    monkeypatch.setattr(session.engine, "add_request", add_request)
    arguments = ("--model", GQA, *LENGTHS, "--repeats", 1, "--num-requests", 2)
    result = json.loads(run("steering", *arguments, "--json", "-").stdout)["result"]
    assert is_steered == [False, False, True, False] * 2  # the first of each kind is not timed
    assert len(result["plain_tokens_per_s"]) == len(result["steered_tokens_per_s"]) == 1
    assert (result["num_steered"], result["num_differing"]) == (1, 0)
    with pytest.raises(ValueError, match="num_steered must be <= num_requests, got 3 > 2"):
        run("steering", *arguments, "--num-steered", 3)


def test_throughput_counts_are_the_traces(run, session, tmp_path):
    trace, plot = tmp_path / "trace.jsonl", tmp_path / "plot.png"
    trace.write_text('{"prompt_len": 9, "output_len": 4}\n{"prompt_len": 15, "output_len": 2}\n')
    arguments = ("--model", GQA, "--trace", trace, "--json", "-", "--plot", plot)
    result = json.loads(run("throughput", *arguments).stdout)["result"]
    assert (result["num_requests"], result["prompt_tokens"], result["output_tokens"]) == (2, 24, 6)
    assert result["num_compilations"] == result["num_preemptions"] == 0
    assert result["prefix_cache_queries"] == 24 and result["prefix_cache_hits"] == 0
    assert set(result["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert is_png(plot)


def test_throughput_arrivals_warm_up_everything_and_prefixes_hit(run, session, monkeypatch):
    warmed = []
    monkeypatch.setattr(session, "warmup", lambda: warmed.append(True))
    arguments = ("--model", GQA, "--num-requests", 3, "--spread", 0, *LENGTHS, "--prompt-len", 70, "--prefix-len", 64)
    record = json.loads(run("throughput", *arguments, "--request-rate", 500, "--json", "-").stdout)
    assert warmed and record["result"]["output_tokens"] == 18
    assert record["result"]["prefix_cache_hits"] >= 64
    assert record["settings"]["request_rate"] == 500


def test_roofline_shows_rates_and_shares(run, session, monkeypatch, tmp_path):
    plot = tmp_path / "plot.png"
    arguments = ("--model", GQA, *SMALL, *RATES, "--context", 14, "--num-steps", 4, "--plot", plot)
    compiled, rehearsed = session.decoder.compiled, []
    monkeypatch.setattr(session.decoder, "compiled", lambda *key: rehearsed.append(key[0]) or compiled(*key))
    shown = run("roofline", *arguments, "--prefill-len", "9,40", "--profile", "--keep", tmp_path).stdout
    assert "GB/s measured" in shown and "of floor" in shown and "prefill ms" in shown
    assert shown.count("a step under the profiler") == len(list(tmp_path.glob("*.xplane.pb.gz"))) == 3
    assert set(rehearsed) == {"forward", "sample"}
    assert is_png(plot)


def test_profile_parts_and_rest_sum_to_the_step(run, session, tmp_path):
    plot, file = tmp_path / "parts.png", tmp_path / "parts.json"
    arguments = ("--model", GQA, "--context", 24, "--num-steps", 2, "--json", file, "--plot", plot)
    shown = run("profile", *SMALL, *arguments).stdout
    (row,) = json.loads(file.read_text())["result"]["rows"]
    assert list(row["parts"]) == ["products", "head", "attention", "cache write", "sampler"]
    assert row["step_ms"] > 0 and row["host_ms"] > 0 and min(row["parts"].values()) > 0
    assert abs(row["context"] - 24) < 4
    profile_row = ProfileRow(**row)
    assert profile_row.rest_ms + sum(row["parts"].values()) == pytest.approx(row["step_ms"])
    assert f"{profile_row.ratio:.2f}" in shown and "rest" in shown
    assert session.engine.log is None
    assert is_png(plot)


def test_profile_products_are_those_of_every_layer(session):
    """Four matrices a layer: queries, keys and values are one, gate and up another."""
    weights = [array for array in session.decoder.params.values() if array.ndim == 3]
    config = session.model_config
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    norms = sum(array.size for array in session.decoder.params.values() if array.ndim < 2 or array.shape[0] == 1)
    norms -= sum(array.size for array in weights)
    assert len(weights) == 4 * config.num_layers
    assert sum(array.size for array in weights) == config.num_parameters - tables - norms
    assert next(part.name for part in StepParts(session).parts(2, 8)) == "products"


def test_growth_series_with_their_slopes(run, tmp_path):
    plot, file = tmp_path / "growth.png", tmp_path / "growth.json"
    sizes = ("--batch-size", "1,2", "--context", "8,16", "--layers", "1,2", "--fixed-batch", 2, "--fixed-context", 8)
    small = ("--num-steps", 2, "--repeats", 1, "--max-num-batched-tokens", 64, "--json", file, "--plot", plot)
    shown = run("growth", "--random-weights", GOLDEN / "gqa" / "config.json", *sizes, *small).stdout
    found = json.loads(file.read_text())["result"]["series"]
    assert {entry["name"]: entry["sizes"] for entry in found} == {"batch": [1, 2], "context": [8, 16], "layers": [1, 2]}
    assert all(len(entry["ms"]) == len(entry["floor_ms"]) == 2 and min(entry["ms"]) > 0 for entry in found)
    assert shown.count("at least") == 3
    assert is_png(plot)


def test_growth_slope_is_the_straight_lines():
    series = GrowthSeries(name="context", sizes=(64, 128, 256), ms=(3.0, 5.0, 9.0), floor_ms=(1.0, 1.5, 2.5))
    assert (series.slope, series.floor_slope) == pytest.approx((2 / 64, 0.5 / 64))


def test_compare_equal_weights_give_equal_tokens(run, session, monkeypatch, tmp_path):
    class EqualPeer:
        name = "equal"

        def __init__(self, checkpoint, **_):
            assert (checkpoint / "model.safetensors").exists()
            self.generate = session.generate

        def tune(self, prompts):
            return 3

    monkeypatch.setattr(peers, "TransformersPeer", EqualPeer)
    arguments = ("--random-weights", GQA, *SMALL, *LENGTHS, "--json", "-", "--plot", tmp_path / "plot.png")
    result = json.loads(run("compare", *arguments).stdout)["result"]
    assert result["peer"] == "equal" and result["dtype"] == "float32"
    assert result["rows"][0]["peer_threads"] == 3
    assert [row["equal_rows"] for row in result["rows"]] == [1.0]
    assert result["rows"][0]["ratio"] == result["rows"][0]["peer_s"] / result["rows"][0]["ours_s"]
    assert is_png(tmp_path / "plot.png")


def test_compare_mixed_serves_the_same_requests_on_both_sides(run, session, monkeypatch, tmp_path):
    class StaticPeer:
        name, mixed_batching = "equal", "static batches"

        def __init__(self, *_, **__):
            pass

        def tune(self, prompts):
            assert len(prompts) == 2
            return 1

        def serve_mixed(self, prompts, output_lens, *, max_num_seqs):
            return in_static_batches(session.generate, prompts, output_lens, batch_size=max_num_seqs)

    monkeypatch.setattr(peers, "TransformersPeer", StaticPeer)
    arguments = ("compare", "--model", GQA, *LENGTHS, "--repeats", 1, "--mixed", 5, "--spread", 0.5)
    record = json.loads(run(*arguments, "--json", "-", "--plot", tmp_path / "plot.png").stdout)
    result = record["result"]
    assert record["command"] == "compare_mixed" and record["settings"]["num_requests"] == 5
    assert (result["num_requests"], result["max_num_seqs"], result["equal_rows"]) == (5, 2, 1.0)
    assert 6 <= result["shortest"][0] < result["longest"][0] <= 18 and result["ours_first_s"] > 0
    assert 5 * result["shortest"][1] < result["output_tokens"] < 5 * result["longest"][1]
    assert is_png(tmp_path / "plot.png")
    assert "peer: equal, static batches of 2; ours: continuous batching of 2" in run(*arguments).stdout


@pytest.mark.matrix  # CI runs the command in the rehearsal for a GPU
def test_startup_parts_sum_to_total(run):
    result = json.loads(run("startup", "--model", GQA, "--prompt-len", 12, "--json", "-").stdout)["result"]
    for times in (result["cold"], result["warm"]):
        assert times.pop("warmup_s") is None
        assert sum(times.values()) == pytest.approx(2 * times["total_s"])


def test_golden_agrees_and_failing_case_sets_the_status(run, tmp_path, monkeypatch):
    (tmp_path / "gqa").symlink_to(GQA)
    assert run("golden", tmp_path, "--dtype", "float32,bfloat16").stdout.count("OK") == 2
    assert "skipped" in run("golden", tmp_path, "--budget-seconds", -1).stdout
    monkeypatch.setattr(golden_bench, "measure", lambda *_, **__: GoldenResult(cases=(golden_case(),), skipped=()))
    assert "FAIL" in run("golden", tmp_path, code=1).stdout


def golden_case(**changes):
    about = {"name": "a", "dtype": "float32", "num_tokens": 72, "num_diverged": 0, "num_texts": 3, "max_margin": 0.0}
    about |= {"max_logprob_error": 0.1, "mean_logprob_error": 0.0, "seconds": 0.0} | changes
    return GoldenCase(**{"tolerance": TOLERANCES[about["dtype"]]} | about)


@pytest.mark.parametrize(
    ("changes", "is_ok"),
    [
        ({"max_logprob_error": 1e-5}, True),
        ({"max_logprob_error": 1e-5, "num_diverged": 1, "max_margin": 1e-6}, False),  # float32 has no near-ties
        ({"dtype": "bfloat16", "num_diverged": 1, "max_margin": 0.05}, True),
        ({"dtype": "bfloat16", "num_diverged": 1, "max_margin": 1.0}, False),
        ({"dtype": "bfloat16", "max_logprob_error": 0.26}, False),
        ({"dtype": "bfloat16", "max_logprob_error": 0.26, "tolerance": 0.63}, True),
        ({"dtype": "bfloat16", "num_diverged": 1, "max_margin": 0.26, "tolerance": 0.63}, False),
    ],
)
def test_golden_case_may_part_at_near_ties_in_bfloat16(changes, is_ok):
    assert golden_case(**changes).is_right == is_ok


def test_golden_checkpoint_may_be_as_far_off_in_bfloat16_as_transformers_is(tmp_path):
    errors = json.loads((GOLDEN / "bfloat16.json").read_text())
    assert errors.keys() == {path.parent.name for path in GOLDEN.glob("*/expected.npz")}
    beyond = {name: error for name, error in errors.items() if error > TOLERANCES["bfloat16"]}
    assert beyond.keys() == {"phi3_long"}
    for folder, dtype, expected in (
        (GOLDEN / "phi3_long", "bfloat16", beyond["phi3_long"]),
        (GOLDEN / "phi3_long", "float32", TOLERANCES["float32"]),
        (GOLDEN / "gqa", "bfloat16", TOLERANCES["bfloat16"]),
        (tmp_path / "phi3_long", "bfloat16", TOLERANCES["bfloat16"]),
    ):
        assert largest_allowed_error(folder, dtype) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--model", "nowhere"), "no such checkpoint directory: nowhere"),
        (("latency", "--model", GQA, "--batch-size", "1,x"), "batch_size must be whole numbers >= 1 separated"),
        (("latency", "--model", GQA, "--output-len", 1), "output_len must be >= 2"),
        (("latency", "--model", GQA, "--page-size", 9), "page_size must be a power of two, got 9"),
        (("latency", "--model", GQA, "--data-parallel-size", 2), "data_parallel_size must be 1 here, got 2"),
        (("latency", "--random-weights", "none.json"), "none.json does not exist"),
        (
            ("profile", "--model", GQA, "--context", 3),
            "context must be above half of the 63 steps of all turns, got 3",
        ),
        (
            ("profile", "--model", GQA, "--attention-backend", "pallas"),
            'kernels of attention_backend "pallas" join the parts',
        ),
        (
            ("profile", "--model", str(load_golden("mixtral").path)),
            "the parts of a step are known for models without experts",
        ),
        (("growth", "--random-weights", GQA, "--layers", "2"), "layers must be two different sizes or more, got"),
        (("growth", "--random-weights", GQA, "--layers", "1,99"), "layers must be <= 2, the model's, got 99"),
        (
            ("growth", "--random-weights", GQA, "--tensor-parallel-size", 2, "--batch-size", "1,2"),
            "growth compares with one device, got a mesh of 2",
        ),
        (
            ("roofline", "--model", GQA, "--context", 3, *RATES),
            "context must be above half of the 64 steps of all runs, got 3",
        ),
        (("compare", "--model", GQA, "--peer", "other"), "peer must be one of transformers, llama.cpp, got 'other'"),
        (("compare", "--model", GQA, "--apart", "--mixed", 2), "mixed takes turns with the peer; leave apart out"),
        (("latency", "--model", GQA, "--json", "none/a.json"), "cannot write none/a.json: there is no folder none"),
        (("latency", "--model", GQA, "--plot", "none/a.png"), "cannot write none/a.png: there is no folder none"),
        (("golden", str(GOLDEN), "--json", "none/a.json"), "cannot write none/a.json: there is no folder none"),
        (("golden", str(GOLDEN), "--cases", "gqa,none"), "has no case none; cases must name its folders"),
        (("golden", "nowhere"), "nowhere has no \\*/expected.npz"),
    ],
)
def test_wrong_arguments_name_the_argument(run, arguments, message):
    """The command line makes one line of each (test_main.py)."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("matplotlib", ("latency", "--plot", "x.png")),
        ("torch", ("compare",)),
        ("gguf", ("compare", "--peer", "llama.cpp")),
    ],
)
def test_missing_package_is_named(run, monkeypatch, module, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=f"{module}.*pip install|pip install.*{module}"):
        run(*arguments, "--model", GQA)


def test_time_steps_context_and_tokens_are_what_they_say(session):
    times = timed_runs(session, 2, 12, 4, repeats=2, seed=0)
    # The first tokens are read when 13 are known; the steps that follow read 13, 14, 15 and 16 positions.
    assert [entry.mean_context for entry in times] == [14.5, 14.5]
    assert not session.engine.has_unfinished() and session.engine.stats().num_requests_running == 0
    before = session.generate([(1, 2, 3)], 8)
    assert before == session.generate([(1, 2, 3)], 8) and len(before[0]) == 8


def test_compile_for_finds_what_the_work_then_needs(kept):
    work = lambda session: session.time_steps(session.prompts(2, 33, 8), 3)  # noqa: E731
    kept.compile_for(work)
    before = kept.engine.stats().num_compilations
    work(kept)
    assert kept.engine.stats().num_compilations == before


def test_time_steps_batch_that_ends_or_waits_names_the_knobs(session):
    with pytest.raises(ValueError, match=r"not all 2 rows decode together .* raise max_model_len or num_kv_pages"):
        session.time_steps(session.prompts(2, 12, 0), 300)
    assert not session.engine.has_unfinished()


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (99.0, True)])
def test_warn_if_busy_says_so(monkeypatch, capsys, load, warned):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    report.warn_if_busy()
    assert ("load 99.0 on 2 cores" in capsys.readouterr().err) == warned


def test_summary_percentiles_interpolate():
    assert Summary.of(list(range(101))) == Summary(mean=50.0, p50=50.0, p90=90.0, p99=99.0)
    assert Summary.of([2.0]) == Summary(mean=2.0, p50=2.0, p90=2.0, p99=2.0)
    assert np.isclose(Summary.of([0.0, 1.0]).p90, 0.9)


def test_gpu_rehearsal_sections_budget_and_files(run, tmp_path):
    (tmp_path / "gqa").symlink_to(GQA)
    file, keep = tmp_path / "all.json", tmp_path / "kept"
    arguments = ("gpu", "--golden", tmp_path, "--tiny", "--json", file)
    shown = run(*arguments, "--sections", "golden", "--keep", keep).stdout
    assert "2 of 2 cases right" in shown and "golden right, % of cases" in shown
    (outcome,) = json.loads(file.read_text())
    assert outcome["status"] == "ok" and outcome["record"]["result"]["cases"][0]["name"] == "gqa"
    assert "OK" in (keep / "golden.txt").read_text()
    assert "skipped" in run(*arguments, "--budget-seconds", 1).stdout
    with pytest.raises(ValueError, match=r"sections must be one of kernels, .*got 'none'"):
        run(*arguments, "--sections", "golden,none")


def test_kernels_right_and_wrong_backends(run, monkeypatch):
    small = ("--num-cases", 2, "--decode-rows", 2, "--context", 64, "--prompt-len", 32)
    result = json.loads(run("kernels", *small, "--backend", "xla", "--json", "-").stdout)["result"]
    assert [row["max_error"] < 1e-4 for row in result["rows"] if row["ms"] is None] == [True, True]
    assert len([row for row in result["rows"] if row["ms"] is not None]) == 2

    def broken(*arguments, **keywords):
        raise NotImplementedError("no head of 128")

    monkeypatch.setitem(kernels_bench.BACKENDS, "zeros", lambda q, *arguments, **keywords: 0 * q)
    monkeypatch.setitem(kernels_bench.BACKENDS, "broken", broken)
    shown = run("kernels", *small, "--backend", "zeros,broken", code=1).stdout
    assert "WRONG: broken float32 decode head 64: NotImplementedError: no head of 128" in shown
    assert "WRONG: zeros float32 decode head 64: off by" in shown


def test_kernel_cost_counts_a_shared_text_once():
    decode, prefill = kernels_bench.large_cases(num_rows=2, context=100, prompt_len=32)
    num_bytes, num_ops = kernels_bench.cost(decode, kernels_bench.make_inputs(decode))
    assert num_bytes == 2 * (2 * 200 * 8 * 128 + 2 * 2 * 32 * 128) and num_ops == 4 * 200 * 32 * 128
    num_bytes, num_ops = kernels_bench.cost(prefill, kernels_bench.make_inputs(prefill))
    assert num_bytes == 2 * (2 * 32 * 8 * 128 + 2 * 32 * 32 * 128)
    assert num_ops == 4 * (32 * 33 // 2) * 32 * 128  # causal: 1 + 2 + .. + 32 scores


def test_compare_apart_peer_that_fails_leaves_our_times(run, session, monkeypatch):
    found = {"name": "other 1.0", "load_s": 1.0, "works": [{"first_s": 9.0, "seconds": 4.0}, "OutOfMemoryError: big"]}
    monkeypatch.setattr(apart_bench, "_peer_times", lambda order: found)
    arguments = ("compare", "--apart", "--random-weights", GQA, *LENGTHS, "--repeats", 1, "--batch-size", "1,2")
    rows = json.loads(run(*arguments, "--json", "-").stdout)["result"]["rows"]
    assert rows[0]["peer"]["seconds"] == 4.0 and rows[1]["peer"] is None and rows[1]["ours"]["seconds"] > 0
    assert rows[1]["failure"] == "OutOfMemoryError: big"
    shown = run(*arguments).stdout
    assert "the peer failed in the batch of 2: OutOfMemoryError: big" in shown and "peer: other 1.0" in shown


def test_compare_apart_peer_that_is_stopped_leaves_what_it_has_written():
    done = {"first_s": 1.0, "seconds": 2.0, "is_whole": True}
    lines = [
        {"name": "other 1.0", "load_s": 3.0},
        {"number": 0, "began_at": 10.0, "first_s": 1.0},
        {"number": 0, "result": done},
        {"number": 1, "began_at": 20.0, "first_s": 5.0},
    ]
    found = apart_bench._read_lines(lines, 3, "other", 62.0, 70.0)
    assert found["name"] == "other 1.0" and found["works"][0] == done
    assert found["works"][1] == {"first_s": 5.0, "seconds": 42.0, "is_whole": False}
    assert found["works"][2] == "stopped after 70 s; raise peer_limit"


def test_compare_apart_trace_is_one_work_with_more_requests_than_slots(run, session, monkeypatch):
    orders = []

    def peer_times(order):
        orders.append(order)
        return {"name": "other", "load_s": 1.0, "works": [{"first_s": 9.0, "seconds": 4.0}]}

    monkeypatch.setattr(apart_bench, "_peer_times", peer_times)
    arguments = ("--random-weights", GQA, *LENGTHS, "--repeats", 1, "--trace", 5, "--max-num-seqs", 2)
    assert "trace of 5" in run("compare", "--apart", *arguments).stdout
    assert orders[0].max_num_seqs == 2 and [work.num_requests for work in orders[0].works] == [5]


@pytest.mark.matrix
def test_frames_are_sent_to_a_second_process(run, tmp_path):
    result = run("frames", "--rows", 3, "--step-ms", 1, "--num-steps", 5, "--json", tmp_path / "frames.json")
    found = json.loads((tmp_path / "frames.json").read_text())["result"]
    assert found["frame_bytes"] > 3 * 4 * 4 and found["pack_us"] > 0 and found["unpack_us"] > 0
    assert [step["run_ahead"] for step in found["steps"]] == [True, False]
    assert all(step["alone_ms"] > 0 and step["followed_ms"] > 0 for step in found["steps"])
    assert "followed / alone" in result.output


def test_host_times_the_parts_of_steps(run, tmp_path, monkeypatch):
    microseconds = itertools.count()
    clock = SimpleNamespace(thread_time=lambda: next(microseconds) / 1e6)
    monkeypatch.setattr(host_bench, "time", clock)  # every look at the clock takes a microsecond
    result = run("host", "--rows", "1,3", "--waiting", "0,2", "--num-steps", 5, "--json", tmp_path / "host.json")
    found = json.loads((tmp_path / "host.json").read_text())["result"]
    kinds = [(line["stop_strings"], line["rows"], line["waiting"]) for line in found["lines"]]
    assert kinds == list(itertools.product((False, True), (1, 3), (0, 2)))
    for line in found["lines"]:
        parts = [line[f"{part}_us"] for part in host_bench.PARTS]
        assert min(parts) > 0 and sum(parts) == pytest.approx(line["total_us"])
    assert "schedule us" in result.output and "total us" in result.output


def test_host_refuses_what_is_no_number_of_requests(run):
    with pytest.raises(ValueError, match="rows must be whole numbers >= 1"):
        run("host", "--rows", "0")
    with pytest.raises(ValueError, match="waiting must be whole numbers >= 0"):
        run("host", "--waiting", "-1")
