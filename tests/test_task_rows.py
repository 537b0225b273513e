"""Own data of a task: what is mapped, what is refused before any work; and inputs of every length and side."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import find, make_dense, make_tokenizer
from datasets import ClassLabel, Dataset, Features, Value
from test_cli import tcsp
from transformers import ByT5Tokenizer

from tcsp_hf import TCSPError
from tcsp_hf.cli.common import print_json
from tcsp_hf.data import sources
from tcsp_hf.evaluation.embeddings import embed
from tcsp_hf.evaluation.load_task import load_task
from tcsp_hf.tasks import TASKS, find_task, score
from tcsp_hf.tasks.features import make_collator, make_features
from tcsp_hf.tasks.inputs import right_padding
from tcsp_hf.tasks.predict import predict
from tcsp_hf.tasks.score import span_windows
from tcsp_hf.tasks.table import form_of
from tcsp_hf.tasks.text_to_text import max_target_tokens, read_label
from tcsp_hf.train.distil import text_features
from tcsp_hf.train.finetune import Schedule, finetune

BERT, QA = find("bert-ForSequenceClassification"), find("bert-ForQuestionAnswering")
SST2, STSB, SQUAD = find_task("sst2"), find_task("stsb"), find_task("squad")
Rows = list[dict[str, Any]]
Maker = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Maker:
    """Writes rows as a folder of one split, and names it."""

    def make(rows: Rows, split: str = "validation", features: Features | None = None) -> str:
        Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
        return str(tmp_path)

    return make


def sentences(labels: list[Any]) -> Rows:
    return [{"sentence": f"w{i} w1 w2", "label": label} for i, label in enumerate(labels)]


def pairs(labels: list[Any]) -> Rows:
    return [{"sentence1": f"w{i} w1", "sentence2": "w3", "label": label} for i, label in enumerate(labels)]


def questions(count: int = 4) -> Rows:
    found = []
    for i in range(count):
        words = [f"w{j}" for j in range(i, 2 * i + 6)]
        answers = {"text": [words[4]], "answer_start": [sum(len(word) + 1 for word in words[:4])]}
        found.append({"id": f"q{i}", "question": words[0], "context": " ".join(words), "answers": answers})
    return found


# Labels ---------------------------------------------------------------------------------------------------------------


def classifier(names: list[str]) -> Any:
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return make_dense(BERT, torch.float32, num_labels=len(names), **fields)


def test_outputs_in_another_order_are_refused() -> None:
    for name, outputs in (("sst2", ["POSITIVE", "NEGATIVE"]), ("mnli", ["contradiction", "entailment", "neutral"])):
        with pytest.raises(TCSPError, match=f"{outputs[0]}, {outputs[1]}.*another order than '{name}'.*last layer"):
            form_of(classifier(outputs), find_task(name))
    for name, outputs in (
        ("sst2", ["Negative", "Positive"]),
        ("sst2", ["LABEL_0", "LABEL_1"]),
        ("sst2", ["bad", "good"]),
        ("rte", ["Entailment", "Not-Entailment"]),
    ):
        assert form_of(classifier(outputs), find_task(name)) == "classification"


def test_labels_of_a_dataset_are_mapped_by_their_names(folder: Maker) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["Positive", "Negative"])})
    named = folder(sentences([0, 1, 1, 0]), features=features)
    assert list(SST2.load(source=named)["label"]) == [1, 0, 0, 1]
    swapped = load_task(classifier(["positive", "negative"]), named)  # the model's own order
    assert swapped.labels.tolist() == [0, 1, 1, 0]
    assert load_task(classifier(["negative", "positive"]), named).labels.tolist() == [1, 0, 0, 1]
    assert list(SST2.load(source=folder(sentences(["positive", "Negative"])))["label"]) == [1, 0]
    other = Features({"sentence": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    assert list(SST2.load(source=folder(sentences([0, 1]), features=other))["label"]) == [0, 1]


def test_numbers_without_names_count_a_known_tasks_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLUE's rows in a file that names no labels, for a model with its outputs in another order."""
    folder = tmp_path / "glue" / "sst2"
    folder.mkdir(parents=True)
    Dataset.from_list(sentences([0, 1, 1, 0])).to_csv(str(folder / "validation.csv"))
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path))
    assert load_task(classifier(["Positive", "Negative"]), "sst2").labels.tolist() == [1, 0, 0, 1]
    for names in (["negative", "positive"], ["LABEL_0", "LABEL_1"], ["bad", "good"]):
        assert load_task(classifier(names), "sst2").labels.tolist() == [0, 1, 1, 0]
    swapped = load_task(classifier(["positive", "negative"]), str(folder))  # data of no known task: the model's numbers
    assert swapped.labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("labels", [[0.0, 1.0, 1.0], [False, True, True]])
