"""`tcsp bench budget`."""

import time
from typing import Annotated, Any

import typer

from ...compression import Search, compress
from ...compression.request import check_request
from ...errors import TCSPError
from ...evaluation.comparison import Comparison
from ...evaluation.latency import compare_latency
from ...evaluation.quality import FAILURES
from ..common import JsonOption, QuietOption, progress_of
from .common import (
    ModelOption,
    RemoveOption,
    SeedOption,
    SequencesOption,
    TaskOption,
    names_of,
    numbers_of,
    score_columns,
    scored,
    show,
)


def budget_command(
    model: ModelOption,
    task: TaskOption = "sst2",
    remove: RemoveOption = "0.25,0.44,0.6,0.75,0.9",
    axes: Annotated[str, typer.Option(help="What may be cut, with commas.")] = "hidden,filters,heads",
    sequences: SequencesOption = 2000,
    seed: SeedOption = 0,
    max_kl: Annotated[
        str | None, typer.Option(help="One bar for each fraction, with commas: exit with status 1 above it.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """One budget over hidden size, filters and heads, with the closed-form refit: no training, no labels.

    Predicted and measured KL to the dense model, score on the validation split, latency against dense.
    """
    fractions = numbers_of("--remove", remove)
    limits = numbers_of("--max-kl", max_kl) if max_kl is not None else [float("inf")] * len(fractions)
    if len(limits) != len(fractions):
        raise TCSPError(f"--max-kl has {len(limits)} bars for {len(fractions)} fractions.")
    bars = progress_of(quiet, as_json)
    bench = Comparison.load(model, task, sequences, seed, bars)
    chosen = names_of(axes)
    for fraction in fractions:
        check_request(bench.dense, remove=fraction, axes=chosen)
    length = min(128, getattr(bench.dense.config, "max_position_embeddings", 128))
    rows: list[dict[str, Any]] = []
    search = Search()
    for fraction in fractions:
        stats = bench.stats
        started, searched = time.perf_counter(), search.seconds
        try:
            small = compress(bench.dense, stats, remove=fraction, axes=chosen, search=search, progress=bars)
        except FAILURES as error:
            typer.echo(f"{fraction:.0%}: {error}", err=True)
            rows.append({"asked": fraction, "error": str(error)})
            continue
        seconds = time.perf_counter() - started + (searched if search.seconds == searched else 0.0)
        latency = compare_latency(bench.dense, small, 8, length)
        predicted = small.config.projection["options"].get("predicted_kl")
        row = {"asked": fraction, "predicted_kl": predicted, "seconds": seconds, f"speedup_8x{length}": latency.speedup}
        rows.append({**row, **scored(bench, small)})
    columns = {
        "asked": "asked",
        "removed": "removed",
        **score_columns(bench),
        "predicted_kl": "predicted KL",
        f"speedup_8x{length}": f"8 x {length} tokens",
        "seconds": "seconds",
    }
    show(bench, model, rows, columns, as_json)
    for row, limit in zip(rows, limits, strict=True):
        if max_kl is not None and not row.get("kl", float("inf")) <= limit:
            found = f"KL {row['kl']:.4f} > {limit}" if "kl" in row else "nothing was made"
            typer.echo(f"Short of the bar at {row['asked']:.0%}: {found}.", err=True)
            raise typer.Exit(1)
