"""Every notebook runs from top to bottom without a network, shows what it promises, and compiles nothing twice."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return notebook


@pytest.fixture(scope="module")
def quickstart():
    return execute("quickstart")


@pytest.fixture(scope="module")
def mesh():
    return execute("mesh")


def outputs(notebook, source):
    """The outputs of the one cell that holds a piece of source."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source)
    return cell.outputs


def text(notebook, source):
    return "".join(output.get("text", "") for output in outputs(notebook, source) if output.get("name") == "stdout")


def test_quickstart_streams_batches_and_talks_asynchronously(quickstart):
    assert text(quickstart, "jaxinfer.generate(").startswith("In the beginning ")
    assert len(text(quickstart, "llm.stream(").split()) > 20
    batch = text(quickstart, "for out, p in zip(").splitlines()
    assert [line[:3] for line in batch] == ["0.0", "0.5", "0.8", "1.2"]
    assert [line[:7] for line in text(quickstart, "asyncio.gather").splitlines()] == ["The sea", "The mou", "The riv"]


def test_quickstart_shows_the_token_table_and_a_picture(quickstart):
    (table,) = (output.data["text/html"] for output in outputs(quickstart, "logprobs=5") if "data" in output)
    assert table.count("<span title=") == 48
    assert any("image/png" in output.data for output in outputs(quickstart, "plt.subplots") if "data" in output)


def test_quickstart_second_run_compiles_nothing(quickstart):
    assert "compiled anew: 0" in text(quickstart, "num_compilations - before")


def test_mesh_texts_are_equal_and_pictures_drawn(mesh):
    assert "equal on all layouts: True" in text(mesh, "LAYOUTS = ")
    for source in ("recording_launch", "plot.bar"):
        assert any("image/png" in output.data for output in outputs(mesh, source) if "data" in output)