def test_whole_numbers_of_other_types_are_labels(labels: list[Any], folder: Maker) -> None:
    data = SST2.load(source=folder(sentences(labels)))
    assert data["label"][:] == [0, 1, 1] and all(type(label) is int for label in data["label"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1], "'label' .*holds nothing in row 1"),
        ([0, 1, 2], r"label 2 in row 2 .*the numbers 0 to 1 \(negative, positive\)"),
        ([0, 1, -1], "label -1 in row 2"),
        ([-1, -1, -1], "hidden: take validation"),
        ([0.0, 0.5, 1.0], "label 0.5 in row 1"),
        (["good", "bad", "positive"], r"are 'good', 'bad', 'positive'; they must be the numbers 0 to 1 \(negative"),
        ([[0], [1], [1]], "are list"),
    ],
)
def test_labels_that_are_none_are_refused(labels: list[Any], message: str, folder: Maker) -> None:
    named = folder(sentences(labels))
    with pytest.raises(TCSPError, match=message):
        SST2.load(source=named)
    with pytest.raises(TCSPError, match=message.replace("hidden: take validation", "no labels to score on")):
        load_task(classifier(["negative", "positive"]), named)


@pytest.mark.parametrize("label", [float("nan"), 20.0, -0.5, None, float("inf")])
def test_scores_are_finite_and_in_range(label: Any, folder: Maker) -> None:
    with pytest.raises(TCSPError, match=r"in row 1 "):
        STSB.load(source=folder(pairs([0.5, label])))


def test_scores_may_be_whole(folder: Maker) -> None:
    data = STSB.load(source=folder(pairs([0, 3, 5])))
    assert data["label"][:] == [0.0, 3.0, 5.0] and data.features["label"].dtype == "float32"


# Texts ----------------------------------------------------------------------------------------------------------------


def test_texts_are_strings_in_every_row(folder: Maker) -> None:
    rows = pairs([0.0, 1.0, 2.0])
    rows[1]["sentence2"] = None
    named = folder(rows)
    for load in (lambda: STSB.load(source=named), lambda: load_task(make_dense(find("bert-Model")), named)):
        with pytest.raises(TCSPError, match=r"'sentence2' .*holds nothing in row 1"):
            load()
    with pytest.raises(TCSPError, match=r"'sentence2' .*holds nothing in row 1"):
        text_features(Dataset.from_list(rows), make_tokenizer(), None)
    with pytest.raises(TCSPError, match=r"'sentence' .*int64, not text"):
        SST2.load(source=folder([{"sentence": 7, "label": 1}]))


def test_a_pair_without_its_second_text_takes_nothing_from_the_others() -> None:
    model, tokenizer = make_dense(BERT, torch.float32), make_tokenizer()
    texts: list[Any] = [("w1 w2", "w3"), ("w4", None)]
    for wrong in (texts, texts[::-1], ["w1", ("w2", "w3")], [None]):
        with pytest.raises(TCSPError, match="all must be strings, or all pairs"):
            predict(model, tokenizer, wrong)
    found = predict(model, tokenizer, [("w1 w2", "w3"), ("w4", "w5")], batch_size=1)
    assert not torch.allclose(found, predict(model, tokenizer, ["w1 w2", "w4"], batch_size=1))


# Questions and answers ------------------------------------------------------------------------------------------------


