"""`tcsp bench calibrate`."""

import os
import platform
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from ...errors import TCSPError
from ...evaluation.calibration_cost import CostRow, measure_cost, memory_growth, random_classifier
from ...evaluation.calibration_ranks import RanksResult, measure_ranks
from ...evaluation.latency import check_clock
from ..common import ClockOption, DeviceOption, JsonOption, print_json, print_table

SIGMA_BAR, BOTH_BAR, GROWTH_BAR, PROJECTION_BAR = 1.25, 1.25, 0.01, 20.0
"""Times the forward pass; times forward and backward; share of peak memory; seconds (768 wide, 12 layers)."""
RANKS_BAR = 1.7
"""Tokens per second of two processes with one thread each, over those of one."""


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
    ranks: Annotated[
        int, typer.Option(help="Also on so many processes with one thread each; they need as many free cores.", min=1)
    ] = 1,
    ranks_only: Annotated[bool, typer.Option("--ranks-only", help="Nothing else.")] = False,
    clock: ClockOption = "wall",
    device: DeviceOption = "cpu",
    check: Annotated[bool, typer.Option("--check", help="Exit with status 1 when a bar is missed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Seconds and peak memory of a calibration beside the plain passes over the same tokens, alternating in one run.

    Bars: Sigma 1.25 times a forward pass, Sigma and Gamma 1.25 times forward and backward (of hidden states alone), all
    eigen-problems of 768 x 12 within 20 seconds, 1 % more memory for ten times the sequences; two processes 1.7 times
    the tokens per second of one, with the same projections to the last bit.
    """
    sizes = _shapes(shapes)
    try:
        counts = [int(part) for part in tokens.split(",")]
    except ValueError as error:
        raise TCSPError(f"--tokens is {tokens!r}; it must be integers with commas.") from error
    if min(counts) < 1:
        raise TCSPError(f"--tokens is {tokens!r}; every value must be at least 1.")
    check_clock(clock, device)
    if ranks_only and ranks < 2:
        raise TCSPError("--ranks-only needs --ranks of at least 2.")
    torch.manual_seed(0)
    before = os.getloadavg()[0]
    rows: list[CostRow] = []
    memory: dict[str, float] | None = None
    if not ranks_only:
        for hidden_size, layers in sizes:
            model = random_classifier(hidden_size, layers).to(device)
            rows += [measure_cost(model, count, batch_size, rounds, clock) for count in counts]
            del model
        small, large = memory_growth(random_classifier(32, 2).to(device), few, many, batch_size)
        memory = {"few": few, "many": many, "few_bytes": small, "many_bytes": large, "growth": large / small - 1.0}
    several: list[RanksResult] = []
    if ranks > 1:
        several = [measure_ranks(*size, count, batch_size, ranks, rounds) for size in sizes for count in counts]
    missed = _missed(rows, memory["growth"] if memory else 0.0) + _missed_ranks(several)
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}, {clock} clock, "
        f"load {before:.1f} to {os.getloadavg()[0]:.1f}"
    )
    if as_json:
        listed = [{**asdict(row), "sigma_ratio": row.sigma_ratio, "both_ratio": row.both_ratio} for row in rows]
        shared = [{**asdict(found), "gain": found.gain} for found in several]
        print_json({"machine": machine, "rows": listed, "memory": memory, "ranks": shared, "missed": missed})
    else:
        if memory is not None:
            columns = ["hidden x layers", "tokens", "Σ s", "/ forward", "Σ, Γ s", "/ fwd, bwd", "eigen s", "peak MiB"]
            note = (
                f"Peak memory, {few:,} to {many:,} sequences (tiny model): {memory['growth']:+.1%}. Bars: {SIGMA_BAR}, "
                f"{BOTH_BAR}, {PROJECTION_BAR:.0f} s at 768 x 12, {GROWTH_BAR:.0%}. {machine}"
            )
            print_table("Calibration beside the plain passes", columns, [_cells(row) for row in rows], note)
        if several:
            columns = ["hidden x layers", "tokens", "1 process s", f"{ranks} processes s", "gain", "bit-equal", "off"]
            note = f"One thread each; 'off': to one process's projectors, largest entry. Bar: {RANKS_BAR}. {machine}"
            print_table("Calibration on several processes", columns, [_ranks_cells(found) for found in several], note)
    for text in missed:
        typer.echo(f"Short of the bar: {text}", err=True)
    if check and missed:
        raise typer.Exit(1)


def _missed_ranks(several: list[RanksResult]) -> list[str]:
    found = []
    for one in several:
        name = f"{one.hidden_size} x {one.layers}, {one.tokens:,} tokens, {one.ranks} processes"
        if one.ranks == 2 and one.gain < RANKS_BAR:
            found.append(f"{name}: {one.gain:.2f} times the tokens per second of one, less than {RANKS_BAR}")
        if not one.agree:
            found.append(f"{name}: their projections differ")
    return found


def _ranks_cells(one: RanksResult) -> list[str]:
    return [
        f"{one.hidden_size} x {one.layers}",
        f"{one.tokens:,}",
        f"{one.one:.2f}",
        f"{one.many:.2f}",
        f"{one.gain:.2f}",
        "yes" if one.agree else "no",
        f"{one.off:.1e}",
    ]


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
