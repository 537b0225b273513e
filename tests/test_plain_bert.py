"""Stock BERT forms of compressed ones: exact where only neurons went, fitted where the width did."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from common import (
    BERT_CASES,
    Case,
    D,
    dense_and_sample,
    find,
    make_dense,
    make_inputs,
    make_rows,
    make_small,
    make_tokenizer,
    orthonormal,
    outputs,
)
from test_cli import tcsp

from tcsp_hf import Calibration, TCSPError, calibrate, compress
from tcsp_hf.baselines.narrow import narrow_bert
from tcsp_hf.cli.bench.plain_bert import neurons_for
from tcsp_hf.compression import removed_fraction
from tcsp_hf.export.gauge import choose_gauge
from tcsp_hf.export.plain_bert import to_plain_bert

CLASSIFIER = find("bert-ForSequenceClassification")
FITTED = [find(f"bert-{head}") for head in ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")]


@pytest.mark.parametrize("case", BERT_CASES, ids=str)
def test_fewer_neurons_are_a_stock_bert(case: Case, tmp_path: Path) -> None:
    small = compress(*dense_and_sample(case), remove=0.15, axes=("filters",), uniform=True)
    plain = to_plain_bert(small)
    assert type(plain) is case.dense_class
    assert plain.config.intermediate_size == small.config.intermediate_size_of(0) < 40
    inputs = make_inputs(case)
    with torch.no_grad():
        expected, found = small(**inputs), plain(**inputs)
    compared = [name for name in expected if name != "last_hidden_state"]
    assert compared
    for name in compared:
        torch.testing.assert_close(found[name], expected[name], atol=1e-9, rtol=1e-9)
    plain.save_pretrained(tmp_path)
    again = case.dense_class.from_pretrained(tmp_path, dtype=torch.float64).eval()
    for name, value in outputs(case, again, inputs).items():
        torch.testing.assert_close(value, outputs(case, plain, inputs)[name], atol=1e-12, rtol=0)


def test_export_needs_nothing_of_ours_to_load(tmp_path: Path) -> None:
    small = compress(*dense_and_sample(CLASSIFIER, torch.float32), remove=0.15, axes=("filters",), uniform=True)
    small.save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    told = tcsp("export", tmp_path / "small", tmp_path / "plain", "--format", "bert", "--json")
    assert json.loads(told)["class"] == "BertForSequenceClassification"
    assert not list((tmp_path / "plain").glob("*.py")), "no code beside it"
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "bert" and "auto_map" not in config and "projection" not in config
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")) == len(make_tokenizer())
    plain, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "plain", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = make_inputs(CLASSIFIER)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**inputs).logits, small(**inputs).logits, atol=1e-5, rtol=1e-5)
    make_small(CLASSIFIER).save_pretrained(tmp_path / "narrow")
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    narrow = ("export", tmp_path / "narrow", tmp_path / "other", "--format")
    with pytest.raises(TCSPError, match=r"16 wide, 32 before.*axes=\('filters',\), uniform=True"):
        tcsp(*narrow, "bert")
    with pytest.raises(TCSPError, match="--stats and --neurons are for --format bert"):
        tcsp(*narrow, "onnx", "--neurons", 8)
    assert not (tmp_path / "other").exists()
    dense_and_sample(CLASSIFIER)[1].save(tmp_path / "stats")
    tcsp(*narrow, "bert", "--stats", tmp_path / "stats", "--neurons", 30)
    fitted = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
    assert type(fitted) is transformers.BertForSequenceClassification
    assert (fitted.config.hidden_size, fitted.config.intermediate_size) == (16, 30)


def test_whole_model_comes_back() -> None:
    """Nothing removed: the plain form of the compressed form is the dense model."""
    dense, stats = dense_and_sample(CLASSIFIER)
    plain = to_plain_bert(compress(dense, stats, hidden_size=D, refit=False))
    inputs = make_inputs(CLASSIFIER)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, dense(**inputs).logits, atol=1e-9, rtol=1e-9)


def test_gauge_finds_diagonal_maps() -> None:
    """Maps that are diagonal in some coordinates, with the mean's direction empty: a small misfit, less than before."""
    generator = torch.Generator().manual_seed(0)
    size, blocks = 12, 4
    mean = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    turns, moments, maps = [], [], []
    for _ in range(blocks + 1):
        others = torch.linalg.qr(torch.cat([mean, orthonormal(size, size - 1, generator)], dim=1))[0][:, 1:]
        own = orthonormal(size, size, generator)
        turns.append(mean @ own[:, :1].T + others @ own[:, 1:].T)
        moments.append(own[:, 1:] @ torch.diag(1 + torch.rand(size - 1, generator=generator).double()) @ own[:, 1:].T)
    for t in range(blocks):
        weights = 0.8 + 0.4 * torch.rand(size, generator=generator, dtype=torch.float64)
        centring = torch.eye(size, dtype=torch.float64) - mean @ mean.T
        maps.append(turns[t + 1].T @ centring @ (weights[:, None] * turns[t]))
    first = choose_gauge(maps, moments, [1.0] * blocks, sweeps=0)
    found = choose_gauge(maps, moments, [1.0] * blocks, sweeps=100)
    assert sum(found.misfit) < 0.75 * sum(first.misfit)
    for turn in found.turns:
        torch.testing.assert_close(turn.T @ turn, torch.eye(size, dtype=torch.float64))


