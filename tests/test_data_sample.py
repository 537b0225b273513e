"""The SQuAD sample that travels with the package, and the draw that made it."""

import math
import socket
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

import tcsp_hf.data
from tcsp_hf.data import SAMPLE_FILE, SquadSample, load_squad_sample, make_squad_sample, sources
from tcsp_hf.data.make_squad_sample import draw_evenly, draw_squad_sample, main, write_squad_sample
from tcsp_hf.data.sources import all_texts, mixed_texts
from tcsp_hf.errors import TCSPError


@pytest.fixture(scope="module")
def sample() -> SquadSample:
    return load_squad_sample()


def test_counts(sample):
    assert len(sample.calibration) == len(sample.calibration_titles) == 400
    assert len(sample.paragraphs) == len(sample.paragraph_titles) == 600
    assert len(sample.questions) == len(sample.answers_in) == 1000


def test_texts_are_distinct_and_not_blank(sample):
    texts = [*sample.calibration, *sample.paragraphs, *sample.questions]
    assert len(set(texts)) == len(texts) == 2000
    assert all(text == text.strip() and len(text) > 5 for text in texts)


def test_calibration_and_test_share_no_article(sample):
    assert not set(sample.calibration_titles) & set(sample.paragraph_titles)


def test_drawn_evenly(sample):
    assert set(Counter(sample.calibration_titles).values()) == {1}
    assert set(Counter(sample.paragraph_titles).values()) == {12, 13}
    assert len(set(sample.calibration_titles[:50])) == 50, "a first part is spread over articles too"


def test_questions_point_at_their_paragraphs(sample):
    assert set(sample.answers_in) == set(range(600))
    assert max(Counter(sample.answers_in).values()) == 2
    # A question shares words with its own paragraph far more often than with the one after it.
    words = [set(paragraph.lower().split()) for paragraph in sample.paragraphs]
    asked = [set(question.lower().split()) for question in sample.questions]
    own = sum(len(q & words[i]) for q, i in zip(asked, sample.answers_in, strict=True))
    next_one = sum(len(q & words[(i + 1) % 600]) for q, i in zip(asked, sample.answers_in, strict=True))
    assert own > 1.5 * next_one


