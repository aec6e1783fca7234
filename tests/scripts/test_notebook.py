"""The example notebook, run cell by cell with a tiny pipeline."""

import ast
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def _cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def _tiny(pipelines: dict[str, Path], images: Path, out: Path) -> str:
    """The cell of parameters for a tiny pipeline."""
    values = {
        "MODEL": str(pipelines["sd"]),
        "DATA": str(images),
        "OUTPUT": str(out),
        "RESOLUTION": tiny.RESOLUTION,
        "STEPS": 2,
        "PROMPT": "a red square",
        "MORE_FLAGS": ["--train_batch_size", "2", "--rank", "2", "--validation_num_inference_steps", "1"],
    }
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


def test_its_cells_are_code_without_outputs():
    for cell in _cells():
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        ast.parse("".join(cell["source"]))


@pytest.mark.slow
def test_it_runs_in_this_process(pipelines, images, tmp_path, monkeypatch):
    """Twice, as a user runs its cells again. The setup, which installs packages, is left out."""
    shown, display = [], ModuleType("IPython.display")
    display.HTML, display.Image = (lambda page: page), (lambda filename, width=None: filename)
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {"Path": Path}
    for _ in range(2):
        for cell in _cells():
            tags = cell["metadata"].get("tags", [])
            if "setup" not in tags:
                source = _tiny(pipelines, images, tmp_path / "out") if "parameters" in tags else "".join(cell["source"])
                exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert [Path(each).name for each in shown[-2:]] == ["before.png", "after.png"]
    assert (tmp_path / "out" / "before.png").read_bytes() != (tmp_path / "out" / "after.png").read_bytes()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nbclient") is None or find_spec("ipykernel") is None, reason="nbclient is not installed")
def test_it_runs_in_a_notebook(pipelines, images, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = _tiny(pipelines, images, tmp_path / "out")
        if "setup" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace("subprocess.run([sys.executable", "print([sys.executable")
            cell.source = cell.source.replace(', "requirements.txt"], check=True)', ', "requirements.txt"])')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "the result is in" in text
    assert "2/2" in text
    images_shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images_shown) >= 4
