"""Runs the notebooks from top to bottom and keeps their outputs: `python notebooks/execute.py [NAME ...]`.

Needs `pip install -e ".[demo,notebooks]"`, no network. The kernel is the interpreter that runs this script, whatever
kernels are installed; OMP_NUM_THREADS says how many threads it takes. A notebook is written only if all of it ran and
its outputs can be shown: no error, nothing on standard error, no folder of this machine, at most 400 kB.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
LARGEST = 400_000
"""Bytes of a notebook with its outputs."""
_FOLDER = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|var|usr|opt|work|mnt|Users|private)/[^\s'\"]*|[A-Z]:\\\\?Users")


def run(notebook: nbformat.NotebookNode, seconds: int = 3600) -> None:
    """Execute all cells in place, each within `seconds`, in an empty folder, with this checkout's package.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    manager = AsyncKernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
    )
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, where there are no widgets
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, km=manager, timeout=seconds, record_timing=False, resources={"metadata": {"path": folder}}
        )
        client.execute(env=environment, cleanup_kc=True)  # a kernel that is given would go on living


def texts_of(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell's outputs say in words."""
    outputs = cell.get("outputs", [])
    return [
        text
        for output in outputs
        for text in (output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/")))
        if text
    ]


def shortcomings(notebook: nbformat.NotebookNode) -> list[str]:
    """Why a notebook's outputs cannot be shown; empty if they can."""
    found = []
    for number, cell in enumerate(notebook.cells):
        if cell["cell_type"] != "code":
            continue
        last = cell["source"].rstrip().rsplit("\n", 1)[-1]
        speaks = "print(" in cell["source"] or "pyplot.show()" in cell["source"] or last.startswith(('f"', "len("))
        if speaks and not cell["outputs"]:
            found.append(f"cell {number} has no output")
        if cell["execution_count"] is None:
            found.append(f"cell {number} was not run")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"cell {number} failed: {output['ename']}")
            if output.get("name") == "stderr":
                found.append(f"cell {number} wrote to standard error: {output['text'][:200]!r}")
        for text in texts_of(cell):
            if folder := _FOLDER.search(text):
                found.append(f"cell {number} names a folder of this machine: {folder[0]}")
            if "\r" in text or "it/s]" in text:
                found.append(f"cell {number} holds a progress bar")
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        found.append(f"{size:,} bytes, above {LARGEST:,}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of file names, as 01; all notebooks by default")
    chosen = tuple(parser.parse_args().names) or ("",)
    if os.environ.get("TCSP_SMALL") == "1":
        sys.exit("TCSP_SMALL is set: figures of the small setting mean nothing, and none are kept.")
    paths = [path for path in sorted(HERE.glob("*.ipynb")) if path.name.startswith(chosen)]
    if not paths:
        sys.exit(f"No notebook's name begins with {' or '.join(chosen)}.")
    failed = False
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        begun = time.perf_counter()
        run(notebook)
        wrong = shortcomings(notebook)
        failed |= bool(wrong)
        if not wrong:
            staging = path.with_suffix(".new")
            nbformat.write(notebook, staging)
            staging.replace(path)
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s", *(wrong or ["written"]), sep="\n  ", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
