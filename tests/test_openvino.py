"""OpenVINO files against PyTorch, by OpenVINO."""

import json
import sys
from pathlib import Path

import pytest
import torch
from common import Case, find, make_inputs, make_small, make_tokenizer, make_uneven
from typer.testing import CliRunner

from tcsp_hf import TCSPError
from tcsp_hf.cli.main import app
from tcsp_hf.export import openvino as export_openvino_module
from tcsp_hf.export.openvino import export_openvino

CLASSIFIER = find("bert-ForSequenceClassification")
SEQ2SEQ = find("t5-ForConditionalGeneration")


@pytest.fixture
def openvino():
    """OpenVINO and what its reader needs; without them the test is skipped."""
    for name in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        module = pytest.importorskip(name, reason="pip install 'tcsp_hf[openvino]'")
    return module


def compiled(openvino, path: Path):
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize(
    "case",
    [
        CLASSIFIER,
        *(pytest.param(find(name), marks=pytest.mark.slow, id=name) for name in ("bert-Model", "t5-EncoderModel")),
    ],
    ids=str,
)
def test_one_pass(case: Case, tmp_path: Path, openvino) -> None:
    """At a batch and a length that nothing was traced or checked with."""
    model = make_uneven(case)
    found = export_openvino(model, tmp_path)
    assert list(found) == ["openvino_model.xml"] and found["openvino_model.xml"] <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    graph = compiled(openvino, tmp_path / "openvino_model.xml")
    inputs = make_inputs(case)
    read = {name for value in graph.inputs for name in value.names}
    assert read >= {"input_ids", "attention_mask"}
    with torch.no_grad():
        expected = model(**{name: value for name, value in inputs.items() if name in read})
    results = graph({name: value.numpy() for name, value in inputs.items() if name in read})
    names = [value.any_name for value in graph.outputs]
    assert names
    for name in names:
        scale = max(1.0, float(expected[name].abs().max()))
        assert (expected[name] - torch.from_numpy(results[name])).abs().max() <= 1e-4 * scale, name


@pytest.mark.slow
def test_sequence_to_sequence(tmp_path: Path, openvino) -> None:
    """Three files, and the first step's token is PyTorch's."""
    model, inputs = make_small(SEQ2SEQ), make_inputs(SEQ2SEQ)
    found = export_openvino(model, tmp_path)
    names = ["encoder_model", "decoder_model", "decoder_with_past_model"]
    assert list(found) == [f"openvino_{name}.xml" for name in names] and max(found.values()) <= 1e-4
    encoder, decoder = (compiled(openvino, tmp_path / f"openvino_{name}.xml") for name in names[:2])
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    memory = encoder({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    start = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    logits = decoder(
        {"decoder_input_ids": start.numpy(), "encoder_hidden_states": memory, "encoder_attention_mask": mask}
    )["logits"]
    expected = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=1)
    assert logits[:, -1].argmax(-1).tolist() == expected[:, 1].tolist()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    make_small(CLASSIFIER).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("of an earlier export")
    return folder


def test_command(small: Path, tmp_path: Path, openvino) -> None:
    """A whole checkpoint, an earlier export to another form included, with the files beside it."""
    arguments = ["export", str(small), str(tmp_path / "out"), "--format", "openvino", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["differences"]["openvino_model.xml"] <= 1e-4
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"openvino/openvino_model.xml", "openvino/openvino_model.bin", "onnx/model.onnx", "config.json"} <= names


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, openvino) -> None:
    convert = export_openvino_module._convert

    def convert_another(openvino, core, source, path):
        import onnx

        graph = onnx.load(source)
        bias = next(value for value in graph.graph.initializer if value.name.endswith("classifier.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1.0, bias.name))
        onnx.save(graph, source)
        convert(openvino, core, source, path)

    monkeypatch.setattr(export_openvino_module, "_convert", convert_another)
    with pytest.raises(TCSPError, match=r"openvino_model\.xml differs from PyTorch by 1"):
        export_openvino(make_small(CLASSIFIER), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_there_stay(tmp_path: Path, openvino) -> None:
    (tmp_path / "openvino_model.xml").write_text("mine")
    with pytest.raises(TCSPError, match=r"openvino_model\.xml exists"):
        export_openvino(make_small(CLASSIFIER), tmp_path)
    assert (tmp_path / "openvino_model.xml").read_text() == "mine"


def test_missing_extra(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = CliRunner().invoke(app, ["export", str(small), str(tmp_path / "out"), "--format", "openvino"])
    assert isinstance(result.exception, TCSPError)
    assert "pip install 'tcsp_hf[openvino]'" in str(result.exception)
    assert not (tmp_path / "out").exists()
