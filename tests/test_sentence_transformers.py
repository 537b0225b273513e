"""sentence-transformers folders: embeddings in the dense model's space, whatever the pooling."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import Case, D, calibrated, find, make_dense, make_small, make_tokenizer
from test_cli import tcsp
from tokenizers.normalizers import Sequence
from training import make_arguments
from transformers import PreTrainedModel
from typer.testing import CliRunner

import tcsp_hf
from tcsp_hf import TCSPError, compress
from tcsp_hf.cli.main import app
from tcsp_hf.evaluation.embeddings import embed
from tcsp_hf.evaluation.load_task import load_task
from tcsp_hf.evaluation.scoring import Retrieval
from tcsp_hf.export.sentence_transformer import (
    load_source,
    reranker_settings,
    save_sentence_transformer,
    to_sentence_transformer,
)
from tcsp_hf.loading import load_model
from tcsp_hf.pooling import declared_pooling

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

ENCODER = find("bert-Model")
TEXTS = ["w1 w2 w3 w4 w5 w6", "w40", "w7 w8 w9 w1", "w30 w31"]


def dense_model(case: Case = ENCODER) -> PreTrainedModel:
    return make_dense(case, torch.float32)


def write_source(folder: Path, *after: Any, pooling: Any = "mean") -> Path:
    """A dense SentenceTransformer with a pooling and these modules after it."""
    dense_model().save_pretrained(folder / "plain")
    make_tokenizer().save_pretrained(folder / "plain")
    encoder = modules.Transformer(str(folder / "plain"))
    made = library.SentenceTransformer(
        modules=[encoder, modules.Pooling(D, pooling), *after],
        device="cpu",
        prompts={"query": "w99 ", "document": ""},
        similarity_fn_name="dot",
    )
    made.max_seq_length = 6
    made.save_pretrained(str(folder / "source"), create_model_card=False)
    return folder / "source"


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return make_small(ENCODER)


@pytest.fixture(scope="module")
def full() -> PreTrainedModel:
    return make_small(ENCODER, hidden_size=D)


@pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean", "lasttoken", ("cls", "mean")], ids=str)
def test_full_width_equals_the_dense_model(full: PreTrainedModel, pooling: Any, tmp_path: Path) -> None:
    """Pooling, a Dense module of the source's own and its normalisation come over, each where it was."""
    torch.manual_seed(0)
    width = D if isinstance(pooling, str) else 2 * D
    path = write_source(tmp_path, modules.Dense(width, 24), modules.Normalize(), pooling=pooling)
    source = load_source(path)
    save_sentence_transformer(full, make_tokenizer(), source, tmp_path / "small")
    made = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert [type(m).__name__ for m in made] == ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    assert made.max_seq_length == 6 and made.prompts["query"] == "w99 " and made.similarity_fn_name == "dot"
    for how in ({}, {"prompt_name": "query"}, {"truncate_dim": 8}):
        expected, found = source.encode(TEXTS, **how), made.encode(TEXTS, **how)
        assert expected.shape == found.shape and np.abs(expected - found).max() <= 1e-5


def test_narrow_equals_pooling_lifted_states(small: PreTrainedModel, tmp_path: Path) -> None:
    """No source: mean pooling and normalisation, as the package's own embeddings."""
    tokenizer = make_tokenizer()
    save_sentence_transformer(small, tokenizer, None, tmp_path / "small")
    made = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    found = made.encode(TEXTS)
    assert found.shape == (4, D)
    assert np.abs(found - embed(small, tokenizer, TEXTS).numpy()).max() <= 1e-5
    with torch.no_grad():  # lifted first, pooled afterwards
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        states = small.lift(small(**batch).last_hidden_state)
        weights = batch["attention_mask"].unsqueeze(-1).float()
        pooled = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    assert np.abs(found - pooled.numpy()).max() <= 1e-5
    truncated = made.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    expected = found[:, :8] / np.linalg.norm(found[:, :8], axis=1, keepdims=True)
    assert np.abs(truncated - expected).max() <= 1e-5


