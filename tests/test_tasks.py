"""Tasks: metrics against scikit-learn, scipy and slow definitions, windows and answers of SQuAD, and the commands."""

import itertools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import find, make_dense, make_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from processes import command_on_two_ranks
from scipy import stats
from sklearn import metrics as sk
from test_cli import tcsp
from transformers import AutoModel, AutoModelForSequenceClassification

from tcsp_hf import TCSPError
from tcsp_hf.publish import CardResults
from tcsp_hf.tasks import TASKS, GlueMetric, SquadMetric, find_task, score
from tcsp_hf.tasks.metrics import FORMULAS
from tcsp_hf.tasks.squad import Window, answer_positions, best_answer, encode_windows
from tcsp_hf.tasks.squad_metric import normalise, overlap, score_v1, score_v2
from tcsp_hf.tasks.table import form_of
from tcsp_hf.tasks.text_to_text import read_label, source_text, target_text
from tcsp_hf.train.distillation import Distiller

BERT = find("bert-ForSequenceClassification")
QA = find("bert-ForQuestionAnswering")
T5 = find("t5-ForConditionalGeneration")
PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=40)
NUMBERS = st.lists(
    st.tuples(st.integers(-20, 20).map(lambda x: x / 4), st.integers(0, 25).map(lambda x: x / 5)),
    min_size=3,
    max_size=40,
)


# Metrics ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@given(PAIRS)
def test_classification_metrics_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    assert FORMULAS["accuracy"](ours, theirs) == pytest.approx(sk.accuracy_score(theirs, ours))
    two, too = np.minimum(ours, 1), np.minimum(theirs, 1)
    assert FORMULAS["f1"](two, too) == pytest.approx(sk.f1_score(too, two, zero_division=0))
    assert FORMULAS["matthews_correlation"](ours, theirs) == pytest.approx(
        sk.matthews_corrcoef(theirs, ours), abs=1e-12
    )


@given(NUMBERS)
def test_correlations_equal_scipy(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        assert FORMULAS["pearson"](ours, theirs) == FORMULAS["spearmanr"](ours, theirs) == 0.0
        return
    assert FORMULAS["pearson"](ours, theirs) == pytest.approx(stats.pearsonr(ours, theirs)[0], abs=1e-9)
    assert FORMULAS["spearmanr"](ours, theirs) == pytest.approx(stats.spearmanr(ours, theirs)[0], abs=1e-9)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.is_qa])
def test_glue_metric_is_an_evaluate_metric(name: str) -> None:
    metric = GlueMetric(name)
    metric.add_batch(predictions=[0, 1, 1, 0], references=[0, 1, 0, 1])
    found = metric.compute()
    assert tuple(found) == TASKS[name].metrics
    with pytest.raises(TCSPError, match="no task 'glue'"):
        GlueMetric("glue")


WORDS = st.lists(st.sampled_from(["the", "A", "cat", "Cat's", "sat", "an", "42", "mat.", "é", "-"]), max_size=6).map(
    " ".join
)


