"""Fine-tunes a model on a task with transformers' Trainer, and keeps the last weights: no selection on any score."""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..clock import NOTHING, Clock, Took
from ..errors import TCSPError
from ..ranks import unwrap
from ..tasks.features import make_collator, make_features
from ..tasks.inputs import input_length
from ..tasks.table import Task, form_of
from .student import StudentTrainer


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, linear decay to zero after a warm-up.

    Attributes:
        epochs: passes over the data, a fraction allowed.
        learning_rate: the highest.
        batch_size: sequences per step.
        max_length: tokens of an input; the task's usual number, or as many as the model reads, when None.
        warmup: fraction of the steps.
        weight_decay: of matrices.
        seed: of the order, of dropout, and of the choice of rows.
        bf16: bfloat16 autocast.
    """

    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch_size: int = 32
    max_length: int | None = None
    warmup: float = 0.06
    weight_decay: float = 0.01
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise TCSPError(f"epochs is {self.epochs!r}; it must be above 0.")
        if not self.learning_rate > 0:
            raise TCSPError(f"learning_rate is {self.learning_rate!r}; it must be above 0.")
        if self.batch_size < 1 or (self.max_length is not None and self.max_length < 8):
            raise TCSPError(
                f"batch_size is {self.batch_size} and max_length {self.max_length}; at least 1 and 8 are needed."
            )

    def arguments(self, output: Path, quiet: bool, **more: Any) -> dict[str, Any]:
        """Keyword arguments for `TrainingArguments` and its subclasses."""
        return {
            "output_dir": str(output),
            "num_train_epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "warmup_steps": self.warmup,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "bf16": self.bf16,
            "use_cpu": not torch.accelerator.is_available(),  # said, so that processors join as ranks too
            "train_sampling_strategy": "group_by_length",  # little padding
            "save_strategy": "no",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "logging_steps": 50,
            "disable_tqdm": quiet,
            "report_to": "none",
            **more,
        }


def choose_rows(data: Any, count: int | None, seed: int) -> Any:
    """At most `count` rows, drawn without replacement."""
    if count is None or count >= len(data):
        return data
    if isinstance(data, list):
        return random.Random(seed).sample(data, count)
    return data.shuffle(seed=seed).select(range(count))


class _StepClock(TrainerCallback):
    """Times a training from its first step to its last."""

    def __init__(self) -> None:
        self.took = NOTHING
        self.before = 0
        self._clock = Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = state.global_step
        self._clock = Clock()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.took = self._clock.read()


@dataclass(frozen=True)
class TrainingResult:
    """What a training took.

    Attributes:
        whole: in all, calibration and compression included where they were part of it.
        training: the steps alone.
        steps, rows: how many.
        timed_steps: those of this process; the others were done before it went on from a checkpoint.
        loss: mean over the steps.
    """

    whole: Took
    training: Took
    steps: int
    timed_steps: int
    rows: int
    loss: float

    @classmethod
    def of_run(cls, trainer: Trainer, **arguments: Any) -> "TrainingResult":
        """Runs transformers' `train()` with these arguments."""
        clock, steps = Clock(), _StepClock()
        trainer.add_callback(steps)
        found = trainer.train(**arguments)
        unwrap(trainer)
        data: Any = trainer.train_dataset
        done = found.global_step
        return cls(clock.read(), steps.took, done, done - steps.before, len(data), found.training_loss)

    @property
    def seconds(self) -> float:
        """By the wall clock, in all."""
        return self.whole.wall


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    data: Any,
    schedule: Schedule,
    folder: Path,
    quiet: bool = False,
    *,
    teacher: PreTrainedModel | None = None,
    distillation: float = 0.9,
) -> TrainingResult:
    """Fine-tune a model in place on rows of a task; `folder` is for the Trainer's own files.

    Args:
        teacher: a model with the same head, whose outputs have the share `distillation` of the loss. Any class will do
            on both sides; `TCSPTrainer` compares hidden states as well.

    Raises:
        TCSPError: the model's head does not fit the task, the teacher's is another, or the schedule's `max_length` is
            more than the model reads.
    """
    form = form_of(model, task)
    length = input_length(model, task.max_length, schedule.max_length)
    made: Any = Trainer
    if teacher is not None:
        check_teacher(model, teacher, task, distillation)
        made = partial(StudentTrainer, teacher, distillation)
    features = make_features(task, form, data, tokenizer, length)
    trainer = made(
        model=model,
        args=TrainingArguments(**schedule.arguments(folder, quiet)),
        train_dataset=features,
        data_collator=make_collator(form, tokenizer, model),
        processing_class=tokenizer,
    )
    if quiet:
        quieten(trainer)
    result = TrainingResult.of_run(trainer)
    model.eval()
    return result


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, task: Task, distillation: float) -> None:
    """Refuse a teacher that a model cannot learn the task from.

    Raises:
        TCSPError: a head for another task, another vocabulary, or a share that is none.
    """
    if not 0.0 < distillation <= 1.0:
        raise TCSPError(f"distillation is {distillation!r}; it must be above 0 and at most 1.")
    for what, own, other in (
        ("is used for", form_of(model, task), form_of(teacher, task)),
        ("has vocab_size", model.config.vocab_size, teacher.config.vocab_size),
    ):
        if own != other:
            raise TCSPError(f"The teacher {what} {other}, the model {own}: it must be a model for the same task.")


def quieten(trainer: Trainer) -> None:
    """Without a progress bar the Trainer prints its log instead: nothing at all."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
