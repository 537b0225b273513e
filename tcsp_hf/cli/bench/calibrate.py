"""`tcsp bench calibrate`."""

import platform
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from ...errors import TCSPError
from ...evaluation.calibration_cost import CostRow, measure_cost, memory_growth, random_classifier
from ..common import DeviceOption, JsonOption, print_json, print_table

SIGMA_BAR, BOTH_BAR, GROWTH_BAR, PROJECTION_BAR = 1.25, 1.25, 0.01, 20.0
"""Times the forward pass; times forward and backward; share of peak memory; seconds (768 wide, 12 layers)."""


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        found = [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]
    except ValueError as error:
        raise TCSPError(f"--shapes is {text!r}; it must be HIDDENxLAYERS with commas.") from error
    if any(len(shape) != 2 or min(shape) < 1 for shape in found):
        raise TCSPError(f"--shapes is {text!r}; it must be HIDDENxLAYERS with commas, both at least 1.")
    return [(shape[0], shape[1]) for shape in found]


def calibrate_bench_command(
    shapes: Annotated[str, typer.Option(help="HIDDENxLAYERS with commas; BERT classifiers of random weights.")] = (
        "384x6,768x12"
    ),
    tokens: Annotated[str, typer.Option(help="Random calibration tokens, with commas.")] = "4000",
    batch_size: Annotated[int, typer.Option(help="Sequences of 8 to 56 tokens in a batch.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that does not count.", min=1)] = 3,
    few: Annotated[int, typer.Option(help="Sequences of the smaller memory run (tiny model).", min=1)] = 1000,
    many: Annotated[int, typer.Option(help="Sequences of the larger one.", min=1)] = 10_000,
    device: DeviceOption = "cpu",
    check: Annotated[bool, typer.Option("--check", help="Exit with status 1 when a bar is missed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Seconds and peak memory of a calibration beside the plain passes over the same tokens, alternating in one run.

    Bars: Sigma 1.25 times a forward pass, Sigma and Gamma 1.25 times forward and backward (of hidden states alone), all
    eigen-problems of 768 x 12 within 20 seconds, 1 % more memory for ten times the sequences.
    """
    sizes = _shapes(shapes)
    try:
        counts = [int(part) for part in tokens.split(",")]
    except ValueError as error:
        raise TCSPError(f"--tokens is {tokens!r}; it must be integers with commas.") from error
    if min(counts) < 1:
        raise TCSPError(f"--tokens is {tokens!r}; every value must be at least 1.")
    torch.manual_seed(0)
    rows: list[CostRow] = []
    for hidden_size, layers in sizes:
        model = random_classifier(hidden_size, layers).to(device)
        rows += [measure_cost(model, count, batch_size, rounds) for count in counts]
        del model
    tiny = random_classifier(32, 2).to(device)
    small, large = memory_growth(tiny, few, many, batch_size)
    growth = large / small - 1.0
    missed = _missed(rows, growth)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}"
    if as_json:
        listed = [{**asdict(row), "sigma_ratio": row.sigma_ratio, "both_ratio": row.both_ratio} for row in rows]
        memory = {"few": few, "many": many, "few_bytes": small, "many_bytes": large, "growth": growth}
        print_json({"machine": machine, "rows": listed, "memory": memory, "missed": missed})
    else:
        columns = ["hidden x layers", "tokens", "Σ s", "/ forward", "Σ, Γ s", "/ fwd, bwd", "eigen s", "peak MiB"]
        note = (
            f"Peak memory, {few:,} to {many:,} sequences (tiny model): {growth:+.1%}. Bars: {SIGMA_BAR}, {BOTH_BAR}, "
            f"{PROJECTION_BAR:.0f} s at 768 x 12, {GROWTH_BAR:.0%}. {machine}"
        )
        print_table("Calibration beside the plain passes", columns, [_cells(row) for row in rows], note)
    for text in missed:
        typer.echo(f"Short of the bar: {text}", err=True)
    if check and missed:
        raise typer.Exit(1)


def _missed(rows: list[CostRow], growth: float) -> list[str]:
    found = []
    for row in rows:
        name = f"{row.hidden_size} x {row.layers}, {row.tokens:,} tokens"
        if row.sigma_ratio > SIGMA_BAR:
            found.append(f"{name}: Sigma costs {row.sigma_ratio:.2f} forward passes, more than {SIGMA_BAR}")
        if row.both_ratio > BOTH_BAR:
            found.append(f"{name}: Sigma and Gamma cost {row.both_ratio:.2f} passes, more than {BOTH_BAR}")
        if (row.hidden_size, row.layers) == (768, 12) and row.projection > PROJECTION_BAR:
            found.append(f"{name}: the eigen-problems took {row.projection:.1f} s, more than {PROJECTION_BAR:.0f}")
    if growth > GROWTH_BAR:
        found.append(f"peak memory grew by {growth:.1%}, more than {GROWTH_BAR:.0%}")
    return found


def _cells(row: CostRow) -> list[str]:
    return [
        f"{row.hidden_size} x {row.layers}",
        f"{row.tokens:,}",
        f"{row.sigma:.2f}",
        f"{row.sigma_ratio:.2f}",
        f"{row.both:.2f}",
        f"{row.both_ratio:.2f}",
        f"{row.projection:.2f}",
        f"{row.peak_bytes / 2**20:,.0f}",
    ]
