"""`bench paper`: what is kept between rows belongs to the weights and rows of today, and files that are no rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import find, make_dense, make_tokenizer
from datasets import Dataset
from test_cli import tcsp

from tcsp_hf import TCSPError
from tcsp_hf.train.paper import Row, run_row

BERT = find("bert-ForSequenceClassification")


def save_model(folder: Path, seed: int) -> None:
    make_dense(BERT, torch.float32, seed, num_labels=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_rows(folder: Path, split: str, first: int) -> None:
    pairs = [{"sentence1": f"w{first + i} w{i}", "sentence2": f"w{i % 9}", "label": i % 2, "idx": i} for i in range(30)]
    (folder / "glue" / "mrpc").mkdir(parents=True, exist_ok=True)
    Dataset.from_list(pairs).to_parquet(str(folder / "glue" / "mrpc" / f"{split}.parquet"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a row of the model in tmp_path/model, on data in tmp_path/data, into tmp_path/results."""
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path / "data"))
    save_model(tmp_path / "model", 0)
    for split in ("train", "validation"):
        save_rows(tmp_path / "data", split, 0)

    def run(name: str, **fields: Any) -> dict[str, Any]:
        row = Row(name, str(tmp_path / "model"), "mrpc", 0.2, "retraining-free", dense_epochs=0.5, **fields)
        return run_row(row, tmp_path / "results")

    return run


def the_folder(tmp_path: Path, kind: str) -> Path:
    (folder,) = (path for path in (tmp_path / "results" / kind).iterdir() if path.is_dir())
    return folder


def test_what_is_kept_is_of_the_same_weights(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first = run("first", ready=True)
    assert run("second", ready=True)["scores"] == first["scores"]
    save_model(tmp_path / "model", 1)
    assert run("first", ready=True) == first, "a row that is finished stays as it is"
    for kind in ("dense", "compressed", "statistics"):
        folder = the_folder(tmp_path, kind)
        with pytest.raises(TCSPError, match=f"{folder} was made from other weights or rows"):
            run("third", ready=True)
        shutil.rmtree(folder)
    run("third", ready=True)


def test_what_is_kept_is_of_the_same_rows(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run("first")
    for split in ("validation", "train"):
        save_rows(tmp_path / "data", split, 7)
        with pytest.raises(TCSPError, match=r"results/dense/.* was made from other weights or rows"):
            run("second")
        save_rows(tmp_path / "data", split, 0)
    run("second")
    save_model(tmp_path / "model", 1)
    with pytest.raises(TCSPError, match=r"results/dense/.* was made from other weights or rows"):
        run("third")
    for kind in ("dense", "compressed"):  # as older versions left it
        record = the_folder(tmp_path, kind) / "record.json"
        found = json.loads(record.read_text())
        assert found.pop("source")
        record.write_text(json.dumps(found))
    run("third")


@pytest.mark.parametrize(
    "line",
    [
        'batch_size = "32"',
        "batch_size = true",
        'epochs = "3"',
        "dense_epochs = -1",
        "lr = inf",
        'seed = "a"',
        "seed = -1",
        "axes = 3",
        "axes = [3]",
        "eval_samples = -5",
        "calibration_samples = 0",
        "form = 1",
        "train_split = []",
        "ready = 1",
        'bf16 = "no"',
    ],
)
def test_fields_of_another_type_are_refused(line: str, tmp_path: Path) -> None:
    path, name = tmp_path / "row.toml", line.split(" ")[0]
    text = 'model = "a"\ntask = "mrpc"\nremove = 0.5\nmode = "distilled"\n'
    assert Row.parse(path, text).name == "row"
    with pytest.raises(TCSPError, match=rf"row\.toml: {name.removeprefix('dense_')} is ") as error:
        Row.parse(path, f"{text}{line}\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["model = 1", "task = []", 'remove = "0.5"', "mode = 2"])
def test_labels_of_another_type_are_refused(line: str, tmp_path: Path) -> None:
    lines = {"model": '"a"', "task": '"mrpc"', "remove": "0.5", "mode": '"distilled"'}
    name, value = line.split(" = ")
    text = "".join(f"{key} = {found}\n" for key, found in {**lines, name: value}.items())
    with pytest.raises(TCSPError, match=rf"row\.toml: {name} is "):
        Row.parse(tmp_path / "row.toml", text)


def test_files_written_alone(tmp_path: Path) -> None:
    arguments = ("bench", "paper", tmp_path / "rows", "-o", tmp_path / "results", "--no-run", "--json")
    found = json.loads(tcsp(*arguments, "--models", "a/b, a/c", "--tasks", "mrpc, rte", "--remove", "0.5"))
    assert {(row["model"], row["task"]) for row in found} == {(m, t) for m in ("a/b", "a/c") for t in ("mrpc", "rte")}
    assert len(found) == len(list((tmp_path / "rows").iterdir())) == 12
