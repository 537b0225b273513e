"""`tcsp bench quality` and what it scores with, on tiny models."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import dense_and_sample, find, make_dense, make_ending_tokenizer, make_small, make_tokenizer
from datasets import Dataset
from scipy.stats import spearmanr
from sklearn.metrics import matthews_corrcoef
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tcsp_hf import TCSPError
from tcsp_hf.baselines import BASELINES
from tcsp_hf.cli.main import app
from tcsp_hf.compression import Search, compress
from tcsp_hf.evaluation import comparison, quality
from tcsp_hf.evaluation.embeddings import recall_at
from tcsp_hf.evaluation.flops import count_flops
from tcsp_hf.evaluation.load_task import load_task
from tcsp_hf.evaluation.quality import METHODS, shortfalls
from tcsp_hf.evaluation.scoring import Classification, Matthews, Regression, Retrieval, Similarity
from tcsp_hf.files import write_whole

BERT = find("bert-ForSequenceClassification")
ENCODER = find("bert-Model")


def tcsp(*arguments: Any, status: int = 0) -> str:
    """Standard output of `tcsp` with these arguments; its exception if it raised one."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_dense(BERT, torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled sentences, three classes."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 80), ("validation", 30)):
        lines = []
        for i in range(count):
            words = torch.randint(0, 100, (3 + i % 7,), generator=generator).tolist()
            lines.append(json.dumps({"sentence": " ".join(f"w{word}" for word in words), "label": i % 3}))
        (folder / f"{split}.json").write_text("\n".join(lines) + "\n")
    return folder


def bench(dense: Path, data: Path, output: Path, *more: Any, status: int = 0) -> str:
    shape = ("--latency", "1x8", "--quiet")
    return tcsp("bench", "quality", "--model", dense, "--task", data, "-o", output, *shape, *more, status=status)