@pytest.mark.parametrize("case", [ENCODER, find("t5-EncoderModel")], ids=str)
def test_without_the_package(case: Case, tmp_path: Path) -> None:
    """In a process that cannot import tcsp_hf, with the code beside the checkpoint."""
    small, tokenizer = make_small(case), make_tokenizer()
    if case.family == "t5":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    save_sentence_transformer(small, tokenizer, None, tmp_path / "small")
    program = """
import json, sys
sys.modules["tcsp_hf"] = None  # an import fails
import torch
from sentence_transformers import SentenceTransformer
torch.set_num_threads(1)
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
json.dump(model.encode(json.loads(sys.argv[2])).tolist(), open(sys.argv[3], "w"))
"""
    found = tmp_path / "found.json"
    command = [sys.executable, "-c", program, str(tmp_path / "small"), json.dumps(TEXTS), str(found)]
    subprocess.run(command, check=True)
    expected = embed(small, tokenizer, TEXTS).numpy()
    assert np.abs(np.array(json.loads(found.read_text())) - expected).max() <= 1e-5


def test_command(tmp_path: Path) -> None:
    source = write_source(tmp_path, modules.Normalize(), pooling="cls")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"w{i} w{i + 1} w{2 * i}" for i in range(50)))
    told = ["--data", str(texts), "--hidden-size", "16", "--sentence-transformer", "--json"]
    result = CliRunner().invoke(app, ["compress", str(source), "-o", str(tmp_path / "small"), *told])
    assert result.exit_code == 0, result.output
    made = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert made[1].pooling_mode == "cls" and made[0].get_embedding_dimension() == 16
    assert made.encode(TEXTS).shape == (4, D)
    plain = ["compress", str(tmp_path / "plain"), "-o", str(tmp_path / "from-plain"), *told]
    assert CliRunner().invoke(app, plain).exit_code == 0
    assert library.SentenceTransformer(str(tmp_path / "from-plain"), device="cpu")[1].pooling_mode == "mean"
    plain[3] = str(tmp_path / "from-cls")
    assert CliRunner().invoke(app, [*plain, "--pooling", "cls"]).exit_code == 0
    made = library.SentenceTransformer(plain[3], device="cpu")
    assert made[1].pooling_mode == "cls"
    small = tcsp_hf.TCSPBertModel.from_pretrained(plain[3]).eval()
    with torch.no_grad():
        states = small(**make_tokenizer()(TEXTS, padding=True, return_tensors="pt")).last_hidden_state
    expected = torch.nn.functional.normalize(small.lift(states)[:, 0], dim=-1).numpy()
    assert np.abs(made.encode(TEXTS) - expected).max() <= 1e-5
    stats = str(tmp_path / "stats")
    read = ["calibrate", plain[1], "-o", stats, "--data", str(texts), "--pooling", "cls", "--quiet"]
    assert CliRunner().invoke(app, read).exit_code == 0
    by_stats = ["--stats", stats, "--hidden-size", "16", "--sentence-transformer"]
    assert CliRunner().invoke(app, ["compress", plain[1], "-o", str(tmp_path / "from-stats"), *by_stats]).exit_code == 0
    assert library.SentenceTransformer(str(tmp_path / "from-stats"), device="cpu")[1].pooling_mode == "cls"
    for name, pooling in (("source", None), ("plain", "mean")):  # by itself as the source says, and as it is told
        stats = str(tmp_path / f"stats-{name}")
        read = ["calibrate", str(tmp_path / name), "-o", stats, "--data", str(texts), "--quiet"]
        assert CliRunner().invoke(app, [*read, *([] if pooling is None else ["--pooling", pooling])]).exit_code == 0
        assert tcsp_hf.Calibration.load(stats).objective == f"embedding-{pooling or 'cls'}"
    command = ["compress", str(source), "-o", str(tmp_path / "mixed"), "--stats", stats, "--hidden-size", "16"]
    result = CliRunner().invoke(app, [*command, "--sentence-transformer"])
    assert isinstance(result.exception, TCSPError) and "pools by cls: calibrate with --pooling cls" in str(
        result.exception
    )
    plain[3] = str(tmp_path / "from-pooler")
    result = CliRunner().invoke(app, [*plain, "--pooling", "pooler"])
    assert isinstance(result.exception, TCSPError) and "pooling is 'pooler'" in str(result.exception)
    assert not (tmp_path / "from-pooler").exists()


