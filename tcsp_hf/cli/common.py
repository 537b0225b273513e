"""What the commands share: options, tables, output."""

import logging
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import torch.distributed as dist
import transformers
import typer
from rich.console import Console
from rich.table import Table

from ..errors import TCSPError
from ..files import json_text, new_folder
from ..loading import resolve_name
from ..publish.card import shown_path

logger = logging.getLogger("tcsp_hf")

ModelArgument = Annotated[str, typer.Argument(help="Name on the Hub, or a folder.", show_default=False)]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="Text to calibrate on: a file (.parquet, .json, .csv, .txt), a folder of splits, a GLUE task (sst2), "
        "squad, a Hub dataset (owner/name or owner/name:config), squad-mix (short texts out of SQuAD), or squad-sample "
        "(carried in the package); several joined with +. Labels are never read.",
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split of the data.")]
ColumnsOption = Annotated[
    str | None,
    typer.Option("--text-columns", help="One or two column names, with a comma; found by name otherwise."),
]
SequencesOption = Annotated[
    int, typer.Option("--max-sequences", help="Calibrate on the first ones: shuffle what is sorted.", min=1)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of a table.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it is not empty.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's own).")]
ClockOption = Annotated[
    str,
    typer.Option(help="wall, or cpu: the processor's seconds on one thread, for ratios on a machine that is shared."),
]
PoolingOption = Annotated[
    str | None,
    typer.Option(
        help="Of an embedding model: mean, cls or pooler; what sentence-transformers' files beside it name by default, "
        "else the mean.",
        show_default=False,
    ),
]
OffloadOption = Annotated[
    bool,
    typer.Option(
        "--offload",
        help="Leave the dense weights in their safetensors files and read each layer when its turn comes: slower, for "
        "models that do not fit in memory.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]


def hide_library_bars() -> None:
    """No progress bars from transformers and datasets."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def progress_of(quiet: bool, as_json: bool = False) -> bool | None:
    """False: no bars, other libraries' included; None: bars on a terminal only."""
    if quiet or as_json:
        hide_library_bars()
        return False
    return None


def command_line(context: typer.Context) -> str:
    """The command as it can be typed again: what was given, without what is the default anyway.

    Of an absolute path the last part is shown: the line goes into model cards.
    """
    words, options = [], []
    for parameter in context.command.params:
        value, default = context.params.get(parameter.name or ""), parameter.get_default(context)
        if parameter.param_type_name == "argument":
            words.append(shown_path(str(value)))
        elif value == default or (value is False and not parameter.secondary_opts):
            continue
        elif isinstance(value, bool):
            options.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            parts = str(value).split("+") if parameter.name == "data" else [str(value)]
            options += [parameter.opts[0], "+".join(shown_path(part) for part in parts)]
    return shlex.join(["tcsp", context.info_name or "", *words, *options])


@contextmanager
def trained_folder(path: Path, overwrite: bool) -> Iterator[tuple[Path, bool]]:
    """Where a training writes, and whether this process is the first of those that torchrun started.

    The first one fills a `new_folder`; what the others write goes away. At the end they leave their group, which the
    Trainer made them join: a process that ends in it can take its threads down with an abort.
    """
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            with new_folder(path, overwrite) as staging:
                yield staging, True
        else:
            with tempfile.TemporaryDirectory(prefix="tcsp-") as folder:
                yield Path(folder), False
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def columns_of(value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if not 1 <= len(names) <= 2 or not all(names):
        raise TCSPError(f"--text-columns is {value!r}; it must be one or two names separated by a comma.")
    return names


def check_outside(option: str, folder: Path | None, output: Path) -> None:
    """Refuse a folder to go on from that lies in the output folder, whose content is replaced at the end."""
    if folder is not None and output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise TCSPError(f"{option} {folder} is in --output {output}, which is written anew: name another one.")


def check_inputs(output: Path, models: dict[str, str | None], others: dict[str, str | Path | None]) -> None:
    """Refuse local inputs in the output folder, which --overwrite would delete with all else that it holds.

    Args:
        models: by option; one may be the output folder itself, and is replaced then.
        others: statistics and data, by option.
    """
    place = output.expanduser().resolve()
    for option, value in (models | others).items():
        names = [] if value is None else [str(value), *str(value).split("+")]  # sources of data
        for path in (Path(resolve_name(name)).resolve() for name in names):
            if path.exists() and (place in path.parents or (path == place and option not in models)):
                raise TCSPError(
                    f"{option} {value} is in the output folder {output}, which is written anew: name another one."
                )


def doubt_default_data(context: typer.Context) -> None:
    """Say, where --data was left out, that other texts may serve the model better."""
    source = context.get_parameter_source("data")
    if source is not None and source.name == "DEFAULT":
        logger.warning(
            "Calibrating on the package's English sentences from Wikipedia: --data with some 2,000 texts such as the "
            "model meets loses less."
        )


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Files (name -> text) into a folder."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def this_machine() -> str:
    """What a card says that times were measured on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def print_json(value: Any) -> None:
    """Print what any program reads."""
    sys.stdout.write(json_text(value))


def print_table(title: str, columns: list[str], rows: list[list[str]], note: str | None = None) -> None:
    """A table on standard output; every column but the first is right-aligned. Without rows, its title and note."""
    if not rows:
        typer.echo(title if note is None else f"{title}\n{note}")
        return
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table)


def folder_bytes(folder: Path, pattern: str = "*.safetensors") -> int:
    """Size of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.glob(pattern))
