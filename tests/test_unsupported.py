"""Architectures that look like supported ones are refused by name, before anything is written."""

from pathlib import Path

import pytest
import transformers
from common import SOURCES, make_tokenizer

from tcsp_hf import TCSPError, calibrate


@pytest.fixture(scope="module")
def umt5() -> transformers.PreTrainedModel:
    """A mT5 in all but the position biases, of which every layer has its own."""
    config = transformers.UMT5Config(**SOURCES["mt5"][1])
    return transformers.UMT5ForConditionalGeneration(config).eval()


def test_umt5_is_refused_by_name(umt5: transformers.PreTrainedModel, tmp_path: Path) -> None:
    from test_cli import tcsp

    from tcsp_hf.compression.compress import width_table
    from tcsp_hf.export import to_plain_t5
    from tcsp_hf.export.onnx import export_onnx

    pytest.importorskip("onnxruntime", reason="pip install 'tcsp_hf[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'tcsp_hf[onnx]'")
    for refused in (
        lambda: calibrate(umt5, [{"input_ids": [5, 6, 1], "labels": [7, 1]}], progress=False),
        lambda: width_table(umt5),
        lambda: to_plain_t5(umt5),
        lambda: export_onnx(umt5, tmp_path / "onnx"),
    ):
        with pytest.raises(TCSPError, match="UMT5"):
            refused()
    folder = tmp_path / "umt5"
    umt5.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for command in (("compress", folder, "--hidden-size", 16, "-o", tmp_path / "small"), ("inspect", folder)):
        with pytest.raises(TCSPError, match="UMT5"):
            tcsp(*command)
    with pytest.raises(TCSPError, match="UMT5"):
        tcsp("export", folder, tmp_path / "onnx", "--format", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["umt5"]
