"""`tcsp calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from ..calibration import calibrate
from ..data.sources import SAMPLE, load_data
from ..files import check_output_folder
from ..loading import load_model, load_tokenizer
from .common import (
    ColumnsOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    QuietOption,
    SequencesOption,
    SplitOption,
    columns_of,
    print_json,
    print_table,
    progress_of,
)


def calibrate_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the statistics.")],
    data: DataOption = SAMPLE,
    split: SplitOption = "train",
    text_columns: ColumnsOption = None,
    max_sequences: SequencesOption = 2000,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[int | None, typer.Option(help="Tokens per sequence.", min=1)] = None,
    pooling: Annotated[str, typer.Option(help="Of an embedding model: mean, cls or pooler.")] = "mean",
    fisher: Annotated[
        bool, typer.Option(help="Also collect gradients; --subspace balanced needs them (one backward pass).")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the outputs drawn from the model's own distribution.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Collect the statistics of a dense model on text, once; `tcsp compress --stats` cuts any size from them.

    Example: tcsp calibrate my-org/my-classifier --data my_texts.txt -o stats/
    """
    check_output_folder(output, overwrite)
    columns = columns_of(text_columns)
    texts = load_data(data, split)
    dense = load_model(model, dtype, device)
    stats = calibrate(
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
    )
    stats.save(output, overwrite)
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
