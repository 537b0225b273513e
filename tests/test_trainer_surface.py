"""What users of transformers' trainers do with theirs, done with ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import find, make_dense, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from training import make_data, make_trainer, same, weights
from transformers import DataCollatorForSeq2Seq

from tcsp_hf import TCSPError, TCSPTrainer

CLASSIFIER = find("bert-ForSequenceClassification")
WRITER = find("t5-ForConditionalGeneration")


@pytest.mark.parametrize("start", ["train", "compress"])
def test_an_optimizer_of_the_dense_model_is_refused(tmp_path: Path, start: str) -> None:
    """It would go on training the dense model's weights, and the compressed one would stay as it is."""
    trainer = make_trainer(CLASSIFIER, tmp_path)
    trainer.create_optimizer()
    with pytest.raises(TCSPError, match="optimizer of the dense model"):
        getattr(trainer, start)()


def test_an_optimizer_of_the_compressed_model_is_used(tmp_path: Path) -> None:
    trainer = make_trainer(CLASSIFIER, tmp_path, max_steps=1)
    trainer.compress()
    before = weights(trainer.model)
    trainer.create_optimizer()
    trainer.train()
    assert not same(before, weights(trainer.model))


@pytest.mark.parametrize("case", [CLASSIFIER, WRITER], ids=str)
def test_an_evaluation_in_bfloat16_changes_no_calibration(case: Any, tmp_path: Path) -> None:
    found = []
    for evaluates in (False, True):
        trainer = make_trainer(case, tmp_path, bf16=True, _eval_dataset=make_data(case)[:6])
        if evaluates:
            trainer.evaluate()
        found.append(weights(trainer.compress()))
    assert same(*found)


def test_the_users_own_loss_gets_the_number_of_labels(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        assert int(num_items_in_batch) == labels.numel()
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def history(**own: Any) -> list[float]:
        trainer = make_trainer(CLASSIFIER, tmp_path, max_steps=2, **own)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert history(_compute_loss_func=loss) == pytest.approx(history(), rel=1e-5)


@pytest.mark.parametrize("case", [CLASSIFIER, find("bert-Model")], ids=str)
def test_the_users_own_loss_is_asked_without_labels_too(case: Any, tmp_path: Path) -> None:
    asked: list[Any] = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        asked.append(labels)
        return outputs[0].square().mean()

    fields = {"labelled": False, "max_steps": 2, "_compute_loss_func": loss}
    make_trainer(case, tmp_path, distillation=0.5, **fields).train()
    assert asked == [None, None]


def test_a_sampler_by_length_is_told_the_epoch(tmp_path: Path) -> None:
    """By the trainer itself: in a resumed epoch on several processes accelerate does not reach it."""
    trainer = make_trainer(CLASSIFIER, tmp_path, train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    first = list(sampler)
    trainer.state.epoch = 1.5
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert sampler.epoch == 1 and list(sampler) != first


def test_the_users_own_loss_needs_no_labels(tmp_path: Path) -> None:
    class Own(TCSPTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            target = inputs.pop("target")
            outputs = model(**inputs)
            loss = (outputs.logits[:, 0] - target).square().mean()
            return (loss, outputs) if return_outputs else loss

    rows = [{"input_ids": row["input_ids"], "target": 1.0} for row in make_data(CLASSIFIER)]
    kinds = {"remove_unused_columns": False, "max_steps": 2, "_train_dataset": rows}
    small = make_trainer(CLASSIFIER, tmp_path).compress()
    made = make_trainer(CLASSIFIER, tmp_path, model=small, **kinds)
    trainer = Own(made.model, made.args, train_dataset=rows, data_collator=made.data_collator)
    before = weights(small)
    trainer.train()
    assert not same(before, weights(trainer.model))


def test_rows_that_only_the_collator_can_read(tmp_path: Path) -> None:
    pairs = [(row["input_ids"], row["labels"]) for row in make_data(WRITER)]
    collate = DataCollatorForSeq2Seq(make_tokenizer())
    trainer = make_trainer(
        WRITER,
        tmp_path,
        max_steps=1,
        remove_unused_columns=False,
        _train_dataset=pairs,
        _data_collator=lambda rows: collate([{"input_ids": ids, "labels": labels} for ids, labels in rows]),
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_several_ends_of_a_text(tmp_path: Path) -> None:
    dense = make_dense(WRITER, torch.float32, eos_token_id=[1, 5])
    trainer = make_trainer(WRITER, tmp_path, model=dense, labelled=False, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_stream_that_can_be_read_once_is_refused(tmp_path: Path) -> None:
    class Once(torch.utils.data.IterableDataset):
        def __init__(self, rows: list[Any]) -> None:
            self.rows = iter(rows)

        def __iter__(self) -> Iterator[Any]:
            return self.rows

    stream = Once(make_data(CLASSIFIER))
    trainer = make_trainer(CLASSIFIER, tmp_path, max_steps=2, _train_dataset=stream)
    with pytest.raises(TCSPError, match="read only once"):
        trainer.train()
    assert len(list(stream)) == len(make_data(CLASSIFIER)), "rows were used up"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_a_dense_model_with_adapters_is_refused(tmp_path: Path) -> None:
    dense = get_peft_model(make_dense(CLASSIFIER, torch.float32), LoraConfig(target_modules=["query"]))
    with pytest.raises(TCSPError, match="compress the model first"):
        make_trainer(CLASSIFIER, tmp_path, model=dense)


def test_residual_maps_do_not_decay(tmp_path: Path) -> None:
    """They hold the norms' weights, which transformers leaves out."""
    trainer = make_trainer(CLASSIFIER, tmp_path)
    small = trainer.compress()
    names = trainer.get_decay_parameter_names(small)
    assert any(name.endswith("output.dense.weight") for name in names)
    assert not any("residual" in name or "norm" in name for name in names)
