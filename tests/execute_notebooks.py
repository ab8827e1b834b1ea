"""Runs the notebooks of notebooks/; as a command, it stores what they show in them.

    python tests/execute_notebooks.py

Readers look at a notebook before they run it, so the notebooks are kept with their outputs, and test_notebooks.py
compares them with a run. Run this command after a change of a notebook, or of what one shows, and look at the pictures.
A cell whose output depends on the machine has the tag "varies" (cell metadata); its content is not compared.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ("quickstart", "mesh", "own_model", "ablations", "steering", "finetune")
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(name: str) -> nbformat.NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def executed(stored: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of a notebook with the outputs of a run, on the CPU and without a network.

    Progress bars are left out: a bar is a live widget, of which a stored notebook shows only the state at 0 %.
    """
    notebook = deepcopy(stored)
    with patch.dict("os.environ", HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu"):
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", coalesce_streams=True, record_timing=False
        ).execute()
    notebook.metadata = stored.metadata  # without the version of this Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook


def main() -> None:
    """Runs every notebook and stores its outputs in it."""
    for name in NAMES:
        nbformat.write(executed(read(name)), NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main()