@pytest.fixture(scope="module")
def many() -> tuple[transformers.PreTrainedModel, Calibration]:
    dense = make_dense(CLASSIFIER, torch.float32)
    stats = calibrate(dense, make_rows(CLASSIFIER, 400), batch_size=32, progress=False, sample_tokens=65_536)
    return dense, stats


def test_narrower_is_near_the_exact_form(many: tuple[transformers.PreTrainedModel, Calibration]) -> None:
    dense, stats = many
    small = compress(dense, stats, hidden_size=28, multiple_of=4)
    inputs = make_inputs(CLASSIFIER, seed=3)
    with torch.no_grad():
        expected = small(**inputs).logits
        scale = (expected - expected.mean(0)).norm()
        for options in ({}, {"heads": 2}, {"neurons": 40, "linear": 4}, {"neurons": 32}):
            plain = to_plain_bert(small, stats, **options)
            assert type(plain) is transformers.BertForSequenceClassification
            assert plain.config.hidden_size == 28
            assert plain.config.intermediate_size == options.get("neurons", 40)
            assert (plain(**inputs).logits - expected).norm() < 0.6 * scale, options
        by_norm = narrow_bert(dense, 28, 40)
        assert (by_norm(**inputs).logits - expected).norm() > (plain(**inputs).logits - expected).norm()


@pytest.mark.parametrize("case", FITTED, ids=str)
def test_narrower_heads(case: Case, tmp_path: Path) -> None:
    small = compress(*dense_and_sample(case, torch.float32), hidden_size=28, multiple_of=4)
    plain = to_plain_bert(small, dense_and_sample(case, torch.float32)[1])
    plain.save_pretrained(tmp_path)
    _, info = case.dense_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = outputs(case, plain, make_inputs(case))
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


def test_magnitude_student_of_the_whole_size_is_the_dense_model() -> None:
    dense = make_dense(CLASSIFIER)
    student = narrow_bert(dense, D, 40)
    inputs = make_inputs(CLASSIFIER)
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, dense(**inputs).logits)
    assert removed_fraction(dense, narrow_bert(dense, 28, neurons_for(dense, 28, 0.4))) >= 0.4


def test_refusals() -> None:
    dense, stats = dense_and_sample(CLASSIFIER)
    with pytest.raises(TCSPError, match="no compressed BERT"):
        to_plain_bert(dense)
    with pytest.raises(TCSPError, match=r"differ .* uniform=True"):
        to_plain_bert(compress(dense, stats, energy=0.9, multiple_of=1))
    small = make_small(CLASSIFIER)
    with pytest.raises(TCSPError, match="token sample"):
        to_plain_bert(small)
    with pytest.raises(TCSPError, match="statistics are of another model"):
        to_plain_bert(small, dense_and_sample(FITTED[0])[1])
    with pytest.raises(TCSPError, match="heads is 3"):
        to_plain_bert(small, stats, heads=3)
    with pytest.raises(TCSPError, match="neurons is 10 and linear 5"):
        to_plain_bert(small, stats, neurons=10, linear=5)
    with pytest.raises(TCSPError, match="no plain form below the dense width"):
        to_plain_bert(make_small(find("bert-ForMaskedLM")), stats)
    with pytest.raises(TCSPError, match="cannot be narrowed"):
        narrow_bert(make_dense(find("bert-Model")), 28, 40)


def test_bench_trains_every_form_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    folder, data = tmp_path / "dense", tmp_path / "data" / "glue" / "sst2"
    make_dense(CLASSIFIER, torch.float32, num_labels=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    data.mkdir(parents=True)
    rows = [" ".join(f"w{(i * j + i) % 30}" for j in range(3 + i % 7)) for i in range(80)]
    for split in ("train", "validation"):
        Dataset.from_dict({"sentence": rows, "label": [i % 2 for i in range(80)]}).to_parquet(data / f"{split}.parquet")
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path / "data"))
    told = ("--model", folder, "--remove", 0.3, "--hidden-size", 28, "--train-samples", 64, "--eval-samples", 20)
    found = json.loads(tcsp("bench", "plain-bert", *told, "--json"))
    assert found["rows"][0]["form"] == "exact form"
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["removed"] >= 0.3
        assert row["kl after training"] != row["kl"]
    with pytest.raises(TCSPError, match="--hidden-size is 30"):
        tcsp("bench", "plain-bert", "--model", folder, "--hidden-size", 30)
    with pytest.raises(AssertionError, match="--eval-samples"):
        tcsp("bench", "plain-bert", "--model", folder, "--eval-samples", 0)
    data.rename(data.parent / "cola")
    told = ("--remove", 0.3, "--hidden-size", 28, "--train-samples", 0, "--eval-samples", 20, "--sequences", 20)
    found = json.loads(tcsp("bench", "plain-bert", "--model", folder, "--task", "cola", *told, "--json"))
    assert "dense_Matthews correlation" in found, "CoLA's figure is no accuracy"
    for row in found["rows"]:
        assert -1.0 <= row["Matthews correlation"] <= 1.0 and "accuracy" not in row