def test_ids_of_questions(folder: Maker) -> None:
    plain = [{name: value for name, value in row.items() if name != "id"} for row in questions()]
    assert SQUAD.load(source=folder(plain))["id"][:] == ["0", "1", "2", "3"]
    assert SQUAD.load(source=folder([{**row, "id": 9 - i} for i, row in enumerate(plain)]))["id"][:2] == ["9", "8"]
    with pytest.raises(TCSPError, match=r"'id' .*holds list<"):
        SQUAD.load(source=folder([{**row, "id": [i]} for i, row in enumerate(plain)]))
    with pytest.raises(TCSPError, match="The id '7' stands twice"):
        SQUAD.load(source=folder([{**row, "id": 7} for row in plain]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "'id' .*holds nothing in row 2"),
        ({"answers": None}, "'answers' .*holds nothing in row 2"),
        ({"question": None}, "'question' .*holds nothing in row 2"),
        ({"context": None}, "'context' .*holds nothing in row 2"),
        ({"answers": {"text": ["w1"], "answer_start": []}}, "in row 2 .*they must be"),
        ({"answers": {"text": [None], "answer_start": [0]}}, "in row 2 .*they must be"),
        ({"answers": {"text": [], "answer_start": []}}, "Row 2 .*has no answer.*squad_v2"),
    ],
)
def test_one_bad_question_is_named(change: dict[str, Any], message: str, folder: Maker) -> None:
    rows = questions()
    rows[2] |= change
    with pytest.raises(TCSPError, match=message):
        SQUAD.load(source=folder(rows))


@pytest.mark.parametrize("answers", ["w4", [{"text": "w4", "answer_start": 12}], {"text": ["w4"]}, {"text": "w4"}])
def test_answers_of_another_form_are_refused(answers: Any, folder: Maker) -> None:
    with pytest.raises(TCSPError, match=r"answers of .* are .*they must be \{'text': \[strings\]"):
        SQUAD.load(source=folder([{**row, "answers": answers} for row in questions()]))


def test_questions_without_answers_are_squad_v2(folder: Maker) -> None:
    rows = [{**row, "answers": {"text": [], "answer_start": []}} for row in questions()]
    assert len(find_task("squad_v2").load(source=folder(rows))) == 4


def test_answers_to_learn_from_stand_in_their_context() -> None:
    rows, tokenizer = questions(), make_tokenizer()
    assert len(make_features(SQUAD, "spans", Dataset.from_list(rows), tokenizer, 40)) == 4
    rows[2]["answers"]["answer_start"] = [3]
    with pytest.raises(TCSPError, match="answer 'w6' to question 'q2' does not stand at the character 3"):
        make_features(SQUAD, "spans", Dataset.from_list(rows), tokenizer, 40)


# Inputs ---------------------------------------------------------------------------------------------------------------


def left_padding() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


def test_the_side_of_padding_makes_no_difference() -> None:
    left, right = left_padding(), make_tokenizer()
    texts = ["w1 w2", "w3 w4 w5 w6 w7 w8"]
    for model, run in (
        (make_dense(BERT, torch.float32), predict),
        (make_dense(find("bert-Model"), torch.float32), embed),
    ):
        assert torch.equal(run(model, left, texts), run(model, right, texts))
    model, data = make_dense(QA, torch.float32), Dataset.from_list(questions())
    assert score(model, left, SQUAD, data) == score(model, right, SQUAD, data)
    one, other = (span_windows(model, tokenizer, data, 8, 30, False) for tokenizer in (left, right))
    assert all((a[0].start_logits == b[0].start_logits).all() for a, b in zip(one, other, strict=True))
    rows = [{"input_ids": [3, 9, 4], "start_positions": 1}, {"input_ids": [3, 9, 9, 9, 4], "start_positions": 3}]
    batch = make_collator("spans", left, model)(copy.deepcopy(rows))
    assert batch["input_ids"][0].tolist() == [3, 9, 4, 0, 0]
    assert left.padding_side == "left" and right_padding(right) is right


