"""`tcsp bench latency`."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...compression.plan import AXES
from ...compression.sizes import removed_fraction
from ...configuration_tcsp import TCSPConfig
from ...configuration_tcsp_bert import TCSPBertConfig
from ...errors import TCSPError
from ...evaluation.latency import (
    BACKENDS,
    PARTS,
    GridPoint,
    check_backends,
    check_clock,
    check_length,
    latency_grid,
    parameter_bytes,
    token_bytes,
)
from ...evaluation.latency_models import (
    SHAPES,
    build,
    builder_of,
    dense_of_shape,
    even_sizes,
    one_width,
    peers_of,
    sizes_like,
)
from ...evaluation.latency_report import as_rows, columns, heads, markdown, missed, row
from ...files import check_output_file, check_output_folder, json_text, new_folder
from ...loading import DTYPES, load_model
from ...plots import PICTURES, latency_picture, pictures_possible, require_matplotlib
from ..common import (
    ClockOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    QuietOption,
    command_line,
    print_json,
    print_table,
    progress_of,
)


@dataclass(frozen=True)
class _Pair:
    """Dense and compressed, and which axes were cut."""

    name: str
    dense: PreTrainedModel
    small: PreTrainedModel
    axes: tuple[str, ...]

    @property
    def family(self) -> str:
        return "t5" if self.small.config.model_type == "tcsp_t5" else "bert"

    @property
    def removed(self) -> float:
        return removed_fraction(self.dense, self.small)


def _shape_pair(
    shape: str,
    hidden_size: int | None,
    remove: float | None,
    axes: tuple[str, ...],
    like: str | None,
    to: dict[str, Any],
) -> _Pair:
    torch.manual_seed(0)
    dense: Any = dense_of_shape(shape)
    dense = dense.to(**to)
    builder = builder_of(dense)
    if like is not None:
        config = load_model(like).config
        if not isinstance(config, TCSPBertConfig) or builder.family != "bert":
            raise TCSPError(f"--like is {like!r}; it must be a compressed BERT, and --shape a BERT's.")
        sizes, axes = sizes_like(builder, config), AXES
    elif remove is not None:
        sizes = even_sizes(builder, remove, axes)
    else:
        sizes, axes = one_width(builder, max(1, builder.full // 2) if hidden_size is None else hidden_size), ("hidden",)
    return _Pair(shape, dense, build(builder, sizes), axes)


def _checkpoint_pair(model: str, dense: str | None, dtype: str, device: str) -> _Pair:
    """A compressed checkpoint, and the dense model that it came from.

    Raises:
        TCSPError: no compressed model, or the dense one cannot be found.
    """
    small = load_model(model, dtype, device)
    config = small.config
    if not isinstance(config, TCSPConfig):
        raise TCSPError(f"--model {model!r} is no compressed model (model_type {config.model_type!r}).")
    projection = config.projection or {}
    source = dense if dense is not None else projection.get("source_model")
    if source is None:
        raise TCSPError(f"The checkpoint {model!r} does not say which dense model it came from: give --dense.")
    axes = tuple((projection.get("options") or {}).get("axes", AXES))
    return _Pair(model, load_model(source, dtype, device), small, axes)


def _integers(name: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise TCSPError(f"{name} is {text!r}; it must be integers with commas.") from error
    if min(values) < 1:
        raise TCSPError(f"{name} is {text!r}; every value must be at least 1.")
    return values


def _names(name: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    for part in found:
        if part not in allowed:
            raise TCSPError(f"{name} names {part!r}; allowed: {', '.join(allowed)}.")
    return found


def latency_command(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help=f"Random weights of a known shape: {', '.join(SHAPES)}.")] = "bert-base",
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of the compressed shape; half without --remove or --like.")
    ] = None,
    remove: Annotated[
        float | None, typer.Option(help="Fraction to remove; every axis keeps the same share in all layers.")
    ] = None,
    axes: Annotated[str, typer.Option(help="What --remove cuts, with commas.")] = ",".join(AXES),
    like: Annotated[
        str | None, typer.Option(help="A compressed BERT whose sizes, layer by layer, are scaled to the shape.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A compressed checkpoint instead of a shape.", show_default=False)
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model of --model; by default the one that it names.")
    ] = None,
    parts: Annotated[str, typer.Option(help=f"With commas: {', '.join(PARTS)} (the last two of a T5).")] = "encoder",
    batches: Annotated[str, typer.Option(help="With commas.")] = "1,8,32",
    lengths: Annotated[str, typer.Option(help="Tokens per sequence, with commas.")] = "32,128,384",
    backends: Annotated[str, typer.Option(help=f"With commas: {', '.join(BACKENDS)}.")] = "eager,sdpa",
    new_tokens: Annotated[int, typer.Option(help="Tokens that a sequence generates.", min=1)] = 32,
    peers: Annotated[
        bool, typer.Option("--peers", help="Under sdpa also: low-rank linears, filters alone, fewer layers, int8.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds of a point, at most.", min=1)] = 11,
    warmup: Annotated[int, typer.Option(help="Rounds of a point that do not count.", min=0)] = 3,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no round of a point after so long (three are timed in any case).")
    ] = None,
    clock: ClockOption = "wall",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Picture of the grid (.png, .svg, .pdf).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder: grid.json, grid.md, grid.png.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with status 1 when a bar is missed.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Dense against compressed, alternating in one run: medians and 90th percentiles over batch x length x back-end.

    Beside each the ratio of the FLOPs, which is what a perfect machine would gain (in generation: of the bytes read for
    a token). Bars: never slower than dense; a BERT's hidden size alone within 0.90 (1 x 128) or 0.95 (8 and 32 x 128,
    torch.compile) of the FLOPs ratio; all axes at 60 % removed twice as fast; a T5 at 44 % 1.5 times the tokens/s.
    """
    names = [name.strip() for name in backends.split(",")]
    check_backends(names)
    check_clock(clock, device)
    wanted = _names("--parts", parts, PARTS)
    cut = _names("--axes", axes, AXES)
    points = [(b, n) for b in _integers("--batches", batches) for n in _integers("--lengths", lengths)]
    if plot is not None:
        require_matplotlib()
        check_output_file(plot, "--plot", PICTURES)
    if output is not None:
        check_output_folder(output, False)
    if "onnx" in names and device != "cpu":
        raise TCSPError("The back-end 'onnx' runs on --device cpu only.")
    if sum(value is not None for value in (hidden_size, remove, like, model)) > 1:
        raise TCSPError("Give one of --hidden-size, --remove, --like and --model.")
    if dtype not in DTYPES or dtype == "auto":
        raise TCSPError(f"--dtype is {dtype!r}; allowed: {', '.join(name for name in DTYPES if name != 'auto')}.")
    bars = progress_of(quiet, as_json)
    if model is not None:
        pair = _checkpoint_pair(model, dense, dtype, device)
    else:
        pair = _shape_pair(shape, hidden_size, remove, cut, like, {"device": device, "dtype": DTYPES[dtype]})
    if wanted != ("encoder",) and not pair.dense.can_generate():
        raise TCSPError(f"--parts is {parts!r}, but {pair.name} has no decoder; allowed: encoder.")
    for _, length in points:
        check_length(pair.dense, length)
    models = {"dense": pair.dense, "small": pair.small, **(peers_of(pair.dense, pair.small) if peers else {})}
    grid: list[GridPoint] = []
    before = os.getloadavg()[0]
    steps = [(part, name) for part in wanted for name in names if part == "encoder" or name in ("eager", "sdpa")]
    with tqdm(total=len(points) * len(steps), unit="point", disable=None if bars is None else not bars) as bar:

        def done(point: GridPoint) -> None:
            bar.update()

        for part, name in steps:
            grid += latency_grid(models, [name], points, rounds, warmup, done, part, seconds, new_tokens, clock)
    ratios = {"encoder_bytes": parameter_bytes(pair.dense) / parameter_bytes(pair.small)}
    if "generation" in wanted:
        ratios["token_bytes"] = token_bytes(pair.dense) / token_bytes(pair.small)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{clock} clock, load {before:.1f} to {os.getloadavg()[0]:.1f}"
    )
    short = missed(grid, pair.family, pair.axes, pair.removed)
    report = {
        "model": Path(pair.name).name,
        "command": command_line(context).replace("tcsp latency", "tcsp bench latency", 1),
        "machine": machine,
        "device": device,
        "dtype": dtype,
        "axes": list(pair.axes),
        "removed": pair.removed,
        "bytes_ratio": ratios["encoder_bytes"],
        "ratios": ratios,
        "grid": as_rows(grid),
        "missed": short,
    }
    title = f"{report['model']}, {', '.join(pair.axes)}, {pair.removed:.1%} removed: dense against compressed"
    notes = [
        f"`{report['command']}`",
        f"{machine}; {device}, {dtype}; medians of up to {rounds} alternating rounds after {warmup}, seed 0",
        "bytes, dense over compressed: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()),
        *(f"short of the bar: {text}" for text in short),
    ]
    if output is not None:
        with new_folder(output) as folder:
            (folder / "grid.json").write_text(json_text(report), encoding="utf-8")
            (folder / "grid.md").write_text(markdown(title, grid, notes), encoding="utf-8")
            if pictures_possible():
                latency_picture(folder / "grid.png", grid, title)
    if plot is not None:
        latency_picture(plot, grid, title)
    if as_json:
        print_json(report)
    else:
        shown = columns(grid)
        print_table(title, heads(shown), [row(point, shown) for point in grid], "\n".join(notes[1:3]))
    for text in short:
        typer.echo(f"Short of the bar: {text}", err=True)
    if check and short:
        raise typer.Exit(1)
