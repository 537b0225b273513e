"""`tcsp bench subspaces`."""

from typing import Annotated, Any

import typer

from ...compression import compress
from ...compression.request import check_request
from ...errors import TCSPError
from ...evaluation.comparison import Comparison
from ...evaluation.quality import FAILURES
from ..common import JsonOption, QuietOption, progress_of
from .common import (
    ModelOption,
    SeedOption,
    SequencesOption,
    TaskOption,
    numbers_of,
    score_columns,
    scored,
    show,
)

_WAYS = (
    ("shared", "pca", False),
    ("per_site", "pca", False),
    ("per_site", "balanced", False),
    ("per_site", "balanced", True),
)


def subspaces_command(
    model: ModelOption,
    task: TaskOption = "sst2",
    widths: Annotated[str, typer.Option(help="Hidden sizes, with commas.")] = "288,216,144,96",
    sequences: SequencesOption = 2000,
    seed: SeedOption = 0,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Exit with status 1 if the refit model loses more, at any width.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit with status 1 if the refit model is farther from dense, at any width.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hidden size alone, no training, no labels: shared PCA (the paper), per-site PCA, per-site balanced, and refit.

    Score on the validation split, and KL divergence to the dense model, for every width.
    """
    sizes = numbers_of("--widths", widths)
    if not all(size.is_integer() for size in sizes):
        raise TCSPError(f"--widths is {widths!r}; it must be whole numbers with commas.")
    bench = Comparison.load(model, task, sequences, seed, progress_of(quiet, as_json))
    ways: list[dict[str, Any]] = [
        {"hidden_size": int(size), "projection": projection, "subspace": subspace, "refit": refit}
        for size in sizes
        for projection, subspace, refit in _WAYS
    ]
    for way in ways:
        check_request(bench.dense, **way)
    rows: list[dict[str, Any]] = []
    for way in ways:
        try:
            small = compress(bench.dense, bench.stats, **way)
        except FAILURES as error:
            typer.echo(f"hidden size {way['hidden_size']}: {error}", err=True)
            rows.append({**way, "error": str(error)})
            continue
        rows.append({**way, **scored(bench, small)})
    columns = {
        "hidden_size": "hidden size",
        "removed": "removed",
        "projection": "projection",
        "subspace": "subspace",
        "refit": "refit",
    }
    show(bench, model, rows, {**columns, **score_columns(bench)}, as_json)
    dense = bench.dense_score.score
    for row in (row for row in rows if row["refit"]):
        drop = dense - row.get(bench.task.score_name, -float("inf"))
        lost = max_accuracy_drop is not None and drop > max_accuracy_drop
        if lost or (max_kl is not None and not row.get("kl", float("inf")) <= max_kl):
            typer.echo(f"Short of the bar at hidden size {row['hidden_size']}.", err=True)
            raise typer.Exit(1)