def test_a_tokenizer_of_bytes_writes_every_label() -> None:
    tokenizer = ByT5Tokenizer()
    for task in TASKS.values():
        if task.is_qa:
            assert max_target_tokens(task, tokenizer) == 256 and max_target_tokens(task, make_tokenizer()) == 32
            continue
        rows = [{**dict.fromkeys(task.columns, "a"), "label": label} for label in range(len(task.labels))]
        assert max_target_tokens(task, make_tokenizer()) == 8
        for row in make_features(task, "text", Dataset.from_list(rows), tokenizer, 64) if rows else []:
            assert len(row["labels"]) <= max_target_tokens(task, tokenizer)
            written = tokenizer.decode(row["labels"], skip_special_tokens=True)
            assert written in task.labels and row["labels"][-1] == tokenizer.eos_token_id
            assert task.labels[int(read_label(task, written, 0))] == written


def test_inputs_are_no_longer_than_the_model_reads(tmp_path: Path) -> None:
    model, tokenizer = classifier(["negative", "positive"]), make_tokenizer()  # 40 positions
    data = Dataset.from_list([{"sentence": "w1 " * 100, "label": i % 2} for i in range(4)])
    assert score(model, tokenizer, SST2, data) == score(model, tokenizer, SST2, data, max_length=40)
    with pytest.raises(TCSPError, match="max_length is 41, but the model reads at most 40"):
        score(model, tokenizer, SST2, data, max_length=41)
    with pytest.raises(TCSPError, match="max_length is 41, but the model reads at most 40"):
        finetune(model, tokenizer, SST2, data, Schedule(max_length=41), tmp_path, quiet=True)
    assert finetune(model, tokenizer, SST2, data, Schedule(epochs=1), tmp_path, quiet=True).steps == 1
    encoder = make_dense(find("bert-Model"), torch.float32)
    assert embed(encoder, tokenizer, ["w1 " * 100]).shape == (1, 32)
    data.to_parquet(str(tmp_path / "validation.parquet"))
    task = load_task(model, str(tmp_path))
    assert task.max_length == task.mean_length(tokenizer) == 40
    assert task.outputs(model, tokenizer, False, "").shape == (4, 2)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_is_one_split(tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "mine.csv"
    classifier(["negative", "positive"]).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    path.write_text("sentence,label\nw1 w2,0\nw3,1\n")
    assert len(sources.load_data(str(path))) == len(sources.load_data(str(path), "mine")) == 2
    with pytest.raises(TCSPError, match=r"one file, so it has no split 'validation': .*validation\.csv"):
        sources.load_data(str(path), "validation")
    common = ("--task", "sst2", "--data", path, "--json")
    found = json.loads(tcsp("evaluate", model, *common))
    assert (found["split"], found["rows"]) == ("mine", 2)
    for words in (
        ("evaluate", model, "--split", "validation"),
        ("finetune", "--model", model, "-o", tmp_path / "out"),
        ("train", "--model", model, "-o", tmp_path / "out", "--hidden-size", 16),
    ):
        with pytest.raises(TCSPError, match="no split 'validation'"):
            tcsp(*words, *common)
    held = path.rename(tmp_path / "validation.csv")
    assert len(SST2.load(source=str(held))) == 2
    with pytest.raises(TCSPError, match=r"is called after an evaluation split.* train\.csv"):
        SST2.load("train", str(held))
    path = held.rename(path)
    told = json.loads(tcsp("finetune", "--model", model, "-o", tmp_path / "out", "--no-evaluate", *common))
    assert told["scores"] is None and told["train_rows"] == 2


def test_rows_without_a_text_are_left_out_of_a_mix(tmp_path: Path) -> None:
    for name, texts in (("a", ["a1", None, "a2", "a3"]), ("b", ["b1", "b2", "b3", None])):
        Dataset.from_list([{"text": text} for text in texts]).to_parquet(str(tmp_path / f"{name}.parquet"))
    found = sources.load_data(f"{tmp_path / 'a.parquet'}+{tmp_path / 'b.parquet'}")
    assert sorted(found) == ["a1", "a2", "a3", "b1", "b2", "b3"]


def test_first_rows_of_a_list() -> None:
    assert sources.first_rows(["a", "b"], 1) == ["a"] and sources.first_rows(["a"], None) == ["a"]


def test_a_damaged_file_says_where(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(TCSPError, match=r"train\.jsonl cannot be read.*JSON"):
        sources.load_data(str(tmp_path))


def test_json_has_no_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, float("nan")], "b": (float("inf"), True, None)})
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == {
        "a": [1.5, None],
        "b": [None, True, None],
    }