def test_a_pooling_that_would_not_be_read(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    told = ["--stats", tmp_path / "none", "--hidden-size", 16, "--sentence-transformer", "--pooling", "cls"]
    with pytest.raises(TCSPError, match="has a pooling of its own: leave --pooling out"):
        tcsp("compress", source, "-o", tmp_path / "small", *told)


def test_a_source_that_lowers_its_texts(full: PreTrainedModel, tmp_path: Path) -> None:
    """It says so beside the tokenizer: capitals are unknown words to the tokenizer alone."""
    path, tokenizer, capitals = write_source(tmp_path, modules.Normalize()), make_tokenizer(), ["W1 W2 W3", "W7"]
    tokenizer.backend_tokenizer.normalizer = Sequence([])
    tokenizer.save_pretrained(path)
    settings = json.loads((path / "sentence_bert_config.json").read_text())
    (path / "sentence_bert_config.json").write_text(json.dumps(settings | {"do_lower_case": True}))
    source = load_source(path)
    expected = source.encode(["w1 w2 w3", "w7"])
    assert np.abs(source.encode(capitals) - expected).max() <= 1e-6
    save_sentence_transformer(full, tokenizer, source, tmp_path / "saved")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"W{i} W{i + 1} W{2 * i}" for i in range(50)))
    told = ("--data", texts, "--hidden-size", D, "--sentence-transformer", "--json")
    made = json.loads(tcsp("compress", path, *told, "-o", tmp_path / "made"))
    texts.write_text(texts.read_text().lower())
    lowered = json.loads(tcsp("compress", path, *told, "-o", tmp_path / "lowered"))
    assert made["projection"]["calibration"]["tokens"] == lowered["projection"]["calibration"]["tokens"]
    assert made["projection"]["sites"] == lowered["projection"]["sites"], "calibrated on the words, not on [UNK]"
    for name in ("saved", "made"):
        found = library.SentenceTransformer(str(tmp_path / name), device="cpu").encode(capitals)
        assert np.abs(found - expected).max() <= 1e-5


def test_t5_encoder(tmp_path: Path) -> None:
    case = find("t5-EncoderModel")
    small = make_small(case, hidden_size=D)
    save_sentence_transformer(small, make_tokenizer(), None, tmp_path / "small")
    made = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    dense, tokenizer = make_dense(case, torch.float32), make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert np.abs(made.encode(TEXTS) - embed(dense, tokenizer, TEXTS).numpy()).max() <= 1e-5


def test_cross_encoder(tmp_path: Path) -> None:
    """A reranker is a sequence classifier: nothing is special."""
    case = find("bert-ForSequenceClassification")
    dense = make_dense(case, torch.float32, num_labels=1)
    small = compress(dense, calibrated(case, dense), hidden_size=D)
    for name, model in (("dense", dense), ("small", small)):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    pairs = [("w1 w2", "w3 w4 w5"), ("w1", "w9"), ("w40 w41 w42", "w3")]
    expected = library.CrossEncoder(str(tmp_path / "dense"), device="cpu").predict(pairs)
    found = library.CrossEncoder(str(tmp_path / "small"), device="cpu", trust_remote_code=True).predict(pairs)
    assert np.abs(expected - found).max() <= 1e-5


