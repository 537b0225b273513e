"""Options and steps that the bench commands share."""

from typing import Annotated, Any

import typer

from ...compression import removed_fraction
from ...errors import TCSPError
from ...evaluation.comparison import Comparison
from ..common import print_json, print_table

ModelOption = Annotated[
    str, typer.Option(help="A fine-tuned sentence classifier, or a sentence encoder: a folder or a Hub name.")
]
TaskOption = Annotated[
    str,
    typer.Option(
        help="What to score on: a GLUE task, a folder with both splits, or squad-sample (a search, for encoders)."
    ),
]
SequencesOption = Annotated[int, typer.Option(help="Calibration texts, from the training split.", min=1)]
SeedOption = Annotated[int, typer.Option(help="Of the choice of calibration texts and of the drawn outputs.")]
RemoveOption = Annotated[str, typer.Option("--remove", "--removed", help="Fractions to remove, with commas.")]


def names_of(text: str) -> list[str]:
    """Names with commas."""
    return [part.strip() for part in text.split(",")]


def numbers_of(option: str, text: str) -> list[float]:
    """Numbers with commas.

    Raises:
        TCSPError: something else; the message names the option.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise TCSPError(f"{option} is {text!r}; it must be numbers with commas.") from error


def scored(comparison: Comparison, small: Any) -> dict[str, Any]:
    """Part of a row: what is removed and how good the rest is."""
    score = comparison.score(small)
    return {
        "removed": removed_fraction(comparison.dense, small),
        comparison.task.score_name: score.score,
        "kl": score.distance,
        "agreement": score.agreement,
    }


def show(
    comparison: Comparison,
    model: str,
    rows: list[dict[str, Any]],
    columns: dict[str, str],
    as_json: bool,
) -> None:
    """Print the rows as JSON, or as a table with `columns` (key of the row -> head), formatted by their kind.

    A row of what could not be done has `error` instead of figures.
    """
    task = comparison.task
    dense = comparison.dense_score.score
    if as_json:
        print_json({"model": model, "task": task.name, f"dense_{task.score_name}": dense, "rows": rows})
        return
    title = f"{model} on {task.name}: dense {task.score_name} {dense:.4f} ({task.items} items)"
    cells = [[_cell(key, row.get(key)) for key in columns] for row in rows]
    print_table(title, list(columns.values()), cells, comparison.note)


def score_columns(comparison: Comparison) -> dict[str, str]:
    """Key -> head of what `scored` gives, without `removed`."""
    task = comparison.task
    return {
        task.score_name: task.score_name,
        "kl": f"{task.distance_name} to dense",
        "agreement": "agreement",
    }


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key in ("asked", "removed"):
        return f"{value:.1%}"
    if key == "seconds":
        return f"{value:.0f}"
    if key.startswith("speedup"):
        return f"{value:.2f} x faster"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
