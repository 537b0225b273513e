"""MTEB's evaluator on a compressed encoder, on tasks that need no network."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from common import find, make_small, make_tokenizer
from test_cli import tcsp
from test_sentence_transformers import write_source

from tcsp_hf import TCSPError
from tcsp_hf.data import SquadSample
from tcsp_hf.evaluation import mteb_tasks
from tcsp_hf.evaluation.embeddings import recall_at
from tcsp_hf.export.sentence_transformer import load_source, save_sentence_transformer
from tcsp_hf.tasks.metrics import spearmanr

ENCODER = find("bert-Model")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    dense = write_source(tmp_path / "dense")
    save_sentence_transformer(make_small(ENCODER), make_tokenizer(), load_source(dense), tmp_path / "small")
    return dense, tmp_path / "small"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # mteb's own
def test_scores_are_those_of_the_embeddings(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mteb", reason="pip install mteb")
    from datasets import Dataset

    texts = [" ".join(f"w{(3 * i + j * j) % 41}" for j in range(4 + i % 5)) for i in range(40)]
    questions = [" ".join(text.split()[:2]) for text in texts[:30]]
    sample = SquadSample([], [], texts, [], questions, list(range(30)))
    monkeypatch.setattr(mteb_tasks, "load_squad_sample", lambda: sample)
    pairs = {"sentence1": texts[:20], "sentence2": texts[20:], "label": [5 * (i % 7) / 6 for i in range(20)]}
    (tmp_path / "data" / "glue" / "stsb").mkdir(parents=True)
    Dataset.from_dict(pairs).to_parquet(tmp_path / "data" / "glue" / "stsb" / "validation.parquet")
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path / "data"))
    dense, small = folders
    told = ("--model", small, "--dense", dense, "--tasks", "squad-sample,stsb")
    found = json.loads(tcsp("bench", "mteb", *told, "--json"))["scores"]
    for name, folder in (("dense", dense), ("compressed", small)):
        encode = partial(load_source(folder).encode, convert_to_tensor=True)  # its own prompts, and its similarity: dot
        expected = recall_at(encode(questions, prompt_name="query"), encode(texts), sample.answers_in, (1, 10))
        scores = found["squad-sample"][name]
        assert [scores["recall_at_1"], scores["recall_at_10"]] == pytest.approx(expected, abs=1e-4)
        assert scores["main_score"] == scores["ndcg_at_10"]
        cosines = torch.nn.functional.cosine_similarity(encode(texts[:20]), encode(texts[20:])).numpy()
        own = spearmanr(cosines, np.array(pairs["label"]))
        assert found["stsb"][name]["main_score"] == pytest.approx(own, abs=1e-4)


def test_refusals(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, small = folders
    with pytest.raises(TCSPError, match="no task 'mine'; allowed: squad-sample, stsb"):
        mteb_tasks.local_task("mine")
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(TCSPError, match="pip install mteb"):
        tcsp("bench", "mteb", "--model", small)
