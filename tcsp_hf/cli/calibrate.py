"""`tcsp calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from ..calibration import calibrate_on_ranks
from ..calibration.checkpoint import remove_checkpoint
from ..calibration.ranks import device_of_this_process, launched
from ..calibration.statistics import check_statistics_folder
from ..data.sources import SAMPLE, load_data
from ..loading import load_model, load_tokenizer
from .common import (
    ColumnsOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OffloadOption,
    OverwriteOption,
    PoolingOption,
    QuietOption,
    SequencesOption,
    SplitOption,
    check_outside,
    columns_of,
    doubt_default_data,
    print_json,
    print_table,
    progress_of,
)


def calibrate_command(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the statistics.")],
    data: DataOption = SAMPLE,
    split: SplitOption = "train",
    text_columns: ColumnsOption = None,
    max_sequences: SequencesOption = 2000,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[int | None, typer.Option(help="Tokens per sequence.", min=1)] = None,
    pooling: PoolingOption = None,
    fisher: Annotated[
        bool, typer.Option(help="Also collect gradients; --subspace balanced needs them (one backward pass).")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the outputs drawn from the model's own distribution.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    offload: OffloadOption = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder where the sums are written as they grow; the same command goes on from there after a kill. "
            "Removed at the end."
        ),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Batches between two writes.", min=1)] = 64,
    sites: Annotated[
        str | None,
        typer.Option(
            help="Sites to collect, names or patterns with commas (layer.0.*); all by default.", show_default=False
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Collect the statistics of a dense model on text, once; `tcsp compress --stats` cuts any size from them.

    Example: tcsp calibrate my-org/my-classifier --data my_texts.txt -o stats/

    On several processes, each with its share of the data: accelerate launch -m tcsp_hf calibrate ..., or torchrun.
    """
    check_statistics_folder(output, overwrite)
    check_outside("--checkpoint", checkpoint, output)
    columns = columns_of(text_columns)
    with launched() as first:
        if first:
            doubt_default_data(context)
        texts = load_data(data, split)
        dense = load_model(model, dtype, device_of_this_process(device), offload)
        stats = calibrate_on_ranks(
            dense,
            texts,
            tokenizer=load_tokenizer(model),
            batch_size=batch_size,
            max_length=max_length,
            max_sequences=max_sequences,
            text_columns=columns,
            pooling=pooling,
            fisher=fisher,
            seed=seed,
            progress=progress_of(quiet, as_json),
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            sites=None if sites is None else [name.strip() for name in sites.split(",")],
        )
    if not first:
        return
    stats.save(output, overwrite)
    if checkpoint is not None:
        remove_checkpoint(checkpoint)
    if as_json:
        print_json(
            {
                "output": str(output),
                "objective": stats.objective,
                "sites": len(stats.sites),
                **stats.summary(),
            }
        )
        return
    rows = [
        ["sequences", f"{stats.sequences:,}"],
        ["tokens", f"{stats.tokens:,}"],
        ["sites", str(len(stats.sites))],
        ["gradients of", stats.objective],
        ["data fingerprint", stats.data_fingerprint],
    ]
    print_table(f"Statistics of {model} in {output}", ["", "value"], rows)
