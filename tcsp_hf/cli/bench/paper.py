"""`tcsp bench paper`."""

import tomllib
from pathlib import Path
from typing import Annotated

import typer

from ...errors import TCSPError
from ...train.paper import MODES, Shared, in_order, read_rows, run_row, take_known, write_grid
from ...train.paper_report import check_place, groups_of, missed_bars, picture, report, summary
from ..common import JsonOption, QuietOption, print_json, progress_of
from ..finetune import bars_hidden
from .common import names_of


def paper_command(
    rows: Annotated[Path, typer.Argument(help="A row's .toml file, or a folder of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results; rows that are there are kept.")],
    models: Annotated[
        str | None, typer.Option(help="First write a file for every model (with commas), task, fraction and mode.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Of the files to write.")] = "mrpc,rte,cola,stsb,sst2,qnli,squad",
    remove: Annotated[str, typer.Option(help="Of the files to write.")] = "0.44,0.6,0.8,0.94",
    modes: Annotated[
        str, typer.Option(help=f"Of the files to write; some of {', '.join(MODES)}.")
    ] = "retraining-free,fine-tuned,distilled",
    seeds: Annotated[str, typer.Option(help="Of the files to write.")] = "0",
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="A further field of the files to write, such as dense_epochs=5.")
    ] = None,
    known: Annotated[
        Path | None, typer.Option(help="A results.json of earlier runs: rows that it has are not run again.")
    ] = None,
    run: Annotated[bool, typer.Option(help="Run the rows; --no-run only writes their files.")] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with status 1 where a distilled model loses more than its bar.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """The paper's experiment: {models} x {tasks} x {removed} x {retraining-free, fine-tuned, distilled} x {seeds}.

    A fourth mode, from-pretrained, compresses the model before any training on the task and trains it on the labels.

    The last weights are scored: nothing is selected on the evaluation split. A stopped run goes on where it was.
    Writes results.json, README.md and, with matplotlib, results.png.

    Example: tcsp bench paper rows/ -o results/ --models google-bert/bert-base-uncased,google-t5/t5-base
    """
    if models is not None:
        try:
            fractions = [float(part) for part in remove.split(",")]
        except ValueError as error:
            raise TCSPError(f"--remove is {remove!r}; it must be numbers with commas.") from error
        try:
            drawn = [int(part) for part in seeds.split(",")]
        except ValueError as error:
            raise TCSPError(f"--seeds is {seeds!r}; it must be whole numbers with commas.") from error
        for field in fields or []:
            try:
                tomllib.loads(field)
            except tomllib.TOMLDecodeError as error:
                raise TCSPError(
                    f"--set is {field!r}; it must be name=value as TOML has it, such as lr=2e-4."
                ) from error
        write_grid(rows, names_of(models), names_of(tasks), fractions, names_of(modes), drawn, fields or [])
    chosen = in_order(read_rows(rows))
    if not run:
        if as_json:
            print_json([row.fields() for row in chosen])
        else:
            typer.echo(f"{len(chosen)} rows in {rows}")
        return
    check_place(output)
    output.mkdir(parents=True, exist_ok=True)
    if known is not None:
        taken = take_known(chosen, known, output)
        if not (quiet or as_json):
            typer.echo(f"{taken} rows taken from {known}", err=True)
    bars = progress_of(quiet, as_json)
    found, shared = [], Shared()
    for i, row in enumerate(chosen):
        if not (quiet or as_json):
            typer.echo(f"[{i + 1}/{len(chosen)}] {row.name}", err=True)
        found.append(run_row(row, output, bars_hidden(quiet, as_json), bars, shared))
        table = report(found, output)  # after every row: a stopped run leaves what it has
    try:
        picture(found, output / "results.png")
    except TCSPError:
        typer.echo("No picture: pip install 'tcsp_hf[plots]' for one.", err=True)
    if as_json:
        print_json(found)
    else:
        typer.echo(table.read_text(encoding="utf-8"))
    missed = missed_bars(summary(groups_of(found)))
    if check and missed:
        for line in missed:
            typer.echo(f"Short: {line}.", err=True)
        raise typer.Exit(1)