def test_loads_without_a_network(monkeypatch, sample):
    def refuse(*args, **kwargs):
        raise AssertionError("the sample was looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_squad_sample() == sample


def test_size_and_attribution():
    folder = files("tcsp_hf.data")
    assert len(folder.joinpath(SAMPLE_FILE).read_bytes()) < 700_000
    notice = folder.joinpath("NOTICE.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in notice and "Rajpurkar" in notice and "changed" in notice


pairs = st.sets(st.tuples(st.sampled_from("abcdef"), st.text(max_size=3)), min_size=1, max_size=40)


@given(pairs, st.data())
def test_draw_takes_from_groups_in_turn(items, data):
    at_most = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    sizes = {g: min(n, at_most or n) for g, n in Counter(g for g, _ in items).items()}
    count = data.draw(st.integers(0, sum(sizes.values())))
    drawn = draw_evenly(items, count, seed=1, at_most=at_most)
    assert len(drawn) == len(set(drawn)) == count and set(drawn) <= items
    taken = Counter(g for g, _ in drawn)
    most = max(taken.values(), default=0)
    assert all(taken[g] <= n and taken[g] >= min(n, most - 1) for g, n in sizes.items())


@given(st.permutations([("abcd"[i % 4], str(i)) for i in range(20)]), st.integers(0, 20))
def test_draw_depends_on_the_seed_and_not_on_the_order(items, count):
    drawn = draw_evenly(items, count, seed=1)
    assert drawn == draw_evenly(sorted(items) * 2, count, seed=1)
    assert drawn == draw_evenly(items, 20, seed=1)[:count]
    if count > 2:
        assert drawn != draw_evenly(items, count, seed=2)


def test_draw_of_too_many_is_refused():
    items = [("x", "a"), ("x", "b"), ("y", "c")]
    assert len(draw_evenly(items, 3, seed=0)) == 3
    with pytest.raises(TCSPError, match="asked for 3 texts where 2"):
        draw_evenly(items, 3, seed=0, at_most=1)


@pytest.fixture
def small_squad(tmp_path) -> Path:
    """A folder with a made-up SQuAD: 6 train articles, 4 of validation, one in both."""

    def rows(articles: list[str]) -> pa.Table:
        return pa.Table.from_pylist(
            [
                {"title": article, "context": f"{article} paragraph {p} ", "question": question}
                for article in articles
                for p in range(3)
                for question in (
                    f" {article} {p} what?",
                    f"{article} {p} who?",
                    f"{article} {p} why?",
                    "When",
                )
            ]
        )

    folder = tmp_path / "squad"
    folder.mkdir()
    pq.write_table(rows(["A", "B", "C", "D", "E", "both"]), folder / "train.parquet")
    pq.write_table(rows(["both", "X", "Y", "Z"]), folder / "validation.parquet")
    return tmp_path


def test_draw_from_a_folder(small_squad):
    sample = draw_squad_sample(small_squad, calibration=15, paragraphs=8, questions=16)
    assert sample == draw_squad_sample(small_squad / "squad", calibration=15, paragraphs=8, questions=16)
    assert set(sample.calibration_titles) == set("ABCDE"), "the article of both splits is not calibrated on"
    assert set(Counter(sample.paragraph_titles).values()) == {2}
    assert set(Counter(sample.answers_in).values()) == {2}
    assert "When" not in sample.questions, "a question about several paragraphs has no one answer"
    for question, i in zip(sample.questions, sample.answers_in, strict=True):
        article, paragraph, _ = question.split()
        assert sample.paragraphs[i] == f"{article} paragraph {paragraph}"


def test_draw_from_the_hub(small_squad, monkeypatch):
    def hub(name, *, split, streaming):
        assert name == "rajpurkar/squad" and streaming
        return pq.read_table(small_squad / "squad" / f"{split}.parquet").to_pylist()

    counts = {"calibration": 5, "paragraphs": 4, "questions": 4}
    from_folder = draw_squad_sample(small_squad, **counts)
    monkeypatch.setattr(make_squad_sample, "load_dataset", hub)
    assert draw_squad_sample(None, **counts) == from_folder


def test_draw_from_a_folder_without_squad(tmp_path):
    with pytest.raises(TCSPError, match=r"no SQuAD validation split: looked for .*validation\.parquet"):
        draw_squad_sample(tmp_path)


def test_writing_is_deterministic_and_reads_back(tmp_path, sample):
    write_squad_sample(sample, tmp_path / "a")
    write_squad_sample(sample, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    packaged = files("tcsp_hf.data").joinpath(SAMPLE_FILE).read_bytes()
    assert math.isclose((tmp_path / "a").stat().st_size, len(packaged), rel_tol=0.05)


def run_main(*args: str, **env: str):
    app = Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(args), env=env)


def test_command_names_what_is_missing(tmp_path):
    for result in (run_main("--source", str(tmp_path)), run_main(TCSP_DATA_DIR=str(tmp_path))):
        assert isinstance(result.exception, TCSPError) and str(tmp_path) in str(result.exception)


@pytest.mark.slow
@pytest.mark.shared
def test_packaged_sample_is_what_the_script_draws(shared, tmp_path, sample, monkeypatch):
    result = run_main("--output", str(tmp_path / "again.json.gz"), TCSP_DATA_DIR=str(shared / "data"))
    assert result.exit_code == 0, result.output
    assert "400 calibration paragraphs from 400 articles" in result.output
    monkeypatch.setattr(tcsp_hf.data, "files", lambda package: tmp_path)
    monkeypatch.setattr(tcsp_hf.data, "SAMPLE_FILE", "again.json.gz")
    assert load_squad_sample() == sample


def test_mixed_texts_are_varied_and_reproducible() -> None:
    rows = [
        {"context": f"Paragraph {i} is long. It has the number {i} in it.", "question": f"q{i}?"} for i in range(40)
    ]
    data = Dataset.from_list([row for row in rows for _ in range(3)])
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("_PARAGRAPHS", 5), ("_SENTENCES", 10), ("_QUESTIONS", 8)):
            patch.setattr(sources, name, count)
        found = mixed_texts(data)
        assert found == mixed_texts(data) != mixed_texts(data, seed=1)
    paragraphs, sentences, questions = found[:5], found[5:15], found[15:]
    contexts = [row["context"] for row in rows]
    assert set(paragraphs) <= set(contexts) and all(question.endswith("?") for question in questions)
    assert len(questions) == 8 and len(set(found)) == len(found)
    for sentence in sentences:  # of other paragraphs
        (source,) = (context for context in contexts if sentence in context)
        assert source not in paragraphs and sentence != source


def test_all_texts_are_every_paragraph_sentence_and_question_once() -> None:
    rows = [
        {"context": f"Paragraph {i} is long enough. It has the number {i} in it. No.", "question": f"q{i}?"}
        for i in range(9)
    ]
    found = all_texts(Dataset.from_list(rows * 2))
    assert found != sorted(found) and found == all_texts(Dataset.from_list(rows * 2))
    expected = [row["context"] for row in rows] + [row["question"] for row in rows]
    expected += [f"Paragraph {i} is long enough." for i in range(9)] + [
        f"It has the number {i} in it." for i in range(9)
    ]
    assert sorted(found) == sorted(expected)


def test_joined_names_give_equal_shares(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path))
    folder = tmp_path / "glue" / "stsb"
    folder.mkdir(parents=True)
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": 1.0} for i in range(20)]
    Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    found = sources.load_data("squad-sample+squad-sample+stsb")
    own = {text for row in rows for text in (row["sentence1"], row["sentence2"])}
    assert [text in own for text in found[:30]] == [False, False, True] * 10
    assert len(set(found)) == len(found) and own <= set(found)
    assert found == sources.load_data("squad-sample+squad-sample+stsb")
    (tmp_path / "numbers.csv").write_text("value\n1\n")
    with pytest.raises(TCSPError, match="text columns"):
        sources.load_data(f"squad-sample+{tmp_path / 'numbers.csv'}")
