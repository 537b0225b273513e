"""`tcsp bench`: the commands behind the figures."""

import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from ..calibration import Calibration, calibrate
from ..compression import compress, removed_fraction
from ..data.sources import load_data
from ..errors import TCSPError
from ..evaluation.classification import compare, predict
from ..evaluation.latency import compare_latency
from ..loading import load_model, load_tokenizer
from .bench_latency import latency_command
from .common import JsonOption, QuietOption, print_json, print_table, progress_of

bench_app = typer.Typer(help="Measure: the commands behind the figures of the README.", no_args_is_help=True)
bench_app.command("latency")(latency_command)

_WAYS = (("shared", "pca"), ("per_site", "pca"), ("per_site", "balanced"))


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise TCSPError(f"{name} is {text!r}; it must be numbers with commas.") from error


@dataclass
class _Classifier:
    """A dense classifier, its statistics, and the validation sentences to score compressed ones on."""

    dense: PreTrainedModel
    tokenizer: Any
    stats: Calibration
    texts: list[Any]
    labels: list[int]
    reference: torch.Tensor
    seconds: float
    note: str

    @classmethod
    def load(cls, model: str, task: str, sequences: int, seed: int, bars: bool | None) -> "_Classifier":
        train, validation = load_data(task, "train"), load_data(task, "validation")
        columns = [n for n in ("sentence", "sentence1", "sentence2", "question") if n in validation.column_names]
        if not columns or "label" not in validation.column_names:
            raise TCSPError(f"{task!r} has the columns {validation.column_names}: no sentences and labels to score on.")
        dense, tokenizer = load_model(model), load_tokenizer(model)
        chosen = train.shuffle(seed=seed).select(range(min(sequences, len(train))))
        started = time.perf_counter()
        stats = calibrate(dense, chosen, tokenizer=tokenizer, max_length=128, seed=seed, progress=bars)
        seconds = time.perf_counter() - started
        texts: list[Any] = list(validation[columns[0]])
        if len(columns) == 2:
            texts = list(zip(texts, validation[columns[1]], strict=True))
        reference = predict(dense, tokenizer, texts, progress=bars, description="dense")
        note = (
            f"{stats.sequences:,} calibration sentences, {stats.tokens:,} tokens, no labels, seed {seed}, "
            f"calibrated in {seconds:.0f} s; float32 on {torch.get_num_threads()} threads"
        )
        return cls(dense, tokenizer, stats, texts, list(validation["label"]), reference, seconds, note)

    @property
    def accuracy(self) -> float:
        return compare(self.reference, self.reference, self.labels).accuracy

    def score(self, small: PreTrainedModel, bars: bool | None) -> dict[str, Any]:
        logits = predict(small, self.tokenizer, self.texts, progress=bars, description="compressed")
        score = compare(self.reference, logits, self.labels)
        return {
            "removed": removed_fraction(self.dense, small),
            "accuracy": score.accuracy,
            "kl": score.kl,
            "agreement": score.agreement,
        }


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
    sizes = [int(width) for width in _numbers("--widths", widths)]
    bars = progress_of(quiet, as_json)
    bench = _Classifier.load(model, task, sequences, seed, bars)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for projection, subspace in _WAYS:
            small = compress(bench.dense, bench.stats, hidden_size=size, projection=projection, subspace=subspace)
            row = {"hidden_size": size, "projection": projection, "subspace": subspace}
            rows.append({**row, **bench.score(small, bars)})
    if as_json:
        print_json({"model": model, "task": task, "dense_accuracy": bench.accuracy, "rows": rows})
    else:
        print_table(
            f"{model} on {task}: dense accuracy {bench.accuracy:.4f} ({len(bench.texts)} sentences)",
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
            bench.note,
        )
    ours = [row for row in rows if row["subspace"] == "balanced"]
    failed = [
        row
        for row in ours
        if (max_accuracy_drop is not None and bench.accuracy - row["accuracy"] > max_accuracy_drop)
        or (max_kl is not None and row["kl"] > max_kl)
    ]
    if failed:
        typer.echo(f"Short of the bar at hidden size {failed[0]['hidden_size']}.", err=True)
        raise typer.Exit(1)


@bench_app.command("budget")
def budget_command(
    model: Annotated[str, typer.Option(help="A fine-tuned BERT sentence classifier: a folder or a Hub name.")],
    task: Annotated[str, typer.Option(help="Its data: a GLUE task, or a folder with both splits.")] = "sst2",
    remove: Annotated[str, typer.Option(help="Fractions to remove, with commas.")] = "0.25,0.44,0.6,0.75,0.9",
    axes: Annotated[str, typer.Option(help="What may be cut, with commas.")] = "hidden,filters,heads",
    sequences: Annotated[int, typer.Option(help="Calibration sentences, from the training split.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration sentences and of the drawn outputs.")] = 0,
    max_kl: Annotated[
        str | None, typer.Option(help="One bar for each fraction, with commas: exit with status 1 above it.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """One budget over hidden size, filters and heads, with the closed-form refit: no training, no labels.

    Predicted and measured KL to the dense model, accuracy on the validation split, latency against dense.
    """
    fractions = _numbers("--remove", remove)
    limits = _numbers("--max-kl", max_kl) if max_kl is not None else [float("inf")] * len(fractions)
    if len(limits) != len(fractions):
        raise TCSPError(f"--max-kl has {len(limits)} bars for {len(fractions)} fractions.")
    bars = progress_of(quiet, as_json)
    bench = _Classifier.load(model, task, sequences, seed, bars)
    rows: list[dict[str, Any]] = []
    for fraction in fractions:
        started = time.perf_counter()
        small = compress(bench.dense, bench.stats, remove=fraction, axes=axes.split(","), progress=bars)
        seconds = time.perf_counter() - started
        latency = compare_latency(bench.dense, small, 8, 128)
        predicted = small.config.projection["options"].get("predicted_kl")
        row = {"asked": fraction, "predicted_kl": predicted, "seconds": seconds, "speedup_8x128": latency.speedup}
        rows.append({**row, **bench.score(small, bars)})
    if as_json:
        print_json({"model": model, "task": task, "dense_accuracy": bench.accuracy, "rows": rows})
    else:
        print_table(
            f"{model} on {task}: dense accuracy {bench.accuracy:.4f} ({len(bench.texts)} sentences)",
            ["removed", "accuracy", "KL to dense", "predicted", "agreement", "8 x 128 tokens", "seconds"],
            [
                [
                    f"{row['removed']:.1%}",
                    f"{row['accuracy']:.4f}",
                    f"{row['kl']:.4f}",
                    "-" if row["predicted_kl"] is None else f"{row['predicted_kl']:.4f}",
                    f"{row['agreement']:.4f}",
                    f"{row['speedup_8x128']:.2f} x faster",
                    f"{row['seconds']:.0f}",
                ]
                for row in rows
            ],
            bench.note,
        )
    for row, limit in zip(rows, limits, strict=True):
        if row["kl"] > limit:
            typer.echo(f"Short of the bar at {row['asked']:.0%}: KL {row['kl']:.4f} > {limit}.", err=True)
            raise typer.Exit(1)
