"""The notebook runs from its first cell to its last, offline and without data."""

import nbformat
import pytest
from nbclient import NotebookClient
from places import REPO

NOTEBOOK = REPO / "examples" / "movielens.ipynb"


def printed(cell) -> str:
    return "".join(output["text"] for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.delenv("MOVIELENS", raising=False)
    # One device, as a reader has it.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, resources=place).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (measured,) = (printed(cell) for cell in cells if "run.evaluate" in cell.source)
    hit_rate, popular = (float(measured.split()[n]) for n in (1, 7))
    # Most movies follow the one before.
    assert hit_rate > 0.3 > 0.1 > popular
    (recommended,) = (printed(cell) for cell in cells if "run.recommend" in cell.source)
    best = recommended.split("next:")[1].strip().splitlines()[0]
    assert best.endswith("Saga 1, part 4 (1970)")