def test_every_method_in_one_table(dense: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "table"
    found = json.loads(bench(dense, data, output, "--remove", "0.15,0.4", "--json"))
    assert json.loads((output / "results.json").read_text()) == found
    assert [(row["asked"], row["method"]) for row in found["rows"]] == [(a, m) for a in (0.15, 0.4) for m in METHODS]
    for row in found["rows"]:
        assert "error" not in row
        assert row["asked"] <= row["removed"] < 0.9
        assert 0.0 <= row["score"] <= 1.0 and 0.0 <= row["agreement"] <= 1.0 and row["distance"] >= 0.0
        assert 0.0 < row["flops_ratio"] < 1.0
        left = row["non_embedding_parameters"] / found["dense"]["non_embedding_parameters"]
        assert row["removed"] == pytest.approx(1.0 - left)
        assert row["small_ms"] > 0.0 and row["seconds"] > 0.0 and row["peak_memory"] > 1e6
    by_name = {row["method"]: row for row in found["rows"] if row["asked"] == 0.15}
    assert by_name["magnitude"]["calibration_seconds"] == 0.0 < by_name["ours"]["calibration_seconds"]
    table = (output / "table.md").read_text()
    assert all(table.count(BASELINES[name].title) >= 2 for name in BASELINES)
    assert "**40% asked**" in table
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_finished_rows_are_not_made_again(
    dense: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its third row, the run goes on there; the statistics are not collected again."""
    output = tmp_path / "table"
    options = ("--remove", "0.2,0.4", "--methods", "magnitude,svd", "--json")
    original, made = quality._row, []

    def counted(*arguments: Any) -> dict[str, Any]:
        made.append(arguments[-2:])
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(quality, "_row", counted)
    bench(dense, data, output, *options, status=130)
    assert sorted(path.name for path in (output / "rows").iterdir()) == [
        "dense.json",
        "magnitude-0.2.json",
        "svd-0.2.json",
    ]
    assert not (output / "results.json").exists()
    first = (output / "rows" / "svd-0.2.json").read_text()

    def never(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("tcsp_hf.evaluation.comparison.calibrate", never)
    found = json.loads(bench(dense, data, output, *options))
    assert made[3:] == [("magnitude", 0.4), ("svd", 0.4)]
    assert (output / "rows" / "svd-0.2.json").read_text() == first
    assert all(row["calibration_seconds"] > 0 for row in found["rows"] if row["method"] == "svd")
    again = json.loads(bench(dense, data, output, *options))
    assert len(made) == 5 and again == found
    monkeypatch.undo()
    one = json.loads(bench(dense, data, output, "--remove", "0.4", "--methods", "svd", "--json"))
    assert one["rows"] == found["rows"]  # what the folder holds belongs to its table
    fresh = json.loads(bench(dense, data, output, *options, "--fresh"))
    keys = ("method", "asked", "removed", "score", "distance", "flops")
    assert [[row[key] for key in keys] for row in fresh["rows"]] == [
        [row[key] for key in keys] for row in found["rows"]
    ]
    assert (output / "rows" / "svd-0.2.json").read_text() != first


def test_rows_of_another_comparison_stay_apart(
    dense: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table"
    options = ("--remove", "0.2", "--methods", "magnitude")
    bench(dense, data, output, *options)
    with pytest.raises(TCSPError, match=r"another comparison: seed is 0 there and 1 now.*--fresh"):
        bench(dense, data, output, *options, "--seed", 1)
    bench(dense, data, output, *options, "--seed", 1, "--fresh")
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    with pytest.raises(TCSPError, match=r"another comparison: threads is \d+ there and 77 now"):
        bench(dense, data, output, *options, "--seed", 1)
    monkeypatch.undo()
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "train.json").write_text("\n".join((data / "train.json").read_text().splitlines()[1:]) + "\n")
    run = json.loads((output / "run.json").read_text())
    shutil.move(data, tmp_path / "kept")
    shutil.move(other, data)
    try:
        with pytest.raises(TCSPError, match="another comparison: texts is"):
            bench(dense, data, output, *options, "--seed", 1)
        write_whole(output / "run.json", json.dumps({key: run[key] for key in run if key != "texts"}))
        bench(dense, data, output, *options, "--seed", 1)  # a folder of an earlier version
    finally:
        shutil.move(data, other)
        shutil.move(tmp_path / "kept", data)
    write_whole(output / "run.json", json.dumps(run))
    (output / "rows" / "magnitude-0.2.json").write_text("{")
    with pytest.raises(TCSPError, match="cannot be read"):
        bench(dense, data, output, *options, "--seed", 1)


def test_what_a_method_cannot_do_is_a_dash_and_tried_again(dense: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "table"
    options = ("--remove", "0.97", "--methods", "top-layers,magnitude")
    assert "top layers dropped at 97%: Dropping layers cannot remove 97.0%" in bench(dense, data, output, *options)
    assert "| top layers dropped | - | - |" in (output / "table.md").read_text()
    path = output / "rows" / "top-layers-0.97.json"
    before = path.stat().st_mtime_ns
    bench(dense, data, output, *options)
    assert path.stat().st_mtime_ns > before


def test_a_method_that_fails_in_its_arithmetic_costs_its_row(
    dense: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: Any) -> torch.Tensor:
        return torch.linalg.cholesky(-torch.eye(2))

    monkeypatch.setitem(BASELINES, "svd", dataclasses.replace(BASELINES["svd"], compress=fails))
    found = bench(dense, data, tmp_path / "table", "--remove", "0.3", "--methods", "svd,magnitude")
    assert "whitened low-rank SVD at 30%: linalg.cholesky" in found


def test_bad_input_comes_before_any_work(dense: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "table"
    for option, value, message in (
        ("--methods", "ours,theirs", "methods is"),
        ("--methods", "svd,svd", "each once"),
        ("--remove", "0.2,1.0", "between 0 and 1"),
        ("--remove", "0.2,0.2", "named once"),
        ("--remove", "some", "numbers with commas"),
        ("--axes", "width", "axes is"),
        ("--latency", "8", "8x128"),
        ("--latency", "0x8", "positive"),
        ("--latency", "8x41", "at most 40 tokens"),
        ("--split", "test", "has no split"),
        ("--calibration", "nowhere", "There is no data"),
    ):
        with pytest.raises(TCSPError, match=message):
            bench(dense, data, output, option, value)
    assert not output.exists()
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    with pytest.raises(TCSPError, match="not empty"):
        bench(dense, data, output, "--fresh")
    (output / "run.json").write_text("{}")
    with pytest.raises(TCSPError, match="not written by this benchmark"):
        bench(dense, data, output, "--fresh")
    assert (output / "mine.txt").read_text() == "keep"


def row(method: str, asked: float, score: float, distance: float) -> dict[str, Any]:
    return {"method": method, "title": method, "asked": asked, "score": score, "distance": distance}


def test_shortfalls() -> None:
    ours = [row("ours", 0.44, 0.89, 0.009), row("ours", 0.6, 0.87, 0.01)]
    good = [row("svd", 0.44, 0.90, 0.02), row("fisher", 0.44, 0.88, 0.001), row("svd", 0.6, 0.87, 0.001)]
    assert shortfalls(ours + good, "other") == []
    assert shortfalls([*ours, row("svd", 0.44, 0.90, 0.001)], "other")[0].startswith("at 44% svd is better in both")
    missed = shortfalls(ours, "sst2")
    assert len(missed) == 1 and "the bar is 0.876 and 0.03" in missed[0]
    broken = [{"method": "ours", "title": "ours", "asked": 0.44, "error": "no"}]
    assert "gave nothing" in shortfalls(broken, "other")[0]
    slow = [{**ours[0], "forward_passes": 13.0}]
    assert "13.0 forward passes" in shortfalls(slow, "sst2")[0] and shortfalls(slow, "other") == []
    assert shortfalls([*ours, *slow], None) == []


def test_bars_of_the_readmes_model_are_for_a_check(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model on SST-2 is not told what that one reaches."""
    folder = tmp_path / "data" / "glue" / "sst2"
    folder.mkdir(parents=True)
    rows = [json.dumps({"sentence": f"w{i} w{i % 7} w3", "label": i % 2}) for i in range(40)]
    for split in ("train", "validation"):
        (folder / f"{split}.json").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path / "data"))
    told = (dense, Path("sst2"), tmp_path / "table", "--remove", "0.44", "--methods", "ours")
    assert "the bar is" not in bench(*told)
    assert json.loads((tmp_path / "table" / "results.json").read_text())["shortfalls"] == []
    assert "the bar is 0.88" in bench(*told, "--check", status=1)


