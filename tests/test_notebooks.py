"""Every notebook runs from top to bottom without a network, and a run shows what is stored in the notebook.

Each is run by one test; the others look at the stored outputs, which `python tests/execute_notebooks.py` stores anew.
"""

import re

import pytest
from execute_notebooks import NAMES, executed, read

# What a stored notebook may weigh, in bytes, and how its log lines begin: others would be warnings.
MAX_SIZE = 300_000
LOG_LINE = "jaxinfer: "


@pytest.fixture(scope="module")
def quickstart():
    return read("quickstart")


@pytest.fixture(scope="module")
def mesh():
    return read("mesh")


@pytest.fixture(scope="module")
def own_model():
    return read("own_model")


def outputs(notebook, source):
    """The outputs of the one cell that holds a piece of source."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source)
    return cell.outputs


def text(notebook, source):
    return "".join(output.get("text", "") for output in outputs(notebook, source) if output.get("name") == "stdout")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a reader sees of a cell's outputs, log lines apart: text, tables without their layout, how many pictures.

    Only the kinds of outputs if the cell has the tag "varies".
    """
    results = [output for output in cell.outputs if output.get("name") != "stderr"]
    if "varies" in cell.metadata.get("tags", ()):
        return [output.output_type for output in results]
    return [output.text if output.output_type == "stream" else visible(output.data) for output in results]


def visible(data):
    """A result as a browser shows it: HTML before text. Of a coloured token table that is the text of the tokens."""
    if "text/html" not in data:
        return (data["text/plain"], "image/png" in data)
    return re.sub(r"<style.*?</style>|<[^>]*>", " ", data["text/html"], flags=re.DOTALL).split()


# The others take long; test_mesh.py, test_main.py and the tests of research/ and models/ run what they show in CI.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "quickstart" else pytest.mark.matrix) for name in NAMES]
)
def test_notebook_stored_outputs_are_those_of_a_run(name):
    run = executed(read(name))
    stored, cells = code_cells(read(name)), code_cells(run)
    assert [cell.execution_count for cell in stored] == list(range(1, len(cells) + 1))
    for before, after in zip(stored, cells, strict=True):
        assert shown(before) == shown(after), f"run `python tests/execute_notebooks.py`: {before.source[:80]}"
    if name == "quickstart":  # in a cell that varies, so that the comparison leaves it out
        assert "compiled anew: 0" in text(run, "num_compilations - before")


@pytest.mark.parametrize("name", NAMES)
def test_notebook_stored_outputs_are_small_and_free_of_warnings_and_paths(name):
    stored = read(name)
    logs = [o.text for cell in code_cells(stored) for o in cell.outputs if o.get("name") == "stderr"]
    assert all(line.startswith(LOG_LINE) for log in logs for line in log.splitlines())
    content = str(stored)
    assert len(content) < MAX_SIZE
    assert not re.search(r"/(home|tmp|root|work|Users|usr|site-packages)/|it/s\b|Warning:", content)


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


def test_mesh_texts_are_equal_and_pictures_drawn(mesh):
    assert "equal on all layouts: True" in text(mesh, "LAYOUTS = ")
    for source in ("plot_pipeline", "plot.bar"):
        assert any("image/png" in output.data for output in outputs(mesh, source) if "data" in output)


def test_own_model_learns_to_copy_and_is_equal_on_a_mesh(own_model):
    assert "without a mistake: most" in text(own_model, "right = [")
    assert text(own_model, "other.generate(").count("equal: True") == 2
    for source in ("losses.append", "scores.argmax"):
        assert any("image/png" in output.data for output in outputs(own_model, source) if "data" in output)


def test_research_notebooks_show_what_they_promise():
    steering, finetune, ablations = map(read, ("steering", "finetune", "ablations"))
    (table,) = (output.data["text/plain"] for output in outputs(steering, "STRENGTHS = ") if "text/html" in output.data)
    moods = {float(line.split()[0]): [float(word) for word in line.split()[1:3]] for line in table.splitlines()[2:]}
    assert moods[1.5][0] > 3 * moods[0.0][0]  # joy
    assert moods[1.5][1] < moods[0.0][1]  # grief
    assert "the one alone: True" in text(steering, "kinds = {")
    assert "from below 0.3 to above 0.8: True" in text(finetune, "rewards, state = ")
    assert text(finetune, "sunshine:") == "sunshine: True\n"
    assert "the same text: True" in text(finetune, "llm.export(")
    assert "all outputs are equal: True" in text(ablations, "result.is_ok")
    for notebook, source in (
        (steering, "effect = "),
        (finetune, "left.plot"),
        (ablations, "by_head"),
        (ablations, "draw("),
    ):
        assert any("image/png" in output.data for output in outputs(notebook, source) if "data" in output)
