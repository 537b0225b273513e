"""Models whose head is new: what is below it is compressed by its hidden states, and the labels alone teach."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Case, find, largest_difference, make_dense, make_inputs, make_rows, outputs
from training import make_data, make_trainer, same, weights
from transformers import AutoModelForSequenceClassification

from tcsp_hf import TCSPError
from tcsp_hf.calibration import calibrate
from tcsp_hf.compression.body import compress_body, has_body, new_head

BERT = find("bert-ForSequenceClassification")
BODIES = [
    find(name)
    for name in (
        "bert-ForSequenceClassification",
        "bert-ForTokenClassification",
        "bert-ForQuestionAnswering",
        "t5-ForSequenceClassification",
        "t5-ForTokenClassification",
    )
]
OTHERS = [find("bert-ForMultipleChoice"), find("t5-ForQuestionAnswering")]


def make_untrained(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A dense model with a head as transformers starts it."""
    model: Any = make_dense(case, dtype, seed)
    names = ("classifier", "qa_outputs", "classification_head.out_proj")
    (head,) = [module for name, module in model.named_modules() if name in names and hasattr(module, "bias")]
    torch.nn.init.zeros_(head.bias)
    return model


@pytest.mark.parametrize("case", [*BODIES, *OTHERS], ids=str)
def test_new_heads_are_known(case: Case) -> None:
    assert new_head(make_dense(case, torch.float32)) is None
    assert new_head(make_untrained(case)) in ("classifier", "qa_outputs", "classification_head.out_proj")
    assert has_body(make_untrained(case)) == (case in BODIES)


@pytest.mark.parametrize("name", ["bert-Model", "bert-ForMaskedLM", "t5-ForConditionalGeneration", "t5-EncoderModel"])
def test_models_without_such_a_head(name: str) -> None:
    assert new_head(make_dense(find(name), torch.float32)) is None


def test_a_head_that_transformers_starts(tmp_path: Path) -> None:
    make_dense(find("bert-Model"), torch.float32).save_pretrained(tmp_path)
    assert new_head(AutoModelForSequenceClassification.from_pretrained(tmp_path)) == "classifier"


def body_statistics(case: Case, dense: Any) -> Any:
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in make_rows(case)]
    return calibrate(dense.base_model, rows, progress=False)


@pytest.mark.parametrize("case", BODIES, ids=str)
def test_the_head_is_the_same_on_the_whole_width(case: Case) -> None:
    dense = make_untrained(case, torch.float64)
    before = weights(dense)
    small = compress_body(dense, body_statistics(case, dense), hidden_size=dense.config.hidden_size)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) < 1e-6
    assert same(before, weights(dense))


@pytest.mark.parametrize("case", BODIES, ids=str)
def test_remove_counts_the_head_too(case: Case, tmp_path: Path) -> None:
    dense = make_untrained(case)
    small = compress_body(dense, body_statistics(case, dense), remove=0.3)
    assert small.config.projection["removed"] >= 0.3
    assert small.config.projection["source_parameters"] == sum(p.numel() for p in dense.parameters())
    small.save_pretrained(tmp_path)
    inputs = make_inputs(case)
    again = type(small).from_pretrained(tmp_path)
    assert largest_difference(outputs(case, small, inputs), outputs(case, again, inputs)) < 1e-6


@pytest.mark.parametrize("case", [*BODIES, *OTHERS], ids=str)
def test_labels_alone_teach(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(case, tmp_path, model=make_untrained(case), num_train_epochs=1)
    with caplog.at_level(logging.WARNING, "tcsp_hf"):
        trainer.train()
    assert "was never trained" in caplog.text
    assert trainer.teacher is None and trainer._distiller is None and trainer._drops_out
    assert trainer.model.config.model_type.startswith("tcsp_")
    assert trainer.calibration.objective.startswith("embedding") == (case in BODIES)
    assert trainer.calibration.sequences >= len(trainer.train_dataset)


def test_a_given_teacher_is_believed(tmp_path: Path) -> None:
    teacher = make_dense(BERT, torch.float32, seed=1)
    trainer = make_trainer(BERT, tmp_path, model=make_untrained(BERT), num_train_epochs=1, _teacher=teacher)
    trainer.train()
    assert trainer.teacher is teacher and trainer._distiller is not None
    assert trainer.calibration.objective == "embedding-mean"


def test_given_statistics_of_the_whole_are_used(tmp_path: Path) -> None:
    dense = make_untrained(BERT)
    stats = calibrate(dense, [{"input_ids": [1, 2 + i, 3]} for i in range(50)], progress=False)
    trainer = make_trainer(BERT, tmp_path, model=dense, num_train_epochs=1, _calibration=stats)
    trainer.train()
    assert trainer.calibration is stats


def test_the_model_as_its_own_teacher_is_trained(tmp_path: Path) -> None:
    """A reranker trained on differences keeps a bias of zero: who knows it says so."""
    dense = make_untrained(BERT)
    trainer = make_trainer(BERT, tmp_path, labelled=False, model=dense, num_train_epochs=1, _teacher=dense)
    trainer.train()
    assert trainer._distiller is not None and trainer.calibration.objective == "classification"


def test_compressing_needs_no_labels(tmp_path: Path) -> None:
    trainer = make_trainer(BERT, tmp_path, labelled=False, model=make_untrained(BERT))
    stats = trainer.calibrate()
    assert trainer.compress().config.hidden_size == 16
    assert trainer.calibration is stats
    with pytest.raises(TCSPError, match="no labels"):
        trainer.train()


def test_resume_with_another_new_head(tmp_path: Path) -> None:
    """Heads are drawn anew whenever the script starts: the body tells whether the checkpoint fits."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1, "remove": 0.3}
    options["hidden_size"] = None
    whole = make_trainer(BERT, tmp_path / "run", model=make_untrained(BERT), **options)
    whole.train()
    other = make_untrained(BERT)
    torch.nn.init.normal_(other.classifier.weight)
    resumed = make_trainer(BERT, tmp_path / "other", model=other, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert same(weights(whole.model), weights(resumed.model))
    assert resumed.calibration is None


def test_resume_what_whole_statistics_began(tmp_path: Path) -> None:
    dense = make_untrained(BERT)
    stats = calibrate(dense, make_data(BERT, False), progress=False)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    whole = make_trainer(BERT, tmp_path / "run", model=dense, _calibration=stats, **options)
    whole.train()
    resumed = make_trainer(BERT, tmp_path / "other", model=dense, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert same(weights(whole.model), weights(resumed.model))


def test_neither_labels_nor_a_trained_head(tmp_path: Path) -> None:
    trainer = make_trainer(BERT, tmp_path, labelled=False, model=make_untrained(BERT))
    with pytest.raises(TCSPError, match="the bias of its classifier is zero"):
        trainer.train()
    assert not any(tmp_path.iterdir())