def test_an_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a clock starts and before it is read."""
    model, stats = dense_and_sample(BERT, torch.float32)
    task = Classification("two", ["w1 w2", "w3"], [0, 1])
    found = comparison.Comparison(model, make_tokenizer(), task, [], 1, 0, False)
    found.__dict__["stats"] = stats
    seen: list[str] = []
    for module in (comparison, quality):
        monkeypatch.setattr(module, "wait_for", lambda _device: seen.append("wait"))
    handle = model.register_forward_hook(lambda *_arguments: seen.append("pass"))
    assert found.forward_seconds > 0.0
    handle.remove()
    assert seen[:2] == ["pass", "wait"] and seen[-1] == "wait" and set(seen[2:-1]) == {"pass"}  # the first one warms up
    seen.clear()

    def compressed(*arguments: Any) -> Any:
        seen.append("compress")
        return BASELINES["svd"].compress(*arguments)

    method = dataclasses.replace(BASELINES["magnitude"], compress=compressed)
    monkeypatch.setattr(quality, "method_of", lambda *_arguments: method)
    plan = quality.Plan(["magnitude"], [0.3], latency=(1, 4))
    quality._row(found, plan, SimpleNamespace(calibration_seconds=None), Search(), "magnitude", 0.3)
    assert seen == ["wait", "compress", "wait"]


def test_check_exits_with_an_error(dense: Path, data: Path, tmp_path: Path) -> None:
    """Our rows made worse by hand: a finished row is believed."""
    output = tmp_path / "table"
    options = ("--remove", "0.2", "--methods", "ours,magnitude")
    bench(dense, data, output, *options)
    path = output / "rows" / "ours-0.2.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "score": -1.0, "distance": 9.0}))
    assert "Short: at 20% heads + filters by magnitude is better in both" in bench(dense, data, output, *options)
    bench(dense, data, output, *options, "--check", status=1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "score": 1.0, "distance": 0.0}))
    bench(dense, data, output, *options, "--check")


def test_sentence_encoders(data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Pairs with scores; calibrated on single texts."""
    folder = tmp_path / "encoder"
    make_dense(ENCODER, torch.float32, max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for split in ("train", "validation"):
        lines = [
            json.dumps(
                {"sentence1": f"w{i} w{i + 1} w{i + 2}", "sentence2": f"w{i} w{3 * i % 90}", "label": i % 5 / 1.0}
            )
            for i in range(40)
        ]
        (pairs / f"{split}.json").write_text("\n".join(lines) + "\n")
    options = ("--remove", "0.3", "--methods", "shared-pca,svd,fisher", "--json")
    found = json.loads(bench(folder, pairs, tmp_path / "table", *options))
    assert found["dense"]["score_name"] == "Spearman correlation"
    assert found["dense"]["distance_name"] == "1 - cosine"
    for line in found["rows"]:
        assert -1.0 <= line["score"] <= 1.0 and 0.0 <= line["distance"] <= 2.0 and line["agreement"] is None
    with pytest.raises(TCSPError, match="single texts"):
        bench(folder, data, tmp_path / "other")
    collapsed = torch.ones(3, 4)
    assert recall_at(collapsed, collapsed, [0, 1, 2], (1, 3)) == [0.0, 1.0], "as near as all the others is no hit"
    assert recall_at(torch.eye(3), torch.eye(3), [0, 1, 1], (1, 3)) == [pytest.approx(2 / 3), 1.0]
    assert recall_at(torch.full((1, 4), torch.nan), torch.eye(4), [0], (1,)) == [0.0]
    task = load_task(make_dense(ENCODER, torch.float32), "squad-sample")
    assert isinstance(task, Retrieval) and task.items == 1000
    few = load_task(make_dense(ENCODER, torch.float32), "squad-sample", items=10)
    assert few.items == 10 and few.texts() == task.texts()[:610], "every paragraph, the first questions"
    with pytest.raises(TCSPError, match="'squad-sample' has no split 'train'"):
        load_task(make_dense(ENCODER, torch.float32), "squad-sample", "train")
    assert task.calibration_texts(["a", "b", "a"], 5, 0) in (["a", "b"], ["b", "a"])


def test_t5_classifier(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    case = find("t5-ForSequenceClassification")
    make_dense(case, torch.float32).save_pretrained(folder)
    make_ending_tokenizer().save_pretrained(folder)
    found = json.loads(bench(folder, data, tmp_path / "table", "--remove", "0.3", "--json"))
    assert [row["method"] for row in found["rows"] if "error" not in row] == list(METHODS)


def test_models_and_data_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TCSPError, match="BertForMaskedLM cannot be scored"):
        load_task(make_dense(find("bert-ForMaskedLM")), str(data))
    with pytest.raises(TCSPError, match="T5Model cannot be scored"):
        load_task(make_dense(find("t5-Model")), str(data))
    with pytest.raises(TCSPError, match="has a head"):
        load_task(make_dense(BERT), "squad-sample")
    with pytest.raises(TCSPError, match=r"label 2 in row 2 .*the numbers 0 to 1 \(LABEL_0, LABEL_1\)"):
        load_task(make_dense(BERT, num_labels=2), str(data))
    for name, line, message in (
        ("hidden", {"sentence": "w1", "label": -1}, "no labels"),
        ("unlabelled", {"sentence": "w1"}, "no labels"),
        ("numbers", {"value": 3}, "no sentences"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "validation.json").write_text(json.dumps(line) + "\n")
        with pytest.raises(TCSPError, match=message):
            load_task(make_dense(BERT), str(folder))


def test_figures_of_the_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 6, (50,), generator=generator).float() for _ in range(2))
    labels = [i % 2 for i in range(50)]
    logits = torch.randn(50, 2, generator=generator)
    found = Matthews("cola", ["x"] * 50, labels).score(logits, logits)
    assert found.score == pytest.approx(matthews_corrcoef(labels, logits.argmax(-1)))
    assert (found.distance, found.agreement) == (0.0, 1.0)
    regression = Regression("stsb", ["x"] * 50, one.tolist())
    score = regression.score(other[:, None], other[:, None] + 2.0)
    assert score.score == pytest.approx(spearmanr(one, other).statistic)
    assert score.distance == pytest.approx(2.0)
    unit = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=-1)
    retrieval = Retrieval("search", ["a", "b", "c"], ["q", "r", "s"], [0, 1, 2])
    assert retrieval.score(unit, unit).agreement == 1.0
    perfect = torch.cat([torch.eye(4)[:3], torch.eye(4)[:3]])
    assert retrieval.score(unit, perfect).score == 1.0
    similarity = Similarity("pairs", [("a", "b")] * 3, [0.0, 1.0, 2.0])
    assert similarity.score(unit, unit).distance == pytest.approx(0.0, abs=1e-6)


