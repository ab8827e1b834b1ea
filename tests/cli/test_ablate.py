"""`jaxinfer ablate`: the presets are read, one runs, outputs that differ where they must not are an error."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxinfer.bench import ablation as ablation_bench
from jaxinfer.cli import main as cli
from jaxinfer.cli.ablate import read_ablation
from jaxinfer.config.engine_config import EngineConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "gqa"
PRESETS = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))
SMALL = """
title: Pages
model: GOLDEN
workload: {num_requests: 3, prompt_len: 12, output_len: 4, prefix_len: 8}
engine: {max_num_seqs: 4, max_num_batched_tokens: 16}
vary: {page_size: [8, 16], run_ahead: [true]}
"""


def run(*arguments):
    return CliRunner().invoke(cli.app, ["ablate", *map(str, arguments)])


@pytest.mark.parametrize("file", PRESETS, ids=lambda path: path.stem)
def test_presets_are_ablations_of_known_settings(file):
    planned = read_ablation(file)
    assert len(planned.settings) >= 2
    for setting in planned.settings:
        EngineConfig(**{"max_num_batched_tokens": 2048, **planned.engine, **setting})
    must_be_close = {"dtype", "quantization", "attention_backend", "sliding_window", "sink_tokens"} & set(planned.vary)
    assert planned.outputs == ("close" if must_be_close else "equal")


def test_ablation_runs_all_combinations_and_draws_them(tmp_path):
    file = tmp_path / "pages.yaml"
    file.write_text(SMALL.replace("GOLDEN", str(GOLDEN)))
    result = run(file, "--repeats", 1, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "all outputs are equal" in result.output
    found = json.loads((tmp_path / "a.json").read_text())["result"]["runs"]
    assert [entry["setting"] for entry in found] == [{"page_size": size, "run_ahead": True} for size in (8, 16)]
    assert all(entry["equal_tokens"] == 1 and entry["kv_mib"] > 0 and entry["tokens_per_s"][0] > 0 for entry in found)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_differing_outputs_are_an_error_only_where_they_must_be_equal(monkeypatch, tmp_path):
    setting = dict.fromkeys(("num_steps", "num_preemptions", "prefix_cache_hits"), 1)
    runs = tuple(
        ablation_bench.AblationRun(
            setting={"run_ahead": share == 1},
            tokens_per_s=(100.0,),
            draft_acceptance_rate=None,
            weight_mib=1.0,
            kv_mib=1.0,
            equal_tokens=share,
            largest_distance=1e-3,
            **setting,
        )
        for share in (1.0, 0.5)
    )
    result = ablation_bench.AblationResult(title="x", outputs="equal", runs=runs)
    monkeypatch.setattr(ablation_bench, "measure", lambda *_, **__: result)
    file = tmp_path / "a.yaml"
    file.write_text(SMALL.replace("GOLDEN", str(GOLDEN)))
    found = run(file)
    assert (found.exit_code, "outputs differ where they must not: run_ahead=False" in found.output) == (1, True)
    close = dataclasses.replace(result, outputs="close")
    monkeypatch.setattr(ablation_bench, "measure", lambda *_, **__: close)
    assert run(file).exit_code == 0


def test_unwritable_json_file_or_plot_is_refused_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(ablation_bench, "measure", None)
    file = tmp_path / "a.yaml"
    file.write_text(SMALL.replace("GOLDEN", str(GOLDEN)))
    with pytest.raises(FileNotFoundError, match=r"none/a.json: there is no folder .*none"):
        raise run(file, "--json", tmp_path / "none" / "a.json").exception
    with pytest.raises(IsADirectoryError, match="it is a folder, expected a file"):
        raise run(file, "--json", tmp_path).exception
    with pytest.raises(FileNotFoundError, match=r"none/a.png: there is no folder .*none"):
        raise run(file, "--plot", tmp_path / "none" / "a.png").exception


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("{page_size: [8, 12]}", "setting page_size=12: page_size must be a power of two, got 12"),
        ("{run_ahead: [true, 1]}", "setting run_ahead=1: run_ahead must be True or False, got 1"),
        ("{data_parallel_size: [1, 2]}", "setting data_parallel_size=2: data_parallel_size must be 1 here, got 2"),
    ],
)
def test_wrong_setting_is_refused_before_the_first_is_measured(monkeypatch, tmp_path, vary, message):
    monkeypatch.setattr(ablation_bench, "Session", None)
    file = tmp_path / "a.yaml"
    file.write_text(f"title: x\nmodel: {GOLDEN}\nvary: {vary}")
    with pytest.raises((TypeError, ValueError), match=message):
        ablation_bench.measure(read_ablation(file), repeats=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x", "needs a title and what to vary"),
        ("title: x\nvary: {page_sze: [8]}", "did you mean 'page_size'"),
        ("title: x\nvary: {page_size: 8}", "vary.page_size must be a list of values"),
        ("title: x\nvary: {page_size: [8]}\nworkload: {requests: 3}", "unknown argument 'requests'"),
        ("title: x\nvary: {page_size: [8]}\noutputs: same", "outputs must be one of"),
        ("title: [", "is not valid YAML"),
        ("- 1", "expected a mapping with title"),
        ("1: 2", "unknown argument 1"),
        ("title: x\nvary: [page_size]", r"vary must be a mapping of settings, got \['page_size'\]"),
        ("title: x\nvary: page_size", "vary must be a mapping of settings, got 'page_size'"),
        ("title: x\nvary: {8: [1]}", "unknown argument 8"),
        ("title: x\nvary: {page_size: [8]}\nengine:", "engine must be a mapping of settings, got None"),
        ("title: x\nvary: {page_size: [8]}\nengine: [x]", "engine must be a mapping of settings"),
        ("title: x\nvary: {page_size: [8]}\nrandom_weights: 5", "random_weights must be a string, got 5"),
        ("title: x\nvary: {page_size: [8]}\nmodel:", "model must be a string, got None"),
        ("title: x\nvary: {page_size: [8]}\nworkload: {seed: -1}", "workload.seed must be .* got -1"),
        ("title: x\nvary: {page_size: [8]}\nworkload: {temperature: -1}", "workload.temperature must be .* got -1"),
        ("title: x\nvary: {page_size: [8]}\nworkload: {temperature: .nan}", "workload.temperature must be .* got nan"),
        (
            "title: x\nvary: {page_size: [8]}\nworkload: {prompt_len: 8, prefix_len: 8}",
            "workload.prefix_len must be below prompt_len, got 8 and 8",
        ),
    ],
)
def test_wrong_files_are_one_error_that_names_them(tmp_path, text, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises((TypeError, ValueError), match=message) as error:
        read_ablation(file)
    assert str(file) in str(error.value)
    file.write_bytes(b"title: \xff")
    with pytest.raises(ValueError, match=f"{file} is not valid YAML"):
        read_ablation(file)
    with pytest.raises(FileNotFoundError, match="no such ablation"):
        read_ablation(tmp_path / "missing.yaml")
