"""The notebooks of examples/ run from top to bottom, and are committed without what they print."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fedloom.client.assets.fetch import cache_dir, fetch

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def test_both_are_there() -> None:
    assert [path.name for path in NOTEBOOKS] == ["first_private_adapter.ipynb", "new_strategy.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_was_printed_is_committed(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type == "markdown" or (cell.execution_count is None and cell.outputs == [])


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1200)  # whole runs; a busy machine must not fail one
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the kernel's client
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("minilm-l6")
    monkeypatch.setenv("FEDLOOM_CACHE", str(cache_dir()))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(path, as_version=4)

    NotebookClient(notebook, timeout=1000, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds, "a plot and a table are shown"
    assert not [output.name for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert list((tmp_path / "runs").glob("*/adapter/adapter_model.safetensors"))
