"""`tcsp finetune` and `tcsp evaluate`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.sources import SQUAD_SETS, first_rows, only_split
from ..errors import TCSPError
from ..files import check_output_file, check_output_folder, json_text, write_whole
from ..loading import load_model, load_tokenizer, resolve_name
from ..publish.results import CardResults, Evaluation
from ..tasks import TASKS, find_task, score
from ..tasks.table import Task
from ..train.finetune import Schedule, check_teacher, choose_rows, finetune
from ..train.models import load_for_task
from .common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    QuietOption,
    check_inputs,
    print_json,
    print_table,
    progress_of,
    trained_folder,
)

TaskOption = Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")]
DataFolderOption = Annotated[
    str | None,
    typer.Option("--data", help="Other data with the task's columns: a folder of splits, or a Hub dataset."),
]
TrainSplitOption = Annotated[str, typer.Option(help="Split to train on.")]
EvalSplitOption = Annotated[str | None, typer.Option(help="Split to score on; the task's validation split by default.")]
FormOption = Annotated[
    str | None,
    typer.Option(help="classification, spans or text; text for encoder-decoders, a head for encoders by default."),
]
EpochsOption = Annotated[float, typer.Option(help="Passes over the training data.")]
LearningRateOption = Annotated[float, typer.Option("--lr", help="Highest learning rate.")]
BatchSizeOption = Annotated[int, typer.Option(help="Sequences per step.", min=1)]
MaxLengthOption = Annotated[
    int | None, typer.Option(help="Tokens of an input; 128 for GLUE, 384 for SQuAD by default.", min=8)
]
TrainSamplesOption = Annotated[int | None, typer.Option(help="At most so many training rows, drawn at random.", min=1)]
EvalSamplesOption = Annotated[int | None, typer.Option(help="Only the first rows of the split.", min=1)]
SeedOption = Annotated[int, typer.Option(help="Of the new head, the choice and order of rows, and dropout.")]
Bf16Option = Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast: less time where the processor has it.")]


def bars_hidden(quiet: bool, as_json: bool) -> bool:
    """Whether the Trainer shows no bar: asked for, or not on a terminal."""
    return quiet or as_json or not sys.stderr.isatty()


def score_rows(task: Task, scores: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:.2f}" if task.is_qa else f"{value:.4f}"] for name, value in scores.items()]


def finetune_command(
    model: Annotated[str, typer.Option(help="Folder or Hub name, or all-MiniLM-L6-v2 for the demo extra's copy.")],
    task: TaskOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the fine-tuned model.")],
    data: DataFolderOption = None,
    train_split: TrainSplitOption = "train",
    eval_split: EvalSplitOption = None,
    form: FormOption = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Read only MODEL's configuration and tokenizer, and start anew.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="A model fine-tuned on the task, of any size: its outputs join the labels.")
    ] = None,
    distillation: Annotated[
        float, typer.Option(help="Weight of the teacher's outputs in the loss; labels get the rest.")
    ] = 0.9,
    epochs: EpochsOption = 3.0,
    lr: LearningRateOption = 5e-5,
    batch_size: BatchSizeOption = 32,
    max_length: MaxLengthOption = None,
    train_samples: TrainSamplesOption = None,
    eval_samples: EvalSamplesOption = None,
    evaluate: Annotated[bool, typer.Option(help="Score the result on the evaluation split.")] = True,
    seed: SeedOption = 0,
    bf16: Bf16Option = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model, dense or compressed, on a task. The last weights are kept: no score selects them.

    Example: tcsp finetune --model google-bert/bert-base-uncased --task mrpc -o bert-mrpc/

    On several processes: accelerate launch -m tcsp_hf finetune ..., or torchrun.
    """
    chosen = find_task(task)
    check_output_folder(output, overwrite)
    check_inputs(output, {"--model": model, "--teacher": teacher}, {"--data": data})
    schedule = Schedule(epochs, lr, batch_size, max_length, seed=seed, bf16=bf16)
    bars = progress_of(quiet, as_json)
    rows = choose_rows(chosen.load(train_split, data), train_samples, seed)
    held_out = first_rows(chosen.load(eval_split, data), eval_samples) if evaluate else None
    name = resolve_name(model)
    tokenizer = load_tokenizer(name)
    found, chosen_form = load_for_task(name, chosen, form, seed, random_weights)
    dense = None if teacher is None else load_model(resolve_name(teacher), device=str(found.device))
    if dense is not None:
        check_teacher(found, dense, chosen, distillation)
    with trained_folder(output, overwrite) as (staging, first):
        took = finetune(
            found,
            tokenizer,
            chosen,
            rows,
            schedule,
            staging / "trainer",
            bars_hidden(quiet, as_json),
            teacher=dense,
            distillation=distillation,
        )
        if not first:
            return
        _remove_empty(staging / "trainer")
        found.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        scores = None
        if held_out is not None:
            scores = score(found, tokenizer, chosen, held_out, max_length=max_length, progress=bars)
        summary: dict[str, Any] = {
            "model": model,
            "task": task,
            "form": chosen_form,
            "random_weights": random_weights,
            "teacher": teacher,
            "distillation": None if teacher is None else distillation,
            "train_split": train_split,
            "train_rows": len(rows),
            "eval_split": eval_split or chosen.splits[0],
            "eval_rows": None if held_out is None else len(held_out),
            "scores": scores,
            **asdict(schedule),
            "seconds": round(took.seconds, 1),
            "steps": took.steps,
            "train_loss": took.loss,
        }
        (staging / "results.json").write_text(json_text(summary), encoding="utf-8")
    if as_json:
        print_json({"output": str(output), **summary})
        return
    table = [] if scores is None else score_rows(chosen, scores)
    note = f"{len(rows):,} training rows, {took.steps:,} steps, {took.seconds:.0f} s"
    print_table(f"{model} on {task} -> {output}", ["", "score"], table, note)


