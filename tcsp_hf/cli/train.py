"""`tcsp train`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..architectures import dense_hidden_size
from ..calibration.fingerprint import model_fingerprint
from ..compression import removed_fraction
from ..data.digest import digest_of_rows
from ..data.sources import first_rows, load_data
from ..errors import TCSPError
from ..export.sentence_transformer import reranker_settings
from ..files import check_output_folder, json_text
from ..loading import load_model, load_tokenizer, resolve_name
from ..publish.card import write_card
from ..publish.results import CardResults, Evaluation
from ..tasks import TASKS, find_task, score
from ..train.distil import run_training, task_trainer
from ..train.finetune import Schedule, choose_rows
from ..train.models import load_dense
from ..train.trainer import is_compressed
from .common import (
    JsonOption,
    OverwriteOption,
    PoolingOption,
    QuietOption,
    check_inputs,
    check_outside,
    command_line,
    print_json,
    print_table,
    progress_of,
    trained_folder,
    write_texts,
)
from .finetune import (
    BatchSizeOption,
    Bf16Option,
    DataFolderOption,
    EpochsOption,
    EvalSamplesOption,
    EvalSplitOption,
    MaxLengthOption,
    SeedOption,
    TrainSamplesOption,
    TrainSplitOption,
    bars_hidden,
    evaluations_of,
    score_rows,
)

_SAMPLES = 2000


def train_command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="The dense model: fine-tuned on the task, only pretrained, or an embedding model."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the compressed model.")],
    task: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(TASKS)}; without it, --data is unlabelled text.")
    ] = None,
    remove: Annotated[
        float | None, typer.Option(help="Fraction of the parameters (embeddings apart) to remove.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the stream, instead of --remove.")] = None,
    student: Annotated[
        str | None, typer.Option(help="A compressed form of --model to go on with, instead of a budget.")
    ] = None,
    axes: Annotated[
        str | None, typer.Option(help="What --remove may cut: some of hidden,filters,heads; all by default.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="Training sequences to calibrate on.", min=1)] = _SAMPLES,
    distillation: Annotated[
        float, typer.Option(help="Weight of the dense model in the loss; labels get the rest.")
    ] = 0.9,
    temperature: Annotated[float, typer.Option(help="Divides the logits that are compared.")] = 2.0,
    hidden_weight: Annotated[float, typer.Option(help="Weight of the hidden states beside the logits.")] = 1.0,
    dropout: Annotated[
        bool | None,
        typer.Option(help="Of the compressed model in training; by default only where it learns from labels alone."),
    ] = None,
    pooling: PoolingOption = None,
    data: DataFolderOption = None,
    train_split: TrainSplitOption = "train",
    eval_split: EvalSplitOption = None,
    epochs: EpochsOption = 3.0,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate; by default 5e-5 on a task, 2e-4 on unlabelled text.")
    ] = None,
    batch_size: BatchSizeOption = 32,
    max_length: MaxLengthOption = None,
    train_samples: TrainSamplesOption = None,
    eval_samples: EvalSamplesOption = None,
    seed: SeedOption = 0,
    bf16: Bf16Option = False,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Keep a checkpoint of every epoch here; a run that was stopped goes on from it.")
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Calibrate, compress and fine-tune with the dense model as teacher. The last weights are kept.

    A BERT that was only pretrained is calibrated by its hidden states, and learns the task from the labels alone.

    Example: tcsp train --model bert-mrpc/ --task mrpc --remove 0.6 -o small/

    On several processes: accelerate launch -m tcsp_hf train ..., or torchrun.
    """
    if [remove, hidden_size, student].count(None) != 2:
        raise TCSPError("Give one of --remove, --hidden-size and --student.")
    if task is None and data is None:
        raise TCSPError("Give --task, or --data with unlabelled text.")
    if axes is not None and remove is None:
        raise TCSPError(f"--axes is {axes!r}, which says what --remove may cut: give --remove, or leave --axes out.")
    if student is not None and calibration_samples != _SAMPLES:
        raise TCSPError("--calibration-samples cannot go with --student, which is compressed already: leave it out.")
    for option, value in (("--eval-split", eval_split), ("--eval-samples", eval_samples)):
        if task is None and value is not None:
            raise TCSPError(f"{option} is {value!r}, but unlabelled text is not scored: give --task, or leave it out.")
    chosen = None if task is None else find_task(task)
    check_output_folder(output, overwrite)
    check_inputs(output, {"--model": model, "--student": student}, {"--data": data})
    check_outside("--checkpoints", checkpoints, output)
    rate = lr if lr is not None else (2e-4 if task is None else 5e-5)
    schedule = Schedule(epochs, rate, batch_size, max_length, seed=seed, bf16=bf16)
    bars = progress_of(quiet, as_json)
    rows: Any = load_data(str(data), train_split) if chosen is None else chosen.load(train_split, data)
    if isinstance(rows, list) and "+" in str(data):
        rows = rows[:train_samples]  # in turn of each source
    rows = choose_rows(rows, train_samples, seed)
    held_out = None if chosen is None else first_rows(chosen.load(eval_split, data), eval_samples)
    name = resolve_name(model)
    dense, untrained = load_dense(name, chosen, seed)
    tokenizer = load_tokenizer(name)
    settings = reranker_settings(name)
    started = None if student is None else load_model(student)
    if started is not None and not is_compressed(started):
        raise TCSPError(f"--student is {student!r}, which is not compressed: give its folder as --model.")
    if started is not None:
        theirs = [started.config.dense_hidden_size, started.config.num_hidden_layers, started.config.vocab_size]
        ours = [dense_hidden_size(dense), dense.config.num_hidden_layers, dense.config.vocab_size]
        if theirs != ours:
            raise TCSPError(
                f"--student {student!r} comes from a model of another size (hidden size, layers, tokens: {theirs}) "
                f"than --model ({ours})."
            )
    options: dict[str, Any] = {
        "remove": remove,
        "hidden_size": hidden_size,
        "axes": None if remove is None or axes is None else [axis.strip() for axis in axes.split(",")],
        "calibration_samples": calibration_samples,
        "distillation": 0.0 if untrained else distillation,
        "temperature": temperature,
        "hidden_weight": hidden_weight,
        "dropout": dropout,
        "pooling": pooling,
    }
    run: dict[str, Any] | None = None
    if checkpoints is not None:
        run = {
            "task": task,
            "model": model_fingerprint(dense),
            "student": None if started is None else model_fingerprint(started),
            "rows": digest_of_rows(rows),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            **options,
            **asdict(schedule),
        }
    with trained_folder(output, overwrite) as (staging, first):
        folder = staging / "trainer" if checkpoints is None else checkpoints
        saving: dict[str, Any] = {} if checkpoints is None else {"save_strategy": "epoch", "save_total_limit": 2}
        trainer = task_trainer(
            dense,
            tokenizer,
            chosen,
            rows,
            schedule,
            folder,
            quiet=bars_hidden(quiet, as_json),
            student=started,
            untrained=untrained,
            **options,
            **saving,
        )
        small, took = run_training(trainer, run)
        if not first:
            return
        if checkpoints is None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        small.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_texts(staging, settings)
        scores: dict[str, dict[str, float]] = {}
        if chosen is not None and held_out is not None:
            scored = {"compressed": small} if untrained else {"dense": dense, "compressed": small}
            for label, found in scored.items():
                scores[label] = score(found, tokenizer, chosen, held_out, max_length=max_length, progress=bars)
        summary: dict[str, Any] = {
            "model": model,
            "task": task,
            "data": data,
            "train_split": train_split,
            "train_rows": len(rows),
            "eval_split": None if chosen is None else eval_split or chosen.splits[0],
            "eval_rows": None if held_out is None else len(held_out),
            "student": student,
            "removed": removed_fraction(dense, small),
            **options,
            **asdict(schedule),
            "scores": scores,
            "seconds": round(took.seconds, 1),
            "steps": took.steps,
            "train_loss": took.loss,
        }
        (staging / "results.json").write_text(json_text(summary), encoding="utf-8")
        measured: tuple[Evaluation, ...] = ()
        if chosen is not None and data is None:
            part = None if eval_samples is None or held_out is None else len(held_out)
            measured = evaluations_of(chosen, summary["eval_split"], scores, part)
        shown = CardResults(command=command_line(context), evaluations=measured)
        write_card(staging, shown, name=output.resolve().name)
    if as_json:
        print_json({"output": str(output), **summary})
        return
    table = []
    if chosen is not None:
        columns = [dict(score_rows(chosen, found)) for found in scores.values()]
        table = [[name, *(column[name] for column in columns)] for name in columns[0]]
    note = f"{len(rows):,} training rows, {took.steps:,} steps, {took.seconds:.0f} s"
    if untrained:
        note += "; from labels alone, since the dense model was not trained on the task"
    print_table(f"{model}: {summary['removed']:.1%} removed -> {output}", ["", *scores], table, note)