def slow_normalise(text: str) -> str:
    """Word by word: the same definition, written differently."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(word for word in letters.split() if word not in ("a", "an", "the"))


@given(WORDS, WORDS)
def test_squad_definitions(one: str, other: str) -> None:
    assert normalise(one) == slow_normalise(one)
    ours, theirs = slow_normalise(one).split(), slow_normalise(other).split()
    left, shared = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            shared += 1
    expected = 0.0
    if shared:
        precision, recall = shared / len(ours), shared / len(theirs)
        expected = 2 * precision * recall / (precision + recall)
    assert overlap(one, other) == pytest.approx(expected)


def test_squad_scores() -> None:
    answers = {"a": ["the Cat", "dog"], "b": ["blue whale"], "c": ["x"]}
    found = score_v1({"a": "Cat.", "b": "a whale"}, answers)
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    golds = {"a": ["cat"], "b": [], "c": ["the"]}  # normalised, the last has no answer either
    predictions = {"a": "", "b": "", "c": "dog"}
    found = score_v2(predictions, golds, {"a": 0.1, "b": 0.9, "c": 0.2})
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["HasAns_exact_match"] == 0.0
    assert found["NoAns_exact_match"] == 50.0
    assert found["best_exact_match"] == pytest.approx(200 / 3)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "cat", "dog"]), st.sampled_from([[], ["cat"], ["dog"]]), st.integers(0, 9)),
        min_size=1,
        max_size=8,
    )
)
def test_best_threshold_is_the_best_of_all(items: list[tuple[str, list[str], int]]) -> None:
    predictions = {str(i): item[0] for i, item in enumerate(items)}
    golds = {str(i): item[1] for i, item in enumerate(items)}
    chances = {str(i): item[2] / 10 for i, item in enumerate(items)}

    def at(threshold: float) -> float:
        kept = {key: text if chances[key] <= threshold else "" for key, text in predictions.items()}
        return score_v2(kept, golds)["exact_match"]

    best = max(at(threshold) for threshold in (-1.0, *chances.values()))
    assert score_v2(predictions, golds, chances)["best_exact_match"] == pytest.approx(best)


def test_squad_metric_takes_the_hubs_format() -> None:
    reference = {"id": "1", "answers": {"text": ["cat"], "answer_start": [3]}}
    metric = SquadMetric()
    assert metric.compute(predictions=[{"id": "1", "prediction_text": "a cat"}], references=[reference]) == {
        "f1": 100.0,
        "exact_match": 100.0,
    }
    prediction = {"id": "1", "prediction_text": "", "no_answer_probability": 1.0}
    found = SquadMetric("squad_v2").compute(predictions=[prediction], references=[reference])
    assert found["exact_match"] == 0.0
    with pytest.raises(TCSPError, match="squad_v3"):
        SquadMetric("squad_v3")


# SQuAD's windows ----------------------------------------------------------------------------------------------------


def test_windows_find_every_answer() -> None:
    """A span that is inside a window is found again from the positions, through its characters."""
    tokenizer = make_tokenizer()
    words = [f"w{i % 100}" for i in range(90)]
    context = " ".join(words)
    starts = [0, *itertools.accumulate(len(word) + 1 for word in words)]
    for index in (0, 10, 40, 87):
        text = " ".join(words[index : index + 3])
        answer = {"text": [text], "answer_start": [starts[index]]}
        encoded = encode_windows(tokenizer, ["w1 w2"], [context], 40)
        assert len(encoded["input_ids"]) > 1
        assert max(map(len, encoded["input_ids"])) <= 40
        found = 0
        for window in range(len(encoded["input_ids"])):
            first, last = answer_positions(encoded, window, answer)
            if (first, last) != (0, 0):
                offsets = encoded["offset_mapping"][window]
                assert context[offsets[first][0] : offsets[last][1]] == text
                found += 1
        assert found >= 1
    assert answer_positions(encoded, 0, {"text": [], "answer_start": []}) == (0, 0)
    with pytest.raises(TCSPError, match="no room"):
        encode_windows(tokenizer, ["w1 w2"], [context], 8)


def test_best_answer() -> None:
    context = "one two three four"
    offsets = [None, (0, 3), (4, 7), (8, 13), (14, 18)]

    def window(start: list[float], end: list[float]) -> Window:
        return Window(np.array(start), np.array(end), offsets)

    assert best_answer(context, [window([0, 0, 9, 0, 0], [0, 0, 0, 9, 0])], False).text == "two three"
    # an end before the start is no span
    assert best_answer(context, [window([0, 0, 0, 0, 9], [0, 9, 0, 0, 1])], False).text == "four"
    # the null answer is the lowest of all windows, and counts only where there may be none
    sure, unsure = window([9, 0, 5, 0, 0], [9, 0, 5, 0, 0]), window([-5, 0, 0, 0, 0], [-5, 0, 0, 0, 0])
    assert best_answer(context, [sure], True).text == ""
    assert best_answer(context, [sure], False).text == "two"
    assert best_answer(context, [sure, unsure], True).text == "two"
    assert 0.9 < best_answer(context, [sure], True).no_answer_probability <= 1.0


# Text to text -------------------------------------------------------------------------------------------------------


def test_text_forms() -> None:
    mrpc, stsb = find_task("mrpc"), find_task("stsb")
    row = {"sentence1": "a", "sentence2": "b", "label": 1}
    assert source_text(mrpc, row) == "mrpc sentence1: a sentence2: b"
    assert target_text(mrpc, row) == "equivalent"
    assert target_text(stsb, {**row, "label": 3.49}) == "3.4"
    assert source_text(find_task("mnli"), {"premise": "p", "hypothesis": "h"}) == "mnli hypothesis: h premise: p"
    assert read_label(mrpc, " equivalent", 0) == 1
    assert read_label(mrpc, "nonsense", 1) == 0
    assert read_label(stsb, "9.0", 0) == 5.0
    assert read_label(stsb, "x", 0) == 0.0
    for task in TASKS.values():
        for label in range(len(task.labels)):
            assert read_label(task, target_text(task, {"label": label}), 0) == label


def test_form_of_refuses_other_heads() -> None:
    assert form_of(make_dense(T5, torch.float32), find_task("squad")) == "text"
    with pytest.raises(TCSPError, match="cannot answer 'squad'"):
        form_of(make_dense(BERT, torch.float32), find_task("squad"))
    with pytest.raises(TCSPError, match="3 outputs, but 'mrpc' needs 2"):
        form_of(make_dense(BERT, torch.float32), find_task("mrpc"))


# Commands -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny splits of MRPC, STS-B and SQuAD v2 in the layout of TCSP_DATA_DIR."""
    folder = tmp_path_factory.mktemp("data")
    words = [f"w{i}" for i in range(100)]

    def save(name: str, split: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(str(folder / name / f"{split}.parquet"))

    for split, count in (("train", 64), ("validation", 20)):
        pairs = [
            {"sentence1": " ".join(words[i : i + 4]), "sentence2": words[i % 9], "label": i % 2, "idx": i}
            for i in range(count)
        ]
        save("glue/mrpc", split, pairs)
        save("glue/stsb", split, [{**pair, "label": float(pair["label"] * 5)} for pair in pairs])
        questions = []
        for i in range(count):
            chosen = words[i : i + 12]
            starts = [0, *itertools.accumulate(len(word) + 1 for word in chosen)]
            answers: dict[str, list[Any]] = {"text": [chosen[5]], "answer_start": [starts[5]]}
            if i % 4 == 3:
                answers = {"text": [], "answer_start": []}
            questions.append({"id": str(i), "context": " ".join(chosen), "question": words[i], "answers": answers})
        save("squad_v2", split, questions)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_dense(find("bert-Model"), torch.float32, 0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["mrpc", "stsb", "squad_v2"])
def test_finetune_train_evaluate(
    task: str, data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    common = ("--task", task, "--json", "--max-length", 30)
    dense, small = tmp_path / "dense", tmp_path / "small"
    made = json.loads(tcsp("finetune", "--model", base, "-o", dense, "--epochs", 2, "--train-samples", 40, *common))
    assert made["train_rows"] == 40
    assert json.loads((dense / "results.json").read_text())["scores"] == made["scores"]
    again = json.loads(tcsp("evaluate", dense, *common))
    assert again["scores"] == pytest.approx(made["scores"])
    arguments = ("train", "--model", dense, "-o", small, "--hidden-size", 16, "--epochs", 1, *common)
    found = json.loads(tcsp(*arguments, "--checkpoints", tmp_path / "run"))
    assert found["scores"]["dense"] == pytest.approx(made["scores"])
    card = (small / "README.md").read_text()
    assert "tcsp train --model dense" in card and f"- name: {small.name}" in card
    assert all(f"type: {name}" in card for name in TASKS[task].metrics)
    again = json.loads(tcsp("evaluate", small, *common))
    assert again["scores"] == pytest.approx(found["scores"]["compressed"])
    assert set(TASKS[task].metrics) <= set(again["scores"])
    shown = tmp_path / "scores.json"
    tcsp("evaluate", small, *common, "--card-results", shown)
    assert {entry.metric: entry.value for entry in CardResults.load(shown).evaluations} == again["scores"]
    with pytest.raises(TCSPError, match="is for a task's own data"):
        tcsp("evaluate", small, *common, "--card-results", tmp_path / "other.json", "--data", tmp_path)
    # a run whose checkpoints are there goes on from them: nothing is left to train
    resumed = json.loads(tcsp(*arguments, "--checkpoints", tmp_path / "run", "--overwrite"))
    assert resumed["scores"] == found["scores"]
    for option, value, match in (
        ("--lr", 1e-3, "learning_rate=5e-05"),
        ("--train-samples", 24, "rows="),
        ("-o", tmp_path / "run", "name"),
    ):
        told = [*arguments, "--overwrite", "--checkpoints", tmp_path / "run", option, value]
        with pytest.raises(TCSPError, match=match):
            tcsp(*told)
    assert (small / "model.safetensors").is_file()
    further = ("train", "--model", dense, "--task", task, "--max-length", 30, "--epochs", 1, "--json", "--student")
    found = json.loads(tcsp(*further, small, "-o", tmp_path / "further"))
    assert found["removed"] == pytest.approx(json.loads((small / "results.json").read_text())["removed"])
    assert json.loads((tmp_path / "further" / "config.json").read_text())["hidden_size"] == 16
    with pytest.raises(TCSPError, match="which is not compressed"):
        tcsp(*further, dense, "-o", tmp_path / "none")
    wordier = AutoModel.from_pretrained(small)
    wordier.resize_token_embeddings(wordier.config.vocab_size + 8)
    wordier.save_pretrained(tmp_path / "wordier")
    with pytest.raises(TCSPError, match="comes from a model of another size"):
        tcsp(*further, tmp_path / "wordier", "-o", tmp_path / "none")
    # a model that learns from itself alone, and drops nothing, has nothing to learn; a smaller one has
    taught = ("finetune", "--teacher", dense, "--distillation", 1.0, "--epochs", 1, "--lr", 1e-7, *common)
    losses = [
        json.loads(tcsp(*taught, "--model", model, "-o", tmp_path / f"taught-{model.name}"))["train_loss"]
        for model in (dense, small)
    ]
    assert losses[0] < 1e-6 and losses[0] < losses[1]
    with pytest.raises(TCSPError, match="distillation is 0"):
        tcsp(*taught, "--model", small, "-o", tmp_path / "none", "--distillation", 0)
    other = AutoModelForSequenceClassification.from_pretrained(base, num_labels=7)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(TCSPError, match=r"7 outputs|cannot answer"):
        tcsp(*taught, "--teacher", tmp_path / "other", "--model", small, "-o", tmp_path / "none")


def test_a_regression_model_learns_classes(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    common = ("--epochs", 1, "--train-samples", 24, "--eval-samples", 12, "--json")
    tcsp("finetune", "--model", base, "--task", "stsb", "-o", tmp_path / "sts", *common)
    found = json.loads(
        tcsp("finetune", "--model", tmp_path / "sts", "--task", "mrpc", "-o", tmp_path / "mrpc", *common)
    )
    assert 0.0 <= found["scores"]["accuracy"] <= 1.0
    # a folder that is called like the task is no data of it
    monkeypatch.chdir(tmp_path)
    assert (
        json.loads(tcsp("evaluate", "mrpc", "--task", "mrpc", "--samples", 12, "--json"))["scores"] == found["scores"]
    )
    tcsp("train", "--model", "mrpc", "--task", "mrpc", "-o", "small", "--hidden-size", 16, *common)
    assert "nyu-mll/glue mrpc, first 12 rows" in (tmp_path / "small" / "README.md").read_text()


def test_hidden_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "glue" / "stsb"
    folder.mkdir(parents=True)
    (folder / "test.json").write_text('{"sentence1": "a", "sentence2": "b", "label": -1.0}\n' * 2)
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path))
    with pytest.raises(TCSPError, match="hidden"):
        TASKS["stsb"].load("test")


@pytest.mark.slow
def test_commands_on_two_processes(data: Path, base: Path, tmp_path: Path) -> None:
    """All train, each on its share; the first one writes and prints, once."""
    dense, small = tmp_path / "dense", tmp_path / "small"
    common = ("--task", "mrpc", "--json", "--max-length", "30", "--epochs", "1")
    for told in (
        ("finetune", "--model", str(base), "-o", str(dense), *common),
        ("train", "--model", str(dense), "-o", str(small), "--hidden-size", "16", *common),
    ):
        done = command_on_two_ranks("tcsp_hf", *told, TCSP_DATA_DIR=str(data))
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["steps"] == 1, "64 rows, 32 for each process"
    assert AutoModel.from_pretrained(small).config.hidden_size == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]


