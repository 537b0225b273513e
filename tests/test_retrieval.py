"""The search with two encoders: figures that can be counted by hand, and the command on a tiny pair of models."""

import json
from pathlib import Path

import pytest
import torch
from common import find, make_dense, make_small, make_tokenizer
from datasets import Dataset
from test_cli import tcsp

from tcsp_hf import TCSPError
from tcsp_hf.cli.bench.retrieval import encoder_of
from tcsp_hf.evaluation.embeddings import embed
from tcsp_hf.evaluation.retrieval import Search, compare_search
from tcsp_hf.publish import CardResults

DATA = Dataset.from_dict({"context": ["a", "a", "b", "c"], "question": ["q0", "q1", "q2", "q3"]})


def test_search_of_squad_columns() -> None:
    assert Search.of(DATA) == Search(["a", "b", "c"], ["q0", "q1", "q2", "q3"], [0, 0, 1, 2])
    drawn = Search.of(DATA, 2, seed=1)
    assert len(drawn.questions) == 2 and drawn.paragraphs == ["a", "b", "c"]
    for question, answer in zip(drawn.questions, drawn.answers, strict=True):
        assert Search.of(DATA).answers[int(question[1])] == answer
    with pytest.raises(TCSPError, match="no column 'context'"):
        Search.of(DATA.remove_columns("context"))


def test_every_pairing_of_queries_and_index() -> None:
    """The dense model is always right, the other one takes the second paragraph for the first."""
    places = {"a": 0, "b": 1, "c": 2, "q0": 0, "q1": 0, "q2": 1, "q3": 2}
    swapped = {**places, "a": 1, "b": 0}
    axes = torch.eye(3)

    def encoder(of: dict[str, int], size: int = 3):  # type: ignore[no-untyped-def]
        return lambda texts, _: axes[[of[text] for text in texts], :size]

    found = compare_search(Search.of(DATA), encoder(places), encoder(swapped))
    first = {name: recalls[0] for name, recalls in found["recall"].items()}
    assert first == {
        "dense on dense": 1.0,
        "compressed on compressed": 0.25,
        "compressed on dense": 1.0,
        "dense on compressed": 0.25,
    }
    assert found["cosine"] == {"paragraphs": pytest.approx(1 / 3), "questions": 1.0}
    read: list[str] = []

    def counted(texts, title):  # type: ignore[no-untyped-def]
        read.extend(texts)
        return encoder(places)(texts, title)

    with pytest.raises(TCSPError, match="3 and 2 entries"):
        compare_search(Search.of(DATA), counted, encoder(places, 2))
    assert read == ["a"], "found out on one paragraph"


def test_plain_folders(tmp_path: Path) -> None:
    """A head is left out; what has a decoder is refused by name."""
    masked = make_dense(find("bert-ForMaskedLM"), torch.float32)
    masked.save_pretrained(tmp_path / "masked")
    make_dense(find("t5-ForConditionalGeneration"), torch.float32).save_pretrained(tmp_path / "writer")
    make_dense(find("t5-EncoderModel"), torch.float32).save_pretrained(tmp_path / "encoder")
    for name in ("masked", "writer", "encoder"):
        make_tokenizer().save_pretrained(tmp_path / name)
    found = encoder_of(str(tmp_path / "masked"), 2, False)(["w1 w2", "w3"], "")
    torch.testing.assert_close(found, embed(masked.bert, make_tokenizer(), ["w1 w2", "w3"]))
    with pytest.raises(TCSPError, match="T5ForConditionalGeneration is no sentence encoder"):
        encoder_of(str(tmp_path / "writer"), 2, False)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = find("bert-Model")
    make_dense(case, torch.float32).save_pretrained(tmp_path / "dense")
    make_small(case).save_pretrained(tmp_path / "small")
    for name in ("dense", "small"):
        make_tokenizer().save_pretrained(tmp_path / name)
    for folder, rows in (
        ("squad", {"context": ["w1 w2 w3", "w4 w5 w6", "w7 w8"], "question": ["w1 w2", "w5", "w8 w7"]}),
        ("glue/stsb", {"sentence1": ["w1", "w2", "w3"], "sentence2": ["w1", "w9", "w4"], "label": [5.0, 1.0, 2.0]}),
    ):
        (tmp_path / "data" / folder).mkdir(parents=True)
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / folder / "validation.parquet")
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path / "data"))
    told = ("bench", "retrieval", "--model", tmp_path / "small", "--dense", tmp_path / "dense")
    found = json.loads(tcsp(*told, "--json", "--card-results", tmp_path / "scores.json"))
    assert (found["paragraphs"], found["questions"], found["stsb"]["pairs"]) == (3, 3, 3)
    scores = {entry.metric: entry for entry in CardResults.load(tmp_path / "scores.json").evaluations}
    assert scores["recall@1"].dense == found["recall"]["dense on dense"][0]
    assert scores["spearmanr"].value == found["stsb"]["compressed"]
    with pytest.raises(TCSPError, match="exists: name another file"):
        tcsp(*told, "--card-results", tmp_path / "scores.json")