def _remove_empty(folder: Path) -> None:
    """The Trainer makes its folder whether it writes anything or not."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def evaluate_command(
    model: ModelArgument,
    task: TaskOption,
    data: DataFolderOption = None,
    split: EvalSplitOption = None,
    samples: EvalSamplesOption = None,
    batch_size: BatchSizeOption = 64,
    max_length: MaxLengthOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    card_results: Annotated[
        Path | None, typer.Option(help="Write a JSON for `tcsp card --results`.", show_default=False)
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model, dense or compressed, on a task.

    Example: tcsp evaluate small/ --task mrpc
    """
    chosen = find_task(task)
    if card_results is not None:
        check_output_file(card_results, "--card-results")
        if data is not None:
            raise TCSPError("--card-results is for a task's own data, but --data is given: leave one of them out.")
    split = split or only_split(data) or chosen.splits[0]
    rows = first_rows(chosen.load(split, data), samples)
    found, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    bars = progress_of(quiet, as_json)
    scores = score(found, tokenizer, chosen, rows, batch_size=batch_size, max_length=max_length, progress=bars)
    if card_results is not None:
        measured = evaluations_of(chosen, split, {"compressed": scores}, None if samples is None else len(rows))
        write_whole(card_results, CardResults(evaluations=measured).to_json())
    if as_json:
        print_json({"model": model, "task": task, "split": split, "rows": len(rows), "scores": scores})
        return
    note = f"{split}, {len(rows):,} rows"
    print_table(f"{model} on {task}", ["", "score"], score_rows(chosen, scores), note)


def evaluations_of(
    task: Task, split: str, scores: dict[str, dict[str, float]], part: int | None = None
) -> tuple[Evaluation, ...]:
    """As a model card has them, of the task's own data.

    Args:
        part: so many first rows of the split; all when None.
    """
    kind = "question-answering" if task.is_qa else "text-classification"
    data, config = (SQUAD_SETS[task.name], None) if task.is_qa else ("nyu-mll/glue", task.name)
    title = None if part is None else f"{data}{f' {config}' if config else ''}, first {part:,} rows"
    return tuple(
        Evaluation(kind, data, split, name, value, scores.get("dense", {}).get(name), config=config, name=title)
        for name, value in scores["compressed"].items()
    )
