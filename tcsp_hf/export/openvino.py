"""OpenVINO models of dense and compressed models, checked against PyTorch (extra `[openvino]`).

OpenVINO reads the graphs of `onnx.py` with its own ONNX reader; one `openvino_....xml` with its `.bin` comes from each.
In a checkpoint's folder `openvino/` sentence-transformers and optimum-intel look for them under these names.
Importing the package openvino reports that to its makers where the network allows, unless its command
`opt_in_out --opt_out` was run before.
"""

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import TCSPError
from .onnx import Runner, check_graph, export_onnx, graphs_of, require_onnx


def require_openvino() -> Any:
    """openvino, after making sure that all of the extra is there.

    Raises:
        TCSPError: a package is missing; the message names the extra.
    """
    try:
        module = importlib.import_module("openvino")
    except ImportError as error:
        raise TCSPError(f"OpenVINO needs {error.name}: pip install 'tcsp_hf[openvino]'.") from error
    require_onnx()
    return module


def export_openvino(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tolerance: float = 1e-4,
    progress: bool | None = False,
) -> dict[str, float]:
    """Write a model's OpenVINO files into a folder, after OpenVINO gave from them what PyTorch gives.

    Weights stay in float32. On a processor with bfloat16 OpenVINO computes in it unless told otherwise
    (`INFERENCE_PRECISION_HINT`); the check is in float32.

    Args:
        model: a dense or compressed BERT or T5 in float32, in evaluation mode.
        folder: existing or new; files of the same names must not be there.
        tolerance: as of `export_onnx`.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        File name -> largest difference found.

    Raises:
        TCSPError: a package of the extra is missing, the model cannot be exported, or a file differs by more than the
            tolerance; nothing is written then.
    """
    openvino = require_openvino()
    target = Path(folder)
    graphs = graphs_of(model)
    for graph in graphs:
        if (target / f"openvino_{graph.name}.xml").exists():
            raise TCSPError(f"{target / f'openvino_{graph.name}.xml'} exists: name another folder.")
    core = openvino.Core()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        sources, staging = Path(temporary) / "onnx", Path(temporary) / "openvino"
        export_onnx(model, sources, tolerance=tolerance, progress=progress)
        for graph in graphs:
            path = staging / f"openvino_{graph.name}.xml"
            _convert(openvino, core, sources / f"{graph.name}.onnx", path)
            found[path.name] = check_graph(_compiled(core, path), model, graph, path.name, tolerance)
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(staging.iterdir()):
            (target / path.name).write_bytes(path.read_bytes())
    return found


def _convert(openvino: Any, core: Any, source: Path, path: Path) -> None:
    openvino.save_model(core.read_model(source), path, compress_to_fp16=False)


def _compiled(core: Any, path: Path) -> Runner:
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    read = {name for value in compiled.inputs for name in value.names}

    def run(inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        results = compiled({name: value for name, value in inputs.items() if name in read})
        return [results[name] for name in outputs]

    return run
