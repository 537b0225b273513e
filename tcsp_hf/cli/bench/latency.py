"""`tcsp bench latency`."""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5EncoderModel

from ...configuration_tcsp import TCSPConfig
from ...configuration_tcsp_bert import TCSPBertConfig
from ...configuration_tcsp_t5 import TCSPT5Config
from ...errors import TCSPError
from ...evaluation.latency import BACKENDS, GridPoint, check_backends, latency_grid, parameter_bytes
from ...loading import load_model
from ...modeling_tcsp_bert import TCSPBertModel
from ...modeling_tcsp_t5 import TCSPT5EncoderModel
from ...plots import latency_picture, require_matplotlib
from ..common import DeviceOption, JsonOption, QuietOption, print_json, print_table, progress_of

SHAPES = ("bert-base", "t5-base", "tiny")
_SIZES = {"bert-base": (768, 12, 12, 3072), "t5-base": (768, 12, 12, 3072), "tiny": (32, 2, 2, 64)}
"""Hidden size, layers, heads, feed-forward neurons."""


def random_pair(shape: str, hidden_size: int | None) -> tuple[Any, Any]:
    """A dense encoder of a known shape and its compressed form of one width (half by default), with random weights.

    Raises:
        TCSPError: an unknown shape, or a width that is not below the dense one.
    """
    if shape not in SHAPES:
        raise TCSPError(f"--shape is {shape!r}; allowed: {', '.join(SHAPES)}.")
    full, layers, heads, neurons = _SIZES[shape]
    width = full // 2 if hidden_size is None else hidden_size
    if not 1 <= width <= full:
        raise TCSPError(f"--hidden-size is {hidden_size}; allowed: 1 to {full}.")
    if shape == "t5-base":
        fields: dict[str, Any] = {"d_kv": full // heads, "d_ff": neurons, "num_layers": layers, "num_heads": heads}
        dense_t5 = T5EncoderModel(T5Config(d_model=full, is_encoder_decoder=False, **fields))
        small_t5 = TCSPT5EncoderModel(
            TCSPT5Config(d_model=width, source_hidden_size=full, is_encoder_decoder=False, **fields)
        )
        return dense_t5.eval(), small_t5.eval()
    bert: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": neurons}
    small = TCSPBertConfig(hidden_size=width, source_hidden_size=full, head_dim=full // heads, **bert)
    return BertModel(BertConfig(hidden_size=full, **bert)).eval(), TCSPBertModel(small).eval()


def checkpoint_pair(model: str, dense: str | None, device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A compressed checkpoint, and the dense model that it came from.

    Raises:
        TCSPError: no compressed model, or the dense one cannot be found.
    """
    small = load_model(model, "float32", device)
    config = small.config
    if not isinstance(config, TCSPConfig):
        raise TCSPError(f"--model {model!r} is no compressed model (model_type {config.model_type!r}).")
    source = dense if dense is not None else (config.projection or {}).get("source_model")
    if source is None:
        raise TCSPError(f"The checkpoint {model!r} does not say which dense model it came from: give --dense.")
    return load_model(source, "float32", device), small


def _integers(name: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise TCSPError(f"{name} is {text!r}; it must be integers with commas.") from error
    if min(values) < 1:
        raise TCSPError(f"{name} is {text!r}; every value must be at least 1.")
    return values


def latency_command(
    shape: Annotated[str, typer.Option(help=f"Random weights of a known shape: {', '.join(SHAPES)}.")] = "bert-base",
    hidden_size: Annotated[int | None, typer.Option(help="Width of the compressed shape; half by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A compressed checkpoint instead of a shape.", show_default=False)
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model of --model; by default the one that it names.")
    ] = None,
    batches: Annotated[str, typer.Option(help="With commas.")] = "1,8,32",
    lengths: Annotated[str, typer.Option(help="Tokens per sequence, with commas.")] = "32,128,384",
    backends: Annotated[str, typer.Option(help=f"With commas: {', '.join(BACKENDS)}.")] = "eager,sdpa",
    rounds: Annotated[int, typer.Option(help="Timed rounds of a point.", min=1)] = 11,
    warmup: Annotated[int, typer.Option(help="Rounds of a point that do not count.", min=0)] = 3,
    device: DeviceOption = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Picture of the grid (.png, .svg, .pdf).")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Dense against compressed, alternating in one run: medians and 90th percentiles over batch x length x back-end.

    Beside each the ratio of the FLOPs, which is what a perfect machine would gain, and the ratio of the bytes.
    Encoders only.
    """
    names = [name.strip() for name in backends.split(",")]
    check_backends(names)
    points = [(b, n) for b in _integers("--batches", batches) for n in _integers("--lengths", lengths)]
    if plot is not None:
        require_matplotlib()
        if plot.exists():
            raise TCSPError(f"{plot} exists: name another file.")
    if "onnx" in names and device != "cpu":
        raise TCSPError("The back-end 'onnx' runs on --device cpu only.")
    bars = progress_of(quiet, as_json)
    torch.manual_seed(0)
    if model is not None:
        pair = checkpoint_pair(model, dense, device)
    else:
        made = random_pair(shape, hidden_size)
        pair = made[0].to(device), made[1].to(device)
    with tqdm(total=len(points) * len(names), unit="point", disable=None if bars is None else not bars) as bar:

        def done(point: GridPoint) -> None:
            bar.update()

        grid = latency_grid(pair[0], pair[1], names, points, rounds, warmup, done)
    byte_ratio = parameter_bytes(pair[0]) / parameter_bytes(pair[1])
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    name = model if model is not None else shape
    if plot is not None:
        latency_picture(plot, grid, name)
    if as_json:
        rows: list[dict[str, Any]] = [{**asdict(point), "speedup": point.speedup} for point in grid]
        print_json({"model": name, "machine": machine, "device": device, "bytes_ratio": byte_ratio, "grid": rows})
        return
    print_table(
        f"{name}: dense against compressed on {device}",
        ["back-end", "batch x length", "dense ms (p90)", "compressed ms (p90)", "speed-up", "FLOPs ratio", "of ideal"],
        [_row(point) for point in grid],
        f"Medians of {rounds} alternating rounds after {warmup}; {machine}; bytes ratio {byte_ratio:.2f}",
    )


def _row(point: GridPoint) -> list[str]:
    return [
        point.backend,
        f"{point.batch} x {point.length}",
        f"{point.dense.median:.2f} ({point.dense.p90:.2f})",
        f"{point.small.median:.2f} ({point.small.p90:.2f})",
        f"{point.speedup:.2f}",
        f"{point.ideal:.2f}",
        f"{point.speedup / point.ideal:.0%}",
    ]
