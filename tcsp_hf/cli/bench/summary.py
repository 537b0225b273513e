"""`tcsp bench summary`."""

from pathlib import Path
from typing import Annotated

import typer

from ...evaluation.summary import mean_drops, missed_bars, read_tables, summarise
from ..common import JsonOption, print_json, print_table


def summary_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of `tcsp bench quality`, one for every model and task.")
    ],
    check: Annotated[bool, typer.Option("--check", help="Exit with status 1 where a bar is missed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The tables of several tasks in one: what our method costs on each, and on the mean.

    Example: tcsp bench summary quality/mrpc quality/cola quality/rte --check
    """
    rows = summarise(read_tables(folders))
    means, missed = mean_drops(rows), missed_bars(rows)
    if as_json:
        print_json({"rows": rows, "mean_drops": means, "missed": missed})
    else:
        heads = ["task", "score", "removed", "dense", "ours", "drop", "KL", "speed-up", "best other", "least other KL"]
        cells = [
            [
                row["task"],
                row["score_name"],
                f"{row['removed']:.1%}",
                f"{100 * row['dense']:.2f}",
                f"{100 * row['score']:.2f}",
                f"{row['drop']:+.2f}",
                f"{row['distance']:.4f}",
                f"{row['speedup']:.2f}",
                "-" if row["best_other"] is None else f"{100 * row['best_other']:.2f}",
                "-" if row["least_other_distance"] is None else f"{row['least_other_distance']:.4f}",
            ]
            for row in sorted(rows, key=lambda row: row["asked"])
        ]
        means_text = ", ".join(f"{drop:+.2f} at {asked:.0%}" for asked, drop in means.items())
        print_table("Without training: points lost", heads, cells, f"Mean drop over the tasks: {means_text}.")
    if check and missed:
        for line in missed:
            typer.echo(f"Short: {line}.", err=True)
        raise typer.Exit(1)