def test_the_question_comes_first_in_qnli(tmp_path: Path) -> None:
    (tmp_path / "validation.json").write_text(json.dumps({"question": "w1", "sentence": "w2", "label": 1}) + "\n")
    assert load_task(make_dense(BERT), str(tmp_path)).texts() == [("w1", "w2")]


def test_other_bench_commands(dense: Path, data: Path) -> None:
    options = ("--model", dense, "--task", data, "--json")
    found = json.loads(tcsp("bench", "subspaces", *options, "--widths", "24,16"))
    assert len(found["rows"]) == 8 and 0.0 <= found["dense_accuracy"] <= 1.0
    found = json.loads(tcsp("bench", "budget", *options, "--remove", "0.2", "--max-kl", "100"))
    assert found["rows"][0]["removed"] >= 0.2 and found["rows"][0]["kl"] >= 0.0
    assert "KL to dense" in tcsp("bench", "subspaces", *options[:-1], "--widths", 24, "--quiet")
    tcsp("bench", "budget", *options, "--remove", "0.2", "--max-kl", "0", status=1)
    with pytest.raises(TCSPError, match="2 bars for 1"):
        tcsp("bench", "budget", *options, "--remove", "0.2", "--max-kl", "1,2")


def test_other_bench_commands_keep_finished_rows(dense: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be reached costs its row; what cannot be at all is refused before the statistics are collected."""
    options = ("--model", dense, "--task", data, "--json", "--sequences", 20)
    first, last = json.loads(tcsp("bench", "budget", *options, "--remove", "0.2,0.9999"))["rows"]
    assert first["kl"] >= 0.0 and last["asked"] == 0.9999 and "cannot be reached" in last["error"]
    shown = CliRunner().invoke(app, [str(word) for word in ("bench", "budget", *options, "--remove", "0.9999")])
    assert shown.exit_code == 0 and "100%: " in shown.stderr
    tcsp("bench", "budget", *options, "--remove", "0.9999", "--max-kl", "9", status=1)

    def fails(model: Any, stats: Any, **way: Any) -> Any:
        if way["hidden_size"] == 16:
            raise TCSPError("not so narrow")
        return compress(model, stats, **way)

    monkeypatch.setattr("tcsp_hf.cli.bench.subspaces.compress", fails)
    found = json.loads(tcsp("bench", "subspaces", *options, "--widths", "24,16"))["rows"]
    assert [row.get("error") for row in found] == [None] * 4 + ["not so narrow"] * 4
    table = tcsp("bench", "subspaces", *options[:4], *options[5:], "--widths", "16", "--quiet")
    assert "balanced" in table and " - " in table
    tcsp("bench", "subspaces", *options, "--widths", "16", "--max-kl", "9", status=1)

    def never(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr("tcsp_hf.evaluation.comparison.calibrate", never)
    for command, option, value, message in (
        ("budget", "--remove", "0.2,1.5", "remove is 1.5"),
        ("budget", "--axes", "hidden,width", "axes is"),
        ("subspaces", "--widths", "24,33", "hidden_size is 33"),
        ("subspaces", "--widths", "24.5", "whole numbers"),
        ("subspaces", "--widths", "inf", "whole numbers"),
    ):
        with pytest.raises(TCSPError, match=message):
            tcsp("bench", command, *options, option, value)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "row.json"
    write_whole(path, "one")
    assert path.read_text() == "one"

    def fails(*_arguments: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "two")
    assert [item.name for item in tmp_path.iterdir()] == ["row.json"]
    assert path.read_text() == "one"


def test_scores_read_compressed_encoders_in_the_dense_space(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model compressed to the full width has the dense model's embeddings."""
    task = Similarity("pairs", [("w1 w2", "w3"), ("w4", "w5 w6 w7")], [1.0, 0.0])
    whole = make_small(ENCODER, hidden_size=32)
    dense = make_dense(ENCODER, torch.float32)
    found = [task.outputs(model, tokenizer, False, "") for model in (dense, whole)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert task.mean_length(tokenizer) == 4


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny SQuAD and MRPC in the layout of TCSP_DATA_DIR."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [f"w{i}" for i in range(100)]
    for split, count in (("train", 60), ("validation", 12)):
        pairs, questions = [], []
        for i in range(count):
            chosen = words[i : i + 12]
            start = sum(len(word) + 1 for word in chosen[:5])
            answers = {"text": [chosen[5]], "answer_start": [start]}
            questions.append({"id": str(i), "context": " ".join(chosen), "question": words[i], "answers": answers})
            pairs.append({"sentence1": " ".join(chosen), "sentence2": words[i], "label": i % 2, "idx": i})
        for name, rows in (("squad", questions), ("glue/mrpc", pairs)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(str(folder / name / f"{split}.parquet"))
    return folder


@pytest.mark.parametrize(
    ("name", "task", "score"),
    [
        ("bert-ForQuestionAnswering", "squad", "F1"),
        ("t5-ForConditionalGeneration", "mrpc", "accuracy"),
        ("t5-ForConditionalGeneration", "squad", "F1"),
    ],
)
def test_spans_and_written_answers(
    name: str, task: str, score: str, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(tasks))
    folder = tmp_path / "dense"
    make_dense(find(name), torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    more = ("--remove", "0.3", "--methods", "ours,magnitude", "--eval-samples", 10, "--json")
    found = json.loads(bench(folder, Path(task), tmp_path / "table", *more))
    assert (found["dense"]["score_name"], found["dense"]["items"]) == (score, 10)
    model = make_dense(find(name), torch.float32)
    chosen = load_task(model, task, items=10)
    outputs = chosen.outputs(model, make_tokenizer(), False, "")
    dense = chosen.score(outputs, outputs)
    assert (dense.distance, dense.agreement) == (0.0, 1.0)
    assert dense.score == pytest.approx(found["dense"]["score"])
    for row in found["rows"]:
        assert "error" not in row
        assert 0.0 <= row["score"] <= 1.0 and row["distance"] > 0.0 and 0.0 <= row["agreement"] <= 1.0
    written = None if name.startswith("bert") else 3  # the answer's word between two special tokens
    assert found["dense"]["target_length"] == chosen.target_length(make_tokenizer()) == written
    assert found["dense"]["flops"] == count_flops(model, found["dense"]["mean_length"], written)
    assert ("3 of the target" in (tmp_path / "table" / "table.md").read_text()) == (written is not None)


def test_texts_to_write_answers_for_have_the_tasks_columns(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(tasks))
    make_dense(find("t5-ForConditionalGeneration"), torch.float32).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    told = (tmp_path / "dense", Path("mrpc"), tmp_path / "table", "--remove", "0.3", "--methods", "magnitude")
    with pytest.raises(TCSPError, match=r"data 'squad' lacks the column 'sentence1' of the task 'mrpc'.*has: id, "):
        bench(*told, "--calibration", "squad")
    assert not (tmp_path / "table").exists()
    bench(*told, "--calibration", "squad-sample", "--sequences", 5, "--eval-samples", 4)


def test_summary(dense: Path, data: Path, tmp_path: Path) -> None:
    more = ("--remove", "0.44,0.6", "--methods", "ours,magnitude", "--json")
    table = json.loads(bench(dense, data, tmp_path / "one", *more))
    other = json.loads((tmp_path / "one" / "results.json").read_text())
    other |= {"model_fingerprint": "other", "task": "better"}
    for row in other["rows"]:
        row["score"] = other["dense"]["score"] + 0.02
    (tmp_path / "two").mkdir()
    write_whole(tmp_path / "two" / "results.json", json.dumps(other))
    found = json.loads(tcsp("bench", "summary", tmp_path / "one", tmp_path / "two", "--json"))
    ours = [row for row in table["rows"] if row["method"] == "ours"]
    drops = [100 * (table["dense"]["score"] - row["score"]) for row in ours]
    assert [row["drop"] for row in found["rows"]] == pytest.approx([*drops, -2.0, -2.0])
    assert list(found["mean_drops"].values()) == pytest.approx([(drop - 2.0) / 2 for drop in drops])
    assert [row["best_other"] for row in found["rows"][:2]] == [
        row["score"] for row in table["rows"] if row["method"] == "magnitude"
    ]
    tcsp("bench", "summary", tmp_path / "two", "--check")
    other["rows"][0]["score"] = other["dense"]["score"] - 0.02
    write_whole(tmp_path / "two" / "results.json", json.dumps(other))
    tcsp("bench", "summary", tmp_path / "two", "--check", status=1)
    missed = json.loads(tcsp("bench", "summary", tmp_path / "two", "--json"))["missed"]
    assert len(missed) == 2 and "mean drop at 44%" in missed[0] and "better drops by 2.00" in missed[1]
    other["rows"][0]["score"] = other["dense"]["score"]
    other["rows"].append({**other["rows"][1], "method": "fisher", "score": None, "distance": None})
    write_whole(tmp_path / "two" / "results.json", json.dumps(other))
    again = json.loads(tcsp("bench", "summary", tmp_path / "two", "--json"))["rows"]
    assert [row["best_other"] for row in again] == [row["best_other"] for row in found["rows"][2:]]
    with pytest.raises(TCSPError, match=f"same model on '{data}'"):
        tcsp("bench", "summary", tmp_path / "one", tmp_path / "one")
    write_whole(tmp_path / "two" / "results.json", json.dumps({**table, "task": "another of one model"}))
    both = json.loads(tcsp("bench", "summary", tmp_path / "one", tmp_path / "two", "--json"))
    assert {row["task"] for row in both["rows"]} == {str(data), "another of one model"}
    with pytest.raises(TCSPError, match="no finished table"):
        tcsp("bench", "summary", tmp_path)


def test_a_task_with_splits_of_its_own_names(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNLI has no split "validation"."""
    folder = tmp_path / "data" / "glue" / "mnli"
    folder.mkdir(parents=True)
    lines = [json.dumps({"premise": f"w{i} w{i % 7}", "hypothesis": f"w{i % 9}", "label": i % 3}) for i in range(40)]
    for split in ("train", "validation_matched", "validation_mismatched"):
        (folder / f"{split}.json").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path / "data"))
    arguments = ("--model", dense, "--task", "mnli", "--remove", 0.3, "--methods", "magnitude", "--latency", "1x8")
    found = json.loads(tcsp("bench", "quality", *arguments, "-o", tmp_path / "out", "--json"))
    assert found["split"] == "validation_matched" and len(found["rows"]) == 1
