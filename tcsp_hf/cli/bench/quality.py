"""`tcsp bench quality`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import TCSPError
from ...evaluation.comparison import Comparison
from ...evaluation.quality import (
    METHODS,
    OURS,
    PICTURE,
    RESULTS,
    TABLE,
    Plan,
    QualityFolder,
    identity_of,
    method_of,
    run_quality,
    shortfalls,
)
from ...evaluation.quality_report import cells, columns, curves, markdown, notes
from ...files import json_text, write_whole
from ...plots import pictures_possible, quality_picture
from ...tasks import TASKS, find_task
from ..common import DeviceOption, JsonOption, QuietOption, print_json, print_table, progress_of
from .common import ModelOption, RemoveOption, SeedOption, SequencesOption, TaskOption, names_of, numbers_of


def quality_command(
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the table; an unfinished one goes on.")],
    task: TaskOption = "sst2",
    remove: RemoveOption = "0.25,0.44,0.6,0.75,0.9",
    methods: Annotated[str, typer.Option(help="Which rows, with commas.")] = ",".join(METHODS),
    axes: Annotated[
        str | None, typer.Option(help="What our method may cut, with commas; all that the architecture has.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to score on; the task's own by default.")] = None,
    eval_samples: Annotated[int | None, typer.Option(help="Score only the first rows of the split.", min=1)] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Other data to calibrate on, by name; the task's training split by default.")
    ] = None,
    sequences: SequencesOption = 2000,
    seed: SeedOption = 0,
    latency: Annotated[str, typer.Option(help="Batch and length to time, with an x.")] = "8x128",
    device: DeviceOption = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the rows that the folder holds.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Exit with status 1 where a baseline beats ours in score and distance, or a bar is missed (of the "
            "README's MiniLM classifier on sst2).",
        ),
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Our method beside other ways to compress without training: same model, texts, task and counting.

    Writes results.json, table.md and pareto.png; every finished row is kept, so an interrupted run goes on. The folder
    also keeps the statistics, with a sample of the calibration's tokens.

    Example: tcsp bench quality --model my-org/my-classifier --task sst2 --remove 0.44,0.6 -o quality/
    """
    plan = Plan(
        names_of(methods),
        numbers_of("--remove", remove),
        None if axes is None else names_of(axes),
        _shape(latency),
    )
    plan.check()
    QualityFolder.check(output)
    bars = progress_of(quiet, as_json)
    split = split or (find_task(task).splits[0] if task in TASKS else "validation")
    comparison = Comparison.load(
        model, task, sequences, seed, bars, split=split, items=eval_samples, calibration=calibration, device=device
    )
    plan.check(comparison.dense)
    names = {
        "model": model,
        "task": task,
        "split": split,
        "eval_samples": eval_samples,
        "calibration": calibration or task,
    }
    identity = identity_of(comparison, plan, names)
    dense, rows = run_quality(comparison, plan, QualityFolder(output, identity, fresh), bars)
    short = shortfalls(rows, task if check else None)
    remarks = notes(dense, rows, plan.latency, short)
    title = f"{model} on {task}"
    result: dict[str, Any] = {**identity, "dense": dense, "rows": rows, "shortfalls": short}
    write_whole(output / RESULTS, json_text(result))
    write_whole(output / TABLE, markdown(title, dense, rows, remarks))
    points = curves(rows)
    if points and pictures_possible():
        milliseconds = sorted(row["dense_ms"] for row in rows if "error" not in row)
        quality_picture(
            output / PICTURE,
            points,
            (milliseconds[len(milliseconds) // 2], dense["score"]),
            dense["score_name"],
            method_of(OURS, plan.axes).title,
        )
    if as_json:
        print_json(result)
    else:
        for asked in dict.fromkeys(row["asked"] for row in rows):
            table = [cells(row) for row in rows if row["asked"] == asked]
            print_table(f"{title}, {asked:.0%} removed", columns(dense), table)
        typer.echo("\n".join(remarks))
        typer.echo(f"Written: {output}")
    if check and short:
        for line in short:
            typer.echo(f"Short: {line}.", err=True)
        raise typer.Exit(1)


def _shape(text: str) -> tuple[int, int]:
    try:
        batch, length = (int(part) for part in text.split("x"))
    except ValueError as error:
        raise TCSPError(f"--latency is {text!r}; it must be batch and length with an x, such as 8x128.") from error
    return batch, length
