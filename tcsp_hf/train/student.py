"""Trains any student, of a stock class too, on a dense model's outputs and the labels."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..tasks.features import make_collator, make_features
from ..tasks.table import Task, form_of
from .distillation import Distiller, Silenced
from .finetune import Schedule, quieten


class StudentTrainer(Trainer):
    """A Trainer whose loss is by `distillation` the teacher's outputs at temperature 2, for the rest the labels."""

    def __init__(self, teacher: PreTrainedModel, distillation: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.distillation = distillation
        self.distiller = Distiller(teacher.eval(), None, 2.0, 0.0, "mean", ("labels",))
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        taught = self.distiller.loss(model, inputs, outputs, {})
        loss: torch.Tensor = self.distillation * taught + (1.0 - self.distillation) * outputs.loss
        return (loss, outputs) if return_outputs else loss


def train_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    data: Any,
    schedule: Schedule,
    folder: Path,
    *,
    distillation: float = 0.9,
    quiet: bool = False,
) -> None:
    """Train a student in place on rows of a task; `folder` is for the Trainer's own files.

    It drops out only where labels have a part in the loss (`distillation` below 1).

    Raises:
        TCSPError: the student's head does not fit the task.
    """
    form = form_of(student, task)
    trainer = StudentTrainer(
        teacher,
        distillation,
        model=student,
        args=TrainingArguments(**schedule.arguments(folder, quiet)),
        train_dataset=make_features(task, form, data, tokenizer, schedule.max_length or task.max_length),
        data_collator=make_collator(form, tokenizer, student),
    )
    if quiet:
        quieten(trainer)
    silenced = Silenced(student) if distillation == 1.0 else None
    trainer.train()
    if silenced is not None:
        silenced.restore()
    student.eval()