RERANKER = find("bert-ForSequenceClassification")
PAIRS = [("w1 w2", "w3 w4 w5"), ("w1", "w9"), ("w40 w41 w42", "w3")]


def write_reranker(folder: Path) -> Path:
    """A reranker whose scores are its logits, with a prompt, as version 6 writes it."""
    make_dense(RERANKER, torch.float32, num_labels=1).save_pretrained(folder / "plain")
    make_tokenizer().save_pretrained(folder / "plain")
    kinds = {"activation_fn": torch.nn.Identity(), "prompts": {"query": "w99 "}, "default_prompt_name": "query"}
    library.CrossEncoder(str(folder / "plain"), device="cpu", **kinds).save_pretrained(str(folder / "reranker"))
    return folder / "reranker"


def test_a_reranker_keeps_its_activation(tmp_path: Path) -> None:
    """One score is a sigmoid to whom no file says otherwise."""
    dense, small, texts = write_reranker(tmp_path), tmp_path / "small", tmp_path / "texts.txt"
    texts.write_text("\n".join(f"w{i} w{i + 1} w{2 * i}" for i in range(50)))
    tcsp("compress", dense, "--data", texts, "--hidden-size", D, "-o", small, "--json")
    expected = library.CrossEncoder(str(dense), device="cpu").predict(PAIRS)
    made = library.CrossEncoder(str(small), device="cpu", trust_remote_code=True)
    assert isinstance(made.activation_fn, torch.nn.Identity) and made.prompts["query"] == "w99 "
    assert np.abs(expected - made.predict(PAIRS)).max() <= 1e-4
    card = (small / "README.md").read_text()
    assert "CrossEncoder(" in card and "SentenceTransformer(" not in card
    assert "pipeline_tag: text-classification" in card and "library_name: transformers" in card


def test_a_trained_reranker_keeps_its_activation(tmp_path: Path) -> None:
    dense, texts = write_reranker(tmp_path), tmp_path / "texts.txt"
    texts.write_text("\n".join(f"w{i} w{i + 1} w{2 * i}" for i in range(50)))
    told = ["--model", dense, "--data", texts, "--hidden-size", 16, "--epochs", 1, "--train-samples", 32]
    tcsp("train", *told, "-o", tmp_path / "small", "--json")
    made = library.CrossEncoder(str(tmp_path / "small"), device="cpu", trust_remote_code=True)
    assert isinstance(made.activation_fn, torch.nn.Identity) and made.prompts["query"] == "w99 "


def test_settings_of_a_reranker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whose code is somebody else's is not handed on, nor is what belongs to another kind of model."""
    dense = write_reranker(tmp_path)
    assert len(reranker_settings(str(dense))) == 3 and not reranker_settings(str(tmp_path / "plain"))
    assert not reranker_settings("no/such-model")
    path = dense / "config_sentence_transformers.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"activation_fn": "os.getcwd"}))
    assert not reranker_settings(str(dense)) and "os.getcwd" in caplog.text
    path.write_text(json.dumps(content | {"model_type": "SentenceTransformer"}))
    assert not reranker_settings(str(dense))
    path.write_text("{")
    with pytest.raises(TCSPError, match="is damaged"):
        reranker_settings(str(dense))


