"""Flags and settings files: every field is there, what is not given is not passed, errors name the setting."""

import dataclasses
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from jaxinfer.cli.flags import IN_PYTHON_ONLY, SETTINGS, field_help, read_settings, takes_settings

app = typer.Typer()
received: dict = {}


@app.command()
@takes_settings(*SETTINGS)
def command(
    words: Annotated[list[str] | None, typer.Argument()] = None,
    *,
    model: Annotated[str | None, typer.Option()] = None,
    file: Annotated[Path | None, typer.Option()] = None,
    count: Annotated[int | None, typer.Option(min=1)] = None,
    stream: Annotated[bool, typer.Option()] = False,
    **fields,
) -> None:
    received.update(fields, words=words, model=model, file=file, count=count, stream=stream)


@pytest.fixture
def run():
    def run(*arguments):
        received.clear()
        result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_takes_settings_flags_become_fields(run):
    assert run("a b", "--top-k", 3, "--stop", "x", "--stop", "y", "--no-run-ahead").exit_code == 0
    assert received == {
        "words": ["a b"],
        "model": None,
        "file": None,
        "count": None,
        "stream": False,
        "top_k": 3,
        "stop": ["x", "y"],
        "run_ahead": False,
    }


def test_takes_settings_mapping_is_repeated_pairs(run):
    run("--logit-bias", "3=-1.5", "--logit-bias", "4=2")
    assert received["logit_bias"] == {3: -1.5, 4: 2.0}
    with pytest.raises(ValueError, match="logit_bias must be TOKEN_ID=BIAS, got 3:4"):
        run("--logit-bias", "3:4")
    run("--xla-options", "xla_a=2", "--xla-options", "xla_b=false", "--xla-options", "xla_c=A,B")
    assert received["xla_options"] == {"xla_a": 2, "xla_b": False, "xla_c": "A,B"}
    with pytest.raises(ValueError, match="xla_options must be NAME=VALUE, got xla_a"):
        run("--xla-options", "xla_a")
    with pytest.raises(ValueError, match=r"xla_options must be NAME=VALUE, got xla_a=\[1: while parsing"):
        run("--xla-options", "xla_a=[1")


def test_takes_settings_structured_is_json(run):
    run("--structured", '{"regex": "[0-9]+"}')
    assert received["structured"] == {"regex": "[0-9]+"}
    for wrong in ("[0-9]+", "[1]"):
        with pytest.raises(ValueError, match=r"structured must be a JSON object such as .*, got \["):
            run("--structured", wrong)


def test_takes_settings_flags_win_over_the_file(run, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: here\nfile: null\ntop_k: 7\nstop: [a]\nmax_tokens: null\n")
    run("--config", file, "--top-k", 8)
    own = {"words": None, "model": "here", "file": None, "count": None, "stream": False}
    assert received == own | {"top_k": 8, "stop": ["a"], "max_tokens": None}


@pytest.mark.parametrize(
    ("text", "value"), [("words: a b", ["a b"]), ("words: [a, b]", ["a", "b"]), ("file: here", Path("here"))]
)
def test_takes_settings_own_parameters_of_a_file_have_their_types(run, tmp_path, text, value):
    (tmp_path / "settings.yaml").write_text(text)
    run("--config", tmp_path / "settings.yaml")
    assert received[text.partition(":")[0]] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words: [1, 2]", r"words must be a string or a list of strings, got \[1, 2\]"),
        ("model: 5", "model must be of type str, got 5"),
        ("file: true", "file must be of type Path, got True"),
        ("count: 0", "count must be >= 1, got 0"),
    ],
)
def test_takes_settings_wrong_own_parameter_of_a_file_is_named(run, tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises((TypeError, ValueError), match=rf"settings\.yaml: {message}"):
        run("--config", tmp_path / "settings.yaml")


@pytest.mark.parametrize("settings", SETTINGS)
def test_takes_settings_every_field_is_a_flag_with_help(run, settings):
    texts = field_help(settings)
    shown = run("--help").stdout
    for field in dataclasses.fields(settings):
        assert len(texts[field.name]) > 5
        assert (f"--{field.name.replace('_', '-')} " in shown) == (field.name not in IN_PYTHON_ONLY)


def test_takes_settings_help_does_not_state_what_the_checkpoint_decides(run):
    shown = " ".join(run("--help").stdout.replace("│", "").split())
    for name in ("temperature", "top-p", "top-k"):
        entry = shown[shown.index(f"--{name} ") :]
        assert entry[: entry.index(")", entry.index("(default"))].endswith(
            "(default: from the checkpoint's generation_config, greedy without one"
        )
    assert "(default: 16)" in shown[shown.index("--max-tokens ") : shown.index("--min-tokens ")]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("temprature: 1", TypeError, "settings.yaml: unknown argument 'temprature'; did you mean 'temperature'"),
        ("[1, 2]", ValueError, "must hold a mapping of settings to values, got list"),
        ("a: [", ValueError, "settings.yaml is not valid YAML"),
        ("a: 2024-13-45", ValueError, "settings.yaml is not valid YAML: month must be in 1..12"),
        ("[" * 2000, ValueError, "settings.yaml is not valid YAML: maximum recursion depth"),
        ("1: 2", TypeError, "unknown argument 1"),
    ],
)
def test_read_settings_wrong_file_raises(tmp_path, text, error, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(error, match=message):
        read_settings(file, ["temperature", "top_k"])


def test_read_settings_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such settings file"):
        read_settings(tmp_path / "none.yaml", [])
