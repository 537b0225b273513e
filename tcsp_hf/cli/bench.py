"""`tcsp bench`: the commands behind the figures."""

from typing import Annotated, Any

import typer

from ..calibration import calibrate
from ..compression import compress, removed_fraction
from ..data.sources import load_data
from ..errors import TCSPError
from ..evaluation.classification import compare, predict
from ..loading import load_model, load_tokenizer
from .common import JsonOption, QuietOption, print_json, print_table, progress_of

bench_app = typer.Typer(help="Measure: the commands behind the figures of the README.", no_args_is_help=True)

_WAYS = (("shared", "pca"), ("per_site", "pca"), ("per_site", "balanced"))


@bench_app.command("subspaces")
def subspaces_command(
    model: Annotated[str, typer.Option(help="A fine-tuned BERT sentence classifier: a folder or a Hub name.")],
    task: Annotated[str, typer.Option(help="Its data: a GLUE task, or a folder with both splits.")] = "sst2",
    widths: Annotated[str, typer.Option(help="Hidden sizes, with commas.")] = "288,216,144,96",
    sequences: Annotated[int, typer.Option(help="Calibration sentences, from the training split.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration sentences and of the drawn outputs.")] = 0,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Exit with status 1 if per-site balanced loses more, at any width.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit with status 1 if per-site balanced is farther from dense, at any width.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hidden size alone, no training, no labels: the paper's shared PCA, per-site PCA, and per-site balanced.

    Accuracy on the validation split, and KL divergence to the dense model, for every width.
    """
    try:
        sizes = [int(width) for width in widths.split(",")]
    except ValueError as error:
        raise TCSPError(f"--widths is {widths!r}; it must be integers with commas.") from error
    bars = progress_of(quiet, as_json)
    train, validation = load_data(task, "train"), load_data(task, "validation")
    dense, tokenizer = load_model(model), load_tokenizer(model)
    chosen = train.shuffle(seed=seed).select(range(min(sequences, len(train))))
    stats = calibrate(dense, chosen, tokenizer=tokenizer, max_length=128, seed=seed, progress=bars)
    columns = [name for name in ("sentence", "sentence1", "sentence2", "question") if name in validation.column_names]
    texts: list[Any] = list(validation[columns[0]])
    if len(columns) == 2:
        texts = list(zip(texts, validation[columns[1]], strict=True))
    labels = list(validation["label"])
    reference = predict(dense, tokenizer, texts, progress=bars, description="dense")
    dense_score = compare(reference, reference, labels)

    rows: list[dict[str, Any]] = []
    for size in sizes:
        for projection, subspace in _WAYS:
            small = compress(dense, stats, hidden_size=size, projection=projection, subspace=subspace)
            logits = predict(small, tokenizer, texts, progress=bars, description=f"{size} {projection} {subspace}")
            score = compare(reference, logits, labels)
            rows.append(
                {
                    "hidden_size": size,
                    "projection": projection,
                    "subspace": subspace,
                    "removed": removed_fraction(dense, small),
                    "accuracy": score.accuracy,
                    "kl": score.kl,
                    "agreement": score.agreement,
                }
            )
    if as_json:
        print_json({"model": model, "task": task, "dense_accuracy": dense_score.accuracy, "rows": rows})
    else:
        print_table(
            f"{model} on {task}: dense accuracy {dense_score.accuracy:.4f} ({len(texts)} sentences)",
            ["hidden size", "removed", "subspace", "accuracy", "KL to dense", "agreement"],
            [
                [
                    str(row["hidden_size"]),
                    f"{row['removed']:.1%}",
                    f"{row['projection']} {row['subspace']}",
                    f"{row['accuracy']:.4f}",
                    f"{row['kl']:.4f}",
                    f"{row['agreement']:.4f}",
                ]
                for row in rows
            ],
            f"{stats.sequences:,} calibration sentences, {stats.tokens:,} tokens, seed {seed}; float32",
        )
    ours = [row for row in rows if row["subspace"] == "balanced"]
    failed = [
        row
        for row in ours
        if (max_accuracy_drop is not None and dense_score.accuracy - row["accuracy"] > max_accuracy_drop)
        or (max_kl is not None and row["kl"] > max_kl)
    ]
    if failed:
        typer.echo(f"Short of the bar at hidden size {failed[0]['hidden_size']}.", err=True)
        raise typer.Exit(1)
