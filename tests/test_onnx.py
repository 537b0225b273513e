"""ONNX graphs against PyTorch, by ONNX Runtime."""

import copy
import json
from pathlib import Path

import pytest
import torch
from common import BERT_CASES, T5_CASES, Case, find, make_dense, make_inputs, make_small, make_tokenizer, make_uneven
from typer.testing import CliRunner

from tcsp_hf import TCSPError
from tcsp_hf.cli.main import app
from tcsp_hf.export import onnx as export_onnx_module
from tcsp_hf.export.onnx import export_onnx
from tcsp_hf.export.onnx_generation import OnnxGenerator

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

CLASSIFIER = find("bert-ForSequenceClassification")
SEQ2SEQ = find("t5-ForConditionalGeneration")


def assert_graph(case: Case, model: torch.nn.Module, folder: Path) -> None:
    """Names, dynamic axes, and outputs at a batch and a length that nothing was traced or checked with.

    As close to PyTorch as 1e-4, or as a few of PyTorch's own rounding errors: the tiny random T5s amplify them.
    """
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    read = {value.name: value.shape for value in session.get_inputs()}
    assert read["input_ids"][0] == "batch" and read["input_ids"][-1] == "sequence"
    inputs = {name: value for name, value in make_inputs(case).items() if name in read}
    exact = copy.deepcopy(model).double()
    for shortened in (inputs, {name: value[:1, ..., :5] for name, value in inputs.items()}):  # row 0 ends there
        with torch.no_grad():
            expected, reference = model(**shortened), exact(**shortened)
        names = [value.name for value in session.get_outputs()]
        found = session.run(names, {name: value.numpy() for name, value in shortened.items()})
        for name, value in zip(names, found, strict=True):
            rounding = float((expected[name] - reference[name]).abs().max())
            assert (expected[name] - torch.from_numpy(value)).abs().max() <= max(1e-4, 4.0 * rounding), name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=() if case == CLASSIFIER else pytest.mark.slow)
        for case in [*BERT_CASES, *(case for case in T5_CASES if case != SEQ2SEQ)]
    ],
)
def test_graph_of_every_head(case: Case, tmp_path: Path) -> None:
    model = make_uneven(case)
    assert set(export_onnx(model, tmp_path)) == {"model.onnx"}
    assert_graph(case, model, tmp_path)


@pytest.mark.slow
def test_generation(tmp_path: Path) -> None:
    model, inputs = make_small(SEQ2SEQ), make_inputs(SEQ2SEQ)
    found = export_onnx(model, tmp_path)
    assert list(found) == ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"]
    assert max(found.values()) <= 1e-4
    expected = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=9)
    generator = OnnxGenerator(tmp_path)
    ids = generator.generate(inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), max_new_tokens=9)
    assert torch.equal(expected, torch.from_numpy(ids))
    eos = int(expected[0, 3])  # a sequence that ends early is padded, the others go on
    expected = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=9, eos_token_id=eos
    )
    ids = OnnxGenerator(tmp_path, eos=eos).generate(
        inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), max_new_tokens=9
    )
    assert torch.equal(expected, torch.from_numpy(ids))


@pytest.mark.slow
def test_dense_models_too(tmp_path: Path) -> None:
    model = make_dense(find("bert-Model"), torch.float32)
    assert set(export_onnx(model, tmp_path)) == {"model.onnx"}
    assert_graph(find("bert-Model"), model, tmp_path)


@pytest.mark.parametrize("case", [*BERT_CASES, *T5_CASES], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["small", "dense"])
def test_outputs_have_names_whatever_the_configuration_says(case: Case, dense: bool) -> None:
    if dense and str(case) in ("t5-ForSequenceClassification", "t5-ForTokenClassification"):
        pytest.skip("transformers' own class runs with return_dict alone")
    model = make_dense(case, torch.float32) if dense else make_small(case)
    with torch.no_grad():
        for graph in export_onnx_module.graphs_of(model):
            inputs = graph.make(2, 7)
            model.config.return_dict = True
            expected = graph.run(model, inputs)
            model.config.return_dict = False
            found = graph.run(model, inputs)
            assert found.keys() == expected.keys() and expected
            assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_small(CLASSIFIER).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def test_command(small: Path, tmp_path: Path) -> None:
    """A whole checkpoint with the graph beside it, where inference servers look."""
    result = CliRunner().invoke(app, ["export", str(small), str(tmp_path / "out"), "--format", "onnx", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["differences"]["model.onnx"] <= 1e-4
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"onnx/model.onnx", "config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"} <= names


def test_a_graph_that_differs_is_not_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = export_onnx_module._write

    def write_another(model, graph, path):
        other = make_small(CLASSIFIER)
        other.classifier.bias.data += 1.0
        write(other, graph, path)

    monkeypatch.setattr(export_onnx_module, "_write", write_another)
    result = CliRunner().invoke(app, ["export", str(small), str(tmp_path / "out"), "--format", "onnx"])
    assert isinstance(result.exception, TCSPError) and "differs from PyTorch by" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TCSPError, match="float64: load it with"):
        export_onnx(make_small(CLASSIFIER, torch.float64), tmp_path)
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(TCSPError, match=r"model\.onnx exists"):
        export_onnx(make_small(CLASSIFIER), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(TCSPError, match=r"pip install 'tcsp_hf\[onnx\]'"):
        export_onnx(make_small(CLASSIFIER), tmp_path / "new")
    assert not (tmp_path / "new").exists()
