"""`tcsp bench load`."""

import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...evaluation.latency_models import SHAPES
from ...evaluation.load_cost import LoadCost, measure_load, models_of_one_size
from ..common import JsonOption, hide_library_bars, print_json, print_table

IMPORT_BAR, LOAD_BAR = 0.15, 1.05
"""Seconds; times the dense model's (5 % for the clock: it is meant to be no slower)."""


def load_command(
    shape: Annotated[str, typer.Option(help=f"Random weights of a known shape: {', '.join(SHAPES)}.")] = "bert-base",
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of the compressed one; half the shape's by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed processes of each kind, after one untimed.", min=1)] = 5,
    check: Annotated[bool, typer.Option("--check", help="Exit with status 1 when a bar is missed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Import and load in new processes, alternating: a compressed checkpoint beside a stock one of the same size.

    Bars: `import tcsp_hf` adds at most 0.15 s to `import transformers`; `from_pretrained` of the compressed checkpoint
    takes no longer than of the stock one, the first time in a process and later.
    """
    hide_library_bars()
    before = os.getloadavg()[0]
    dense, small = models_of_one_size(shape, hidden_size)
    loader = "AutoModelForSeq2SeqLM" if dense.can_generate() else "AutoModel"
    with tempfile.TemporaryDirectory() as folder:
        places = Path(folder) / "dense", Path(folder) / "small"
        for model, place in zip((dense, small), places, strict=True):
            model.save_pretrained(place)
        del dense, small, model
        cost = measure_load(*places, loader, rounds)
    short = missed(cost)
    machine = (
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, load {before:.1f} to "
        f"{os.getloadavg()[0]:.1f}"
    )
    if as_json:
        print_json({"shape": shape, "machine": machine, "rounds": rounds, **asdict(cost), "missed": short})
    else:
        rows = [
            ["import transformers", f"{cost.transformers:.2f} s", "", ""],
            ["import tcsp_hf after it", "", f"{cost.package:.3f} s", ""],
            ["first load", f"{cost.dense_first:.3f} s", f"{cost.small_first:.3f} s", f"{first_ratio(cost):.2f}"],
            ["later load", f"{cost.dense_again:.3f} s", f"{cost.small_again:.3f} s", f"{again_ratio(cost):.2f}"],
            ["bytes", f"{cost.dense_bytes:,}", f"{cost.small_bytes:,}", f"{cost.small_bytes / cost.dense_bytes:.2f}"],
        ]
        note = f"Medians of {rounds} processes. Bars: {IMPORT_BAR} s, {LOAD_BAR} times. {machine}"
        print_table(f"{shape}: stock and compressed", ["", "stock", "compressed", "ratio"], rows, note)
    for text in short:
        typer.echo(f"Short of the bar: {text}", err=True)
    if check and short:
        raise typer.Exit(1)


def first_ratio(cost: LoadCost) -> float:
    return cost.small_first / cost.dense_first


def again_ratio(cost: LoadCost) -> float:
    return cost.small_again / cost.dense_again


def missed(cost: LoadCost) -> list[str]:
    """The bars that were not reached."""
    found = []
    if cost.package > IMPORT_BAR:
        found.append(f"import tcsp_hf adds {cost.package:.3f} s, more than {IMPORT_BAR}")
    for name, ratio in (("the first load", first_ratio(cost)), ("a later load", again_ratio(cost))):
        if ratio > LOAD_BAR:
            found.append(f"{name} takes {ratio:.2f} times the stock model's, more than {LOAD_BAR}")
    return found
