"""`tcsp compress`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration import Calibration, calibrate
from ..compression import compress, count_parameters, removed_fraction, size_table
from ..compression.request import check_request
from ..data.sources import SAMPLE, load_data
from ..errors import TCSPError
from ..export.sentence_transformer import (
    check_pooling,
    load_source,
    require_encoder,
    reranker_settings,
    save_sentence_transformer,
    tokenizer_of,
)
from ..files import check_output_folder, new_folder
from ..loading import load_model, resolve_name
from ..pooling import declared_pooling
from ..publish.card import write_card
from ..publish.results import CardResults
from .common import (
    ColumnsOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OffloadOption,
    OverwriteOption,
    QuietOption,
    SequencesOption,
    SplitOption,
    check_inputs,
    columns_of,
    command_line,
    doubt_default_data,
    print_json,
    print_table,
    progress_of,
    write_texts,
)

_SHARD_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB|TB)")
_ONE_SHARD, _SEQUENCES, _SPLIT = "50GB", 2000, "train"


def compress_command(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the compressed model.")],
    hidden_size: Annotated[int | None, typer.Option(help="Width of the stream at every site.")] = None,
    energy: Annotated[float | None, typer.Option(help="Fraction of the energy to keep at every site.")] = None,
    remove: Annotated[
        float | None, typer.Option(help="Fraction of the parameters (embeddings apart) to remove.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Fraction of the operations to keep at most.")] = None,
    latency: Annotated[
        float | None, typer.Option(help="Fraction of the dense model's time to take at most, measured here.")
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(help="What --remove, --flops and --latency may cut, of hidden,filters,heads; all by default."),
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Solve every linear again on the token sample.")
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="One size of each kind for all layers.")] = False,
    stats: Annotated[
        Path | None,
        typer.Option(help="Statistics from `tcsp calibrate`; without them, calibrates on --data first."),
    ] = None,
    projection: Annotated[
        str | None,
        typer.Option(help="per_site or shared (the paper's); per_site for BERT, shared for T5 by default."),
    ] = None,
    subspace: Annotated[str, typer.Option(help="balanced, or pca (the paper's).")] = "balanced",
    multiple_of: Annotated[int, typer.Option(help="Widths are rounded up to a multiple of this.", min=1)] = 8,
    sentence_transformer: Annotated[
        bool,
        typer.Option(
            "--sentence-transformer",
            help="Write a folder for sentence-transformers, with embeddings in the dense model's space.",
        ),
    ] = False,
    data: DataOption = SAMPLE,
    split: SplitOption = _SPLIT,
    text_columns: ColumnsOption = None,
    max_sequences: SequencesOption = _SEQUENCES,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="Of an embedding model, where it is calibrated here: mean, cls or pooler; what sentence-transformers' "
            "files beside it name by default, else the mean. With --sentence-transformer also what a plain encoder is "
            "written with.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    offload: OffloadOption = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file, as 5GB or 500MB; a larger model is written in several.")
    ] = _ONE_SHARD,
    overwrite: OverwriteOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Save a model whose outputs are far from what was predicted.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a smaller model, with its tokenizer, that AutoModel.from_pretrained loads.

    Give one of --hidden-size, --energy, --remove, --flops and --latency.

    Example: tcsp compress my-org/my-classifier --stats stats/ --remove 0.44 -o small/
    """
    if sum(value is not None for value in (hidden_size, energy, remove, flops, latency)) != 1:
        raise TCSPError("Give exactly one of --hidden-size, --energy, --remove, --flops and --latency.")
    if not _SHARD_SIZE.fullmatch(max_shard_size):
        raise TCSPError(f"--max-shard-size is {max_shard_size!r}; it must be a number with KB, MB, GB or TB, as 5GB.")
    if offload and sentence_transformer:
        raise TCSPError("--offload cannot go with --sentence-transformer, which loads the whole source itself.")
    if max_shard_size != _ONE_SHARD and sentence_transformer:
        raise TCSPError("--max-shard-size cannot go with --sentence-transformer, which writes one file: leave it out.")
    for option, value, default in (
        ("--data", data, SAMPLE),
        ("--split", split, _SPLIT),
        ("--text-columns", text_columns, None),
        ("--max-sequences", max_sequences, _SEQUENCES),
        ("--pooling", None if sentence_transformer else pooling, None),
    ):
        if stats is not None and value != default:
            raise TCSPError(
                f"{option} is {value!r}, but with --stats nothing is calibrated here: leave one of them out."
            )
    check_output_folder(output, overwrite)
    check_inputs(output, {"MODEL": model}, {"--stats": stats, "--data": data})
    columns = columns_of(text_columns)
    source = load_source(model) if sentence_transformer else None
    if sentence_transformer:
        check_pooling(pooling or "mean", source)
        if stats is not None and source is not None and pooling is not None:
            raise TCSPError(
                f"--pooling is {pooling!r}, but with --stats nothing is calibrated here, and {model!r} has a pooling "
                "of its own: leave --pooling out."
            )
    found = None if stats is None else Calibration.load(stats)
    if found is not None and source is not None:
        _check_pooling_of_statistics(found, model)
    if found is not None and found.objective.startswith("embedding-") and sentence_transformer and source is None:
        pooling = pooling or found.objective.removeprefix("embedding-")  # written from where it was read
        check_pooling(pooling, source)
    if found is None:
        doubt_default_data(context)
    texts = load_data(data, split) if found is None else None
    dense = load_model(model, dtype, device, offload)
    if sentence_transformer:
        require_encoder(dense)
    options: dict[str, Any] = {
        "hidden_size": hidden_size,
        "energy": energy,
        "remove": remove,
        "flops": flops,
        "latency": latency,
        "axes": None if axes is None else tuple(axis.strip() for axis in axes.split(",")),
        "projection": projection,
        "subspace": subspace,
        "refit": refit,
        "uniform": uniform,
        "multiple_of": multiple_of,
    }
    if found is None:
        check_request(dense, **options)
    tokenizer = tokenizer_of(source, model)
    settings = reranker_settings(model)
    if found is None:
        found = calibrate(
            dense,
            texts,
            tokenizer=tokenizer,
            max_sequences=max_sequences,
            text_columns=columns,
            fisher=subspace == "balanced",
            pooling=pooling,
            progress=progress_of(quiet, as_json),
        )
    small: Any = compress(dense, found, **options, progress=progress_of(quiet, as_json))
    if small.doubt is not None and not force:
        raise TCSPError(f"{small.doubt} Nothing was saved; --force saves it all the same.")
    small.doubt = None
    with new_folder(output, overwrite) as staging:
        if sentence_transformer:
            save_sentence_transformer(small, tokenizer, source, staging, pooling or "mean")
        else:
            small.save_pretrained(staging, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(staging)
            write_texts(staging, settings)
        write_card(staging, CardResults(command=command_line(context)), name=output.resolve().name)
    before, after = count_parameters(dense), count_parameters(small)
    if as_json:
        print_json(
            {
                "output": str(output),
                "removed": removed_fraction(dense, small),
                "parameters": {"before": before.total, "after": after.total},
                "non_embedding_parameters": {"before": before.non_embedding, "after": after.non_embedding},
                "projection": small.config.projection,
            }
        )
        return
    rows = [
        [name, f"{b:,}", f"{a:,}", f"{1 - a / b:.1%}" if b else "-"] for name, b, a in size_table(dense, small).rows
    ]
    print_table(f"{model} -> {output}", ["parameters", "before", "after", "removed"], rows)


def _check_pooling_of_statistics(stats: Calibration, model: str) -> None:
    """Raises TCSPError where statistics are of sentences read otherwise than the source reads them."""
    wanted = declared_pooling(resolve_name(model)) or "mean"
    if stats.objective.startswith("embedding-") and stats.objective != f"embedding-{wanted}":
        raise TCSPError(
            f"--stats are of {stats.objective.removeprefix('embedding-')} pooling, but {model!r} pools by {wanted}: "
            f"calibrate with --pooling {wanted}."
        )
