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
from tcsp_hf.tasks import find_task
from tcsp_hf.train.paper import Row, read_rows, run_row, write_grid
from tcsp_hf.train.paper_report import groups_of, missed_bars, picture, report, summary

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


def paper_result(task: str, remove: float, seed: int, dense: float, score: float) -> dict[str, Any]:
    name = find_task(task).headline
    row = {"model": "some/model", "task": task, "remove": remove, "mode": "distilled", "seed": seed}
    own = {"removed": remove, "headline": name, "dense": {name: dense}, "scores": {name: score}, "seconds": 1.0}
    took = {"dense_seconds": 8.0, "dense_steps": 4, "training_seconds": 3.0, "steps": 2}
    if seed:  # of a version that knows the processor's own time
        took |= {"dense_processor_seconds": 2.0, "training_processor_seconds": 2.0, "processor_seconds": 5.0}
    return {"row": row, **own, **took}


def test_paper_summary_is_a_mean_over_seeds_and_tasks(tmp_path: Path) -> None:
    results = [
        paper_result("mrpc", 0.44, 0, 0.80, 0.82),
        paper_result("mrpc", 0.44, 1, 0.82, 0.82),
        paper_result("squad", 0.44, 0, 60.0, 58.0),  # in points already
        paper_result("mrpc", 0.94, 0, 0.80, 0.72),
    ]
    groups = groups_of(results)
    assert [(group.task, round(group.drop, 6), len(group.scores)) for group in groups] == [
        ("mrpc", -1.0, 2),
        ("mrpc", 8.0, 1),
        ("squad", 2.0, 1),
    ]
    rows = {row["remove"]: row for row in summary(groups)}
    assert rows[0.44]["mean_drop"] == pytest.approx(0.5) and rows[0.44]["worst_task"] == "squad"
    assert rows[0.94]["kept"] == pytest.approx(0.9)
    missed = missed_bars(list(rows.values()))
    assert len(missed) == 3  # the mean and the worst at 44 %, what is kept at 94 %
    assert missed_bars(summary(groups_of(results[:2]))) == []
    assert (groups[0].step, groups[0].seconds, groups[0].dense_seconds) == ((0.75 + 2.0) / 2, 3.0, 5.0)
    ready = [{**results[0], "dense_seconds": None, "dense_steps": None}, results[1]]
    assert groups_of(ready)[0].step is None and groups_of(ready)[0].dense_seconds is None
    assert "±" in report(results, tmp_path).read_text()


def test_paper_grid(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    written = write_grid(rows, ["a/b"], ["mrpc"], [0.44], ["distilled"], [0, 1], ["dense_epochs = 5"])
    assert [path.stem for path in written] == ["b-mrpc-44-distilled", "b-mrpc-44-distilled-seed1"]
    assert sorted((row.seed, row.dense_epochs) for row in read_rows(rows)) == [(0, 5), (1, 5)]
    assert write_grid(rows, ["a/b"], ["mrpc"], [0.44], ["distilled"], [0], ["dense_epochs = 5"]) == []
    for option, value, match in (
        ("--set", "x y", "must be name=value"),
        ("--seeds", "x y", "whole numbers"),
        ("--modes", "x y", "'x y'"),
        ("--set", "epoch=5", "unknown field 'epoch'"),
        ("--set", 'axes=["filter"]', "axes is"),
        ("--remove", "1.5", "remove is 1.5"),
        ("--models", "a/c,b/c", "Two rows"),
    ):
        with pytest.raises(TCSPError, match=match):
            tcsp("bench", "paper", tmp_path / "r", "-o", tmp_path / "o", "--models", "a", option, value, "--no-run")
        assert not (tmp_path / "r").exists()
    with pytest.raises(TCSPError, match="other settings"):
        write_grid(rows, ["a/b"], ["mrpc"], [0.44], ["distilled"])
    written[0].rename(rows / "mine.toml")
    assert write_grid(rows, ["a/b"], ["mrpc"], [0.44], ["distilled"], [0], ["dense_epochs = 5"]) == []
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(TCSPError, match="left as it is"):
        tcsp("bench", "paper", rows, "-o", tmp_path)


def test_rows_of_other_settings_stand_apart() -> None:
    """In the table and in its means; seeds alone are joined."""

    def result(task: str, seed: int, lr: float) -> dict[str, Any]:
        row = {"model": "m", "task": task, "remove": 0.44, "mode": "distilled", "seed": seed, "lr": lr, "name": f"{lr}"}
        timed = {"seconds": 1.0, "dense_seconds": 1.0, "steps": 0, "dense_steps": 1}
        scores = {"dense": {"accuracy": 0.5}, "scores": {"accuracy": 0.5}, "headline": "accuracy", "removed": 0.44}
        return {"row": row, **timed, **scores}

    one = [result("mrpc", 0, 1e-4), result("mrpc", 1, 1e-4), result("rte", 0, 1e-4)]
    assert [(len(group.scores), group.settings) for group in groups_of(one)] == [(2, ""), (1, "")]
    groups = groups_of([*one, result("mrpc", 0, 2e-4)])
    assert [(group.task, len(group.scores), group.settings) for group in groups] == [
        ("mrpc", 2, "lr=0.0001"),
        ("mrpc", 1, "lr=0.0002"),
        ("rte", 1, "lr=0.0001"),
    ]
    assert [row["tasks"] for row in summary(groups)] == [["mrpc", "rte"], ["mrpc"]]


def test_a_picture_draws_other_settings_as_lines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    labels: list[str] = []
    draw = axes.Axes.plot

    def plot(self: Any, *points: Any, **how: Any) -> Any:
        labels.append(how["label"])
        return draw(self, *points, **how)

    monkeypatch.setattr(axes.Axes, "plot", plot)
    results = [paper_result("mrpc", 0.44, 0, 0.8, 0.8), paper_result("mrpc", 0.6, 0, 0.8, 0.7)]
    other = paper_result("mrpc", 0.44, 0, 0.8, 0.6)
    other["row"] = {**other["row"], "lr": 2e-4}
    results[0]["row"]["lr"] = results[1]["row"]["lr"] = 1e-4
    picture([*results, other], tmp_path / "a.png")
    assert len(labels) == len(set(labels)) == 2 and (tmp_path / "a.png").is_file()