def test_refusals(small: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TCSPError, match="pooling mode is 'max'"):
        load_source(write_source(tmp_path, pooling="max"))
    with pytest.raises(TCSPError, match="TCSPBertForMaskedLM is no compressed encoder"):
        to_sentence_transformer(make_small(find("bert-ForMaskedLM")), make_tokenizer())
    make_dense(find("bert-ForMaskedLM"), torch.float32).save_pretrained(tmp_path / "head")
    make_tokenizer().save_pretrained(tmp_path / "head")
    told = ["--hidden-size", "16", "--sentence-transformer", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["compress", str(tmp_path / "head"), *told])
    assert isinstance(result.exception, TCSPError) and "BertForMaskedLM has a head" in str(result.exception)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(TCSPError, match=r"pip install 'tcsp_hf\[sentence-transformers\]'"):
        load_source(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_command_calibrates_for_the_sources_pooling(
    pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = write_source(tmp_path, pooling=pooling), []

    def calibrate(*args: Any, **kwargs: Any) -> Any:
        found = tcsp_hf.calibrate(*args, **kwargs)
        seen.append(found.objective)
        return found

    monkeypatch.setattr("tcsp_hf.cli.compress.calibrate", calibrate)
    (tmp_path / "texts.txt").write_text("\n".join(f"w{i} w{i + 1} w{i % 9}" for i in range(40)))
    told = ("compress", path, "--data", tmp_path / "texts.txt", "--hidden-size", 16, "--sentence-transformer")
    tcsp(*told, "--quiet", "-o", tmp_path / "small")
    assert seen == [f"embedding-{pooling}"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert 'SentenceTransformer("small", trust_remote_code=True)' in card
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ('{"pooling_mode": "cls"}', "cls"),
        ('{"pooling_mode": ["cls", "mean"]}', "mean"),
        ('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false, "include_prompt": true}', "cls"),
        ('{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}', "mean"),
        ('{"pooling_mode": "lasttoken"}', "mean"),
        ("[1]", None),
        ("{", None),
        (None, None),
    ],
)
def test_declared_pooling(settings: str | None, pooling: str | None, tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"type": "a.Transformer", "path": ""},
        {"type": "sentence_transformers.Pooling", "path": "1_Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(parts))
    if settings is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(settings)
    assert declared_pooling(str(tmp_path)) == pooling
    for path in ("..", "/", "1_Pooling/../1_Pooling", None, 3):
        parts[1]["path"] = path
        (tmp_path / "modules.json").write_text(json.dumps(parts))
        assert declared_pooling(str(tmp_path)) is None
    parts.insert(1, {"type": "sentence_transformers.models.WeightedLayerPooling", "path": ""})
    parts[2]["path"] = "1_Pooling"
    (tmp_path / "modules.json").write_text(json.dumps(parts))
    assert declared_pooling(str(tmp_path)) == pooling
    (tmp_path / "modules.json").write_text("{")
    assert declared_pooling(str(tmp_path)) is declared_pooling(str(tmp_path / "none")) is None


def test_the_trainer_follows_the_source(tmp_path: Path) -> None:
    """Its calibration and its lessons; what it is told comes first."""
    source = write_source(tmp_path, pooling="cls")
    dense = type(dense_model()).from_pretrained(source)
    rows = [{"input_ids": [3, 7 + i, 9, 4]} for i in range(24)]
    for told, used in ((None, "cls"), ("mean", "mean")):
        arguments = make_arguments(tmp_path / "run", max_steps=1, pooling=told)
        trainer = tcsp_hf.TCSPTrainer(dense, arguments, train_dataset=rows, processing_class=make_tokenizer())
        trainer.train()
        assert trainer.calibration.objective == f"embedding-{used}" and trainer._distiller.pooling == used


def test_bench_reads_embeddings_as_the_source_does(tmp_path: Path) -> None:
    source = write_source(tmp_path, modules.Normalize(), pooling="cls")
    dense, texts = load_model(str(source)), ["w1 w2 w3", "w40 w7"]
    task = load_task(dense, "squad-sample", items=2)
    assert isinstance(task, Retrieval) and task.pooling == "cls"
    found = embed(dense, make_tokenizer(), texts, pooling="cls").numpy()
    assert np.abs(library.SentenceTransformer(str(source), device="cpu").encode(texts) - found).max() <= 1e-5
    small = compress(dense, calibrated(ENCODER, dense), hidden_size=D)
    assert np.abs(embed(small, make_tokenizer(), texts, pooling="cls").numpy() - found).max() <= 1e-5
