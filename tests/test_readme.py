"""README's Python runs as written, with the bundled model for "path/or/hub-id"; its commands and files exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxinfer.api.settings import split_settings
from jaxinfer.cli import main as cli
from jaxinfer.cli.flags import SETTINGS, read_settings
from jaxinfer.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
ALL_PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PYTHON = [script for script in ALL_PYTHON if "import ray\n" not in script]  # test_ray.py runs the others
BEFORE = r"(cat prompts.txt \| |XLA_FLAGS=\S+ )?"
COMMANDS = [line.split("#")[0] for line in TEXT.splitlines() if re.match(f"{BEFORE}jaxinfer ", line)]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_readme_python_runs(number, capsys, monkeypatch):
    monkeypatch.setenv("JAXINFER_NUM_PROCESSES", "1")
    exec(PYTHON[number].replace("path/or/hub-id", "demo"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", COMMANDS, ids=str.strip)
def test_readme_commands_have_the_flags_they_show(command):
    words = shlex.split(command)
    words = words[words.index("jaxinfer") + 1 :]
    if "--" in words:  # the command that `launch` starts
        inner = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
        if inner[0] != "python":
            test_readme_commands_have_the_flags_they_show(shlex.join(["jaxinfer", *inner]))
    result = CliRunner().invoke(
        cli.app, [words[0], *words[1:2] * (words[0] == "bench"), "--help"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    flags = [word for word in words if word.startswith("--")]
    assert all(f"{flag} " in result.output for flag in flags)
    for file in (word for word in words if word.startswith("configs/")):
        assert (ROOT / file).exists()


def test_readme_has_every_sampling_parameter_with_its_default():
    table = TEXT.partition("| `SamplingParams` | default |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]*\| [^|]*\|$", table, re.MULTILINE)
    assert dict(rows) == {field.name: str(field.default) for field in dataclasses.fields(SamplingParams)}


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_settings(file):
    known = [field.name for settings in SETTINGS for field in dataclasses.fields(settings)]
    split_settings(read_settings(file, known))


def test_colab_install_lines_bring_the_plugin_for_its_gpu():
    """The notebooks' packages alone may bring a newer JAX, which then runs on the CPU."""
    sources = [TEXT, *(path.read_text() for path in sorted((ROOT / "notebooks").glob("*.ipynb")))]
    assert [re.findall(r"%pip install '\./jaxinfer\[(.*?)\]'", source) for source in sources] == [
        ["cuda12,notebook"]
    ] * len(sources)
