"""What the tests of training share: tiny tasks, trainers, and how to compare weights."""

from pathlib import Path
from typing import Any

import torch
from common import Case, find, make_dense, make_inputs, make_labels, make_tokenizer
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from tcsp_hf import TCSPSeq2SeqTrainer, TCSPTrainer
from tcsp_hf.train import TCSPSeq2SeqTrainingArguments, TCSPTrainingArguments

ROWS = 48


def make_data(case: Case, labelled: bool = True, rows: int = ROWS) -> list[dict[str, Any]]:
    """Unpadded rows of token ids, with labels that the head takes."""
    found: list[dict[str, Any]] = []
    for seed in range(-(-rows // 3)):
        inputs = make_inputs(case, seed)
        labels = make_labels(case, inputs) if labelled else {}
        for i in range(3):
            size = int(inputs["attention_mask"][i].sum()) if inputs["attention_mask"].dim() == 2 else 9
            row: dict[str, Any] = {}
            for name, value in {**inputs, **labels}.items():
                if name.startswith("decoder"):
                    continue
                item = value[i].tolist()
                whole = name == "labels" and case.decodes
                row[name] = (
                    item[:size] if isinstance(item, list) and not whole and inputs["input_ids"].dim() == 2 else item
                )
            found.append(row)
    return found[:rows]


def make_arguments(folder: Path, writes: bool = False, **fields: Any) -> Any:
    made = TCSPSeq2SeqTrainingArguments if writes else TCSPTrainingArguments
    base: dict[str, Any] = {
        "output_dir": str(folder),
        "hidden_size": 16,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return made(**{**base, **fields})


def make_trainer(case: Case, folder: Path, *, labelled: bool = True, model: Any = None, **fields: Any) -> Any:
    """A trainer of a tiny model of the case; keywords that it takes itself are named with a leading underscore."""
    own = {name[1:]: fields.pop(name) for name in [name for name in fields if name.startswith("_")]}
    tokenizer = make_tokenizer()
    writes = case.head == "ForConditionalGeneration"
    if model is None and "model_init" not in own:
        model = make_dense(case, torch.float32)
    padded = case.head in ("ForMaskedLM", "ForTokenClassification", "ForConditionalGeneration", "ForPreTraining")
    collator = DataCollatorForSeq2Seq(tokenizer) if padded else DataCollatorWithPadding(tokenizer)
    arguments: dict[str, Any] = {
        "model": model,
        "args": make_arguments(folder, writes, **fields),
        "train_dataset": make_data(case, labelled),
        "data_collator": collator,
        "processing_class": tokenizer,
    }
    return (TCSPSeq2SeqTrainer if writes else TCSPTrainer)(**{**arguments, **own})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_plain_trainer(folder: Path, **fields: Any) -> Any:
    """A BERT without dropout on rows of one length: how the rows are split into batches makes no difference."""
    case = find("bert-ForSequenceClassification")
    dense = make_dense(case, torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    cut = {"token_type_ids": [0] * 5, "attention_mask": [1] * 5}
    rows = [{**row, "input_ids": row["input_ids"][:5], **cut} for row in make_data(case)]
    return make_trainer(case, folder, model=dense, _train_dataset=rows, **fields)
