"""`tcsp selftest`."""

import os
import platform
from collections.abc import Callable
from typing import Annotated

import torch
import transformers
import typer

from ..selftest import Sizes, Tally, run_selftest
from ..version import __version__
from .common import JsonOption, QuietOption, print_json, print_table, progress_of


def selftest_command(
    context: typer.Context,
    kills: Annotated[int, typer.Option(help="Commands killed at random moments.", min=0)] = 12,
    faults: Annotated[int, typer.Option(help="Rounds of disk full, memory limit, missing rights.", min=0)] = 6,
    configs: Annotated[int, typer.Option(help="Random configurations.", min=0)] = 2000,
    files: Annotated[int, typer.Option(help="Altered statistics and checkpoint files.", min=0)] = 400,
    cycles: Annotated[int, typer.Option(help="Load, compress, save cycles.", min=0)] = 20,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Break it on purpose: faults, bad input and long use, on tiny models made on the spot.

    Exits with status 1 where anything ended in something else than a right result or one clear error.

    Example: tcsp selftest --kills 200 --configs 100000 --files 20000 --cycles 1000
    """
    sizes = Sizes(kills, faults, configs, files, cycles)
    tallies = run_selftest(sizes, seed, _runner(context), progress_of(quiet, as_json))
    if as_json:
        print_json({"seed": seed, **_machine(), "results": [tally.as_dict() for tally in tallies]})
    else:
        _show(tallies, seed)
    if any(tally.failed for tally in tallies):
        raise typer.Exit(1)


def _runner(context: typer.Context) -> Callable[[list[str]], None]:
    """Runs another command line of this same program."""
    root = context.find_root().command

    def run(words: list[str]) -> None:
        root.main(args=words, prog_name="tcsp", standalone_mode=False)

    return run


def _machine() -> dict[str, str | int]:
    return {
        "processors": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tcsp_hf": __version__,
    }


def _show(tallies: list[Tally], seed: int) -> None:
    rows = []
    for tally in tallies:
        counts = [tally.tried, tally.right, tally.refused, tally.failed]
        rows.append([tally.what, *(f"{count:,}" for count in counts)])
    machine = ", ".join(f"{name} {value}" for name, value in _machine().items())
    columns = ["what", "tried", "right", "clear error", "failed"]
    print_table("Self-test", columns, rows, f"seed {seed}; {machine}")
    for tally in tallies:
        if tally.skipped:
            typer.echo(f"{tally.what}: skipped, {tally.skipped}")
        for name, value in tally.facts.items():
            typer.echo(f"{tally.what}: {name}: {value}")
        for failure in tally.failures:
            typer.echo(f"FAILED {tally.what}: {failure}", err=True)