def test_finetune_from_a_configuration(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    folder, out = tmp_path / "configuration", tmp_path / "dense"
    make_dense(T5, torch.float32).config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    arguments = ("finetune", "--model", folder, "--task", "mrpc", "-o", out, "--epochs", 1, "--quiet")
    with pytest.raises(TCSPError, match="cannot be loaded"):
        tcsp(*arguments)
    tcsp(*arguments, "--random-weights")
    assert json.loads((out / "results.json").read_text())["random_weights"] is True


def test_train_a_pretrained_model(data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no head yet: it is cut by its hidden states, and learns from the labels alone."""
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    small = tmp_path / "small"
    common = ("--task", "mrpc", "--max-length", 30, "--json")
    found = json.loads(tcsp("train", "--model", base, "--remove", 0.3, "--epochs", 2, "-o", small, *common))
    assert found["removed"] >= 0.3 and found["distillation"] == 0.0
    assert set(found["scores"]) == {"compressed"}, "an untrained head has no score worth telling"
    assert json.loads((small / "results.json").read_text())["scores"] == found["scores"]
    assert json.loads(tcsp("evaluate", small, *common))["scores"] == pytest.approx(found["scores"]["compressed"])


def test_train_on_unlabelled_text(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_text("\n".join(f"w{i} w{i + 1} w{i % 5}" for i in range(60)))
    small = tmp_path / "small"
    told = ("train", "--model", base, "--data", text, "--hidden-size", 16, "--epochs", 1, "-o", small, "--quiet")
    assert "60 training rows, 2 steps, " in tcsp(*told), "in one line, though there is no score to tell"
    assert AutoModel.from_pretrained(small).config.hidden_size == 16


def test_text_model_scores(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    model = make_dense(T5, torch.float32)
    for name in ("mrpc", "squad_v2"):
        task = find_task(name)
        found = score(model, make_tokenizer(), task, task.load())
        assert set(task.metrics) <= set(found)


def test_a_decoder_deeper_than_its_encoder_writes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    task, model = find_task("mrpc"), make_dense(T5, torch.float32, num_layers=1, num_decoder_layers=2)
    assert set(score(model, make_tokenizer(), task, task.load())) == set(task.metrics)
    taught = Distiller(model, None, 1.0, 0.0, "mean", ("labels",))
    inputs = {"input_ids": torch.tensor([[5, 6, 1]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert taught.complete(inputs, 4)["labels"].shape[1] <= 4


def test_bench_paper(data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    rows, results = tmp_path / "rows", tmp_path / "results"
    tcsp("bench", "paper", rows, "-o", results, "--models", base, "--tasks", "mrpc", "--remove", "0.2", "--no-run")
    paths = sorted(rows.glob("*.toml"))
    assert len(paths) == 3
    for path in paths:
        path.write_text(path.read_text() + "dense_epochs = 1\nmax_length = 30\n")
    found = json.loads(tcsp("bench", "paper", rows, "-o", results, "--json"))
    assert {entry["row"]["mode"] for entry in found} == {"retraining-free", "fine-tuned", "distilled"}
    assert all(entry["removed"] >= 0.2 and 0 <= entry["scores"]["accuracy"] <= 1 for entry in found)
    assert len({json.dumps(entry["dense"]) for entry in found}) == 1  # one dense model for all
    assert [entry["steps"] for entry in found] == [2, 2, 0]  # distilled, fine-tuned, retraining-free
    written = {path: path.stat().st_mtime_ns for path in results.glob("*-*.json")}
    (results / f"{paths[0].stem}.json").unlink()
    older = results / f"{paths[1].stem}.json"  # of a version that did not have this field
    result = json.loads(older.read_text())
    assert result["row"].pop("temperature") == 2.0
    older.write_text(json.dumps(result))
    written[older] = older.stat().st_mtime_ns
    again = json.loads(tcsp("bench", "paper", rows, "-o", results, "--json"))
    assert [entry["scores"] for entry in again] == [entry["scores"] for entry in found]
    kept = [path for path, stamp in written.items() if path.stat().st_mtime_ns == stamp]
    assert len(kept) == 2
    assert "CoFi" in (results / "README.md").read_text()
    assert all(entry["dense_steps"] == 2 and entry["dense_seconds"] > 0 for entry in found)
    for entry in found:
        trained = entry["steps"] > 0
        assert (entry["training_seconds"] is not None) == (entry["training_processor_seconds"] is not None) == trained
        if trained:  # one thread
            assert 0 < entry["training_processor_seconds"] < entry["processor_seconds"] < 1.5 * entry["seconds"] + 1
            assert 0 < entry["dense_processor_seconds"] < 1.5 * entry["dense_seconds"] + 1
    grid = ("--models", base, "--tasks", "mrpc", "--remove", "0.2", "--modes", "from-pretrained", "--no-run")
    tcsp("bench", "paper", rows, "-o", results, *grid)
    (fourth,) = rows.glob("*-from-pretrained.toml")
    fourth.write_text(fourth.read_text() + "dense_epochs = 1\nmax_length = 30\n")
    (entry,) = [e for e in json.loads(tcsp("bench", "paper", rows, "-o", results, "--json")) if e not in again]
    assert entry["row"]["mode"] == "from-pretrained" and entry["steps"] == 2 and entry["removed"] >= 0.2
    assert entry["dense"] == again[0]["dense"] and entry["seconds"] > entry["training_seconds"]
    # elsewhere: nothing is run again but the row that asks for something else
    paths[2].write_text(paths[2].read_text().replace("0.2", "0.25"))
    elsewhere = tmp_path / "elsewhere"
    arguments = ("bench", "paper", rows, "-o", elsewhere, "--known", results / "results.json", "--json")
    more = {entry["row"]["mode"]: entry for entry in json.loads(tcsp(*arguments))}
    assert more["retraining-free"]["removed"] >= 0.25
    assert not list((elsewhere / "work").iterdir()), "checkpoints go when the result is there"
    assert [more[entry["row"]["mode"]] for entry in again[:2]] == again[:2]
    with pytest.raises(TCSPError, match=r"no results\.json"):
        tcsp(*arguments[:-2], paths[0])
    paths[0].write_text(paths[0].read_text().replace("0.2", "0.3"))
    with pytest.raises(TCSPError, match="other settings"):
        tcsp("bench", "paper", rows, "-o", results)
    settled = fourth.read_text()
    fourth.write_text(settled + "ready = true\n")
    with pytest.raises(TCSPError, match="from-pretrained', but ready"):
        tcsp("bench", "paper", rows, "-o", results)
    fourth.write_text(settled)
    for line, match in (
        ("mode = 'x'", "Cannot overwrite"),
        ("fraction = 1", "unknown field 'fraction'"),
        ("distillation = 2", r"\.toml: distillation is 2"),
        ("temperature = 'hot'", "temperature is 'hot'"),
        ("hidden_weight = -1", "hidden_weight is -1"),
        ("dropout = 'no'", "dropout is 'no'"),
    ):
        paths[0].write_text(paths[0].read_text() + line + "\n")
        with pytest.raises(TCSPError, match=match):
            tcsp("bench", "paper", rows, "-o", results)
        paths[0].write_text(paths[0].read_text().replace(line + "\n", ""))


def test_commands_refuse(data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(data))
    out, encoder = tmp_path / "out", tmp_path / "encoder"
    make_dense(find("t5-EncoderModel"), torch.float32).save_pretrained(encoder)
    make_tokenizer().save_pretrained(encoder)
    for words, match in (
        (("finetune", "--model", base, "--task", "mrcp", "-o", out), "no task 'mrcp'"),
        (("finetune", "--model", base, "--task", "mrpc", "-o", out, "--epochs", 0), "epochs is 0"),
        (("finetune", "--model", base, "--task", "mrpc", "-o", out, "--train-split", "dev"), "no split 'dev'"),
        (("finetune", "--model", base, "--task", "mrpc", "-o", out, "--data", data / "squad_v2"), "lacks the column"),
        (("finetune", "--model", base, "--task", "mrpc", "-o", out, "--form", "text"), "no encoder-decoder"),
        (("finetune", "--model", base, "--task", "mrpc", "-o", out, "--teacher", base), "cannot answer 'mrpc'"),
        (("finetune", "--model", base, "--task", "mrpc", "-o", base), "not empty"),
        (("train", "--model", base, "--task", "mrpc", "-o", out), "--remove, --hidden-size and --student"),
        (("train", "--model", base, "-o", out, "--remove", 0.4), "--task, or --data"),
        (("train", "--model", encoder, "--task", "mrpc", "-o", out, "--remove", 0.4), "cannot answer 'mrpc'"),
        (("evaluate", base, "--task", "mrpc"), "cannot answer 'mrpc'"),
    ):
        with pytest.raises(TCSPError, match=match):
            tcsp(*words)
        assert not out.exists()
