"""Calibrate, compress and fine-tune with distillation, on a task or on plain text."""

from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedModel

from ..architectures import family_of
from ..calibration import Calibration
from ..calibration.inputs import TEXT_COLUMNS
from ..compression import Search
from ..data.checks import check_texts
from ..errors import TCSPError
from ..modes import kept_settings
from ..ranks import on_first_rank
from ..tasks.features import make_collator, make_features
from ..tasks.inputs import input_length, right_padding
from ..tasks.table import TEXT, Task, form_of
from .arguments import TCSPSeq2SeqTrainingArguments, TCSPTrainingArguments
from .checkpoint import claim
from .finetune import Schedule, TrainingResult, quieten
from .trainer import TCSPSeq2SeqTrainer, TCSPTrainer

_TEXT_LENGTH = 128


def text_features(
    data: Any,
    tokenizer: Any,
    max_length: int | None,
    columns: tuple[str, ...] | None = None,
    single: bool = False,
) -> Any:
    """Token ids of unlabelled text: a list of strings, or a dataset with text columns.

    Args:
        single: texts of several columns one by one, each once, instead of as pairs.

    Raises:
        TCSPError: no text column is found, or one that is not text in every row.
    """
    from datasets import Dataset

    rows = Dataset.from_dict({"text": data}) if isinstance(data, list) else data
    names = rows.column_names
    chosen = columns or next((found for found in TEXT_COLUMNS if all(name in names for name in found)), None)
    if chosen is None or any(name not in names for name in chosen):
        raise TCSPError(f"No text column {chosen or ''} among {names}: name one or two.")
    check_texts(rows, chosen, "the training text")
    if single and len(chosen) > 1:
        texts = dict.fromkeys(text for name in chosen for text in rows[name])
        rows, names, chosen = Dataset.from_dict({"text": list(texts)}), ["text"], ("text",)
    length = max_length or _TEXT_LENGTH
    with kept_settings(tokenizer):
        return rows.map(
            lambda batch: tokenizer(*(batch[name] for name in chosen), truncation=True, max_length=length),
            batched=True,
            remove_columns=names,
            desc="tokenise",
        )


def task_trainer(
    dense: PreTrainedModel,
    tokenizer: Any,
    task: Task | None,
    data: Any,
    schedule: Schedule,
    folder: Path,
    *,
    quiet: bool = False,
    calibration: Calibration | None = None,
    search: Search | None = None,
    student: PreTrainedModel | None = None,
    untrained: bool = False,
    **options: Any,
) -> TCSPTrainer | TCSPSeq2SeqTrainer:
    """The trainer that compresses a dense model and trains the result with the dense one as teacher.

    Args:
        task: None for unlabelled text and any head (an embedding model).
        data: rows of the task, or text (see `text_features`).
        folder: for the Trainer's own files.
        calibration, search: from elsewhere.
        student: a compressed form of the dense model to go on with; made to the budget of the options when None.
        untrained: the dense model's head is new, so that the labels alone teach.
        options: of `TCSPTrainingArguments`: the budget, distillation, and where to save (`save_strategy`).

    Raises:
        TCSPError: see `TCSPTrainer` and `finetune`.
    """
    form = None if task is None else form_of(dense, task)
    length = input_length(dense, _TEXT_LENGTH if task is None else task.max_length, schedule.max_length)
    made = (TCSPSeq2SeqTrainer, TCSPSeq2SeqTrainingArguments) if form == TEXT else (TCSPTrainer, TCSPTrainingArguments)
    arguments = made[1](**schedule.arguments(folder, quiet, **options))
    if task is None or form is None:
        encoder = family_of(dense)[1] in ("Model", "EncoderModel")  # which reads no pairs
        features = text_features(data, tokenizer, length, single=encoder)
        collator: Any = DataCollatorWithPadding(right_padding(tokenizer))
    else:
        features = make_features(task, form, data, tokenizer, length)
        collator = make_collator(form, tokenizer, dense)
    trainer = made[0](
        dense if student is None else student,
        arguments,
        teacher=None if untrained else dense,
        train_dataset=features,
        data_collator=collator,
        processing_class=tokenizer,
        calibration=calibration,
        search=search,
    )
    if quiet:
        quieten(trainer)
    return trainer


def run_training(trainer: Any, run: dict[str, Any] | None = None) -> tuple[Any, TrainingResult]:
    """The compressed model with the last weights (no score selects them), and what it took.

    Args:
        run: all that the weights depend on: go on from the last complete checkpoint in the trainer's folder, if there
            is one. None starts anew.

    Raises:
        TCSPError: the checkpoints there are of another run.
    """
    last = None if run is None else on_first_rank(lambda: claim(Path(trainer.args.output_dir), run))
    took = TrainingResult.of_run(trainer, resume_from_checkpoint=None if last is None else str(last))
    trainer.model.eval()
    return trainer.model, took
