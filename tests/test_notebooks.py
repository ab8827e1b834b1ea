"""Every notebook runs from top to bottom without a network, shows what it promises, and compiles nothing twice."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request):
    notebook = nbformat.read(request.param, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return notebook


def outputs(notebook, source):
    """The outputs of the one cell that holds a piece of source."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source)
    return cell.outputs


def text(notebook, source):
    return "".join(output.get("text", "") for output in outputs(notebook, source) if output.get("name") == "stdout")


def test_notebook_streams_batches_and_talks_asynchronously(executed):
    assert text(executed, "jaxinfer.generate(").startswith("In the beginning ")
    assert len(text(executed, "llm.stream(").split()) > 20
    batch = text(executed, "for out, p in zip(").splitlines()
    assert [line[:3] for line in batch] == ["0.0", "0.5", "0.8", "1.2"]
    assert [line[:7] for line in text(executed, "asyncio.gather").splitlines()] == ["The sea", "The mou", "The riv"]


def test_notebook_shows_the_token_table_and_a_picture(executed):
    (table,) = (output.data["text/html"] for output in outputs(executed, "logprobs=5") if "data" in output)
    assert table.count("<span title=") == 48
    assert any("image/png" in output.data for output in outputs(executed, "plt.subplots") if "data" in output)


def test_notebook_second_run_compiles_nothing(executed):
    assert "compiled anew: 0" in text(executed, "num_compilations - before")
