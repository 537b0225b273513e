"""Several tables of `bench quality` in one: what our method costs on every task, beside the best baseline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TCSPError
from .quality import OURS, RESULTS, Row

MEAN_DROP = {0.44: 0.5, 0.60: 1.0}
"""Removed fraction -> the largest mean drop over the tasks, in points (hundredths of the score)."""
WORST_DROP = {0.44: 1.6}
"""Removed fraction -> the largest drop of any task, in points."""


def read_tables(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of finished tables.

    Raises:
        TCSPError: a folder without them, or a task that two folders hold for one model.
    """
    found: list[dict[str, Any]] = []
    for folder in folders:
        try:
            table = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            key = table["model_fingerprint"], table["task"]
            table["dense"]["score"], table["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TCSPError(f"{folder} holds no finished table of `tcsp bench quality`: {error!r}.") from error
        if any(key == (other["model_fingerprint"], other["task"]) for other in found):
            raise TCSPError(
                f"{folder} and a folder before it hold tables of the same model on {key[1]!r}: name each once."
            )
        found.append(table)
    return found


def summarise(tables: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per table and fraction: scores, drops in points, and the best score and smallest distance of the others.

    Fractions that our method could not do are left out, and scores and distances that are no numbers.
    """
    rows: list[Row] = []
    for table in tables:
        dense = table["dense"]
        done = [row for row in table["rows"] if "error" not in row]
        for ours in (row for row in done if row["method"] == OURS and None not in (row["score"], row["distance"])):
            others = [row for row in done if row["method"] != OURS and row["asked"] == ours["asked"]]
            rows.append(
                {
                    "task": table["task"],
                    "asked": ours["asked"],
                    "removed": ours["removed"],
                    "score_name": dense["score_name"],
                    "dense": dense["score"],
                    "score": ours["score"],
                    "drop": 100.0 * (dense["score"] - ours["score"]),
                    "distance": ours["distance"],
                    "speedup": ours["speedup"],
                    "best_other": max((row["score"] for row in others if row["score"] is not None), default=None),
                    "least_other_distance": min(
                        (row["distance"] for row in others if row["distance"] is not None), default=None
                    ),
                }
            )
    return rows


def mean_drops(rows: Sequence[Row]) -> dict[float, float]:
    """Removed fraction -> mean drop over the tasks, in points."""
    by_fraction: dict[float, list[float]] = {}
    for row in rows:
        by_fraction.setdefault(row["asked"], []).append(row["drop"])
    return {asked: sum(drops) / len(drops) for asked, drops in sorted(by_fraction.items())}


def missed_bars(rows: Sequence[Row]) -> list[str]:
    """Where a mean or a task's drop is above its bar."""
    means = mean_drops(rows)
    found = [
        f"the mean drop at {asked:.0%} is {means[asked]:.2f} points; the bar is {bar}"
        for asked, bar in MEAN_DROP.items()
        if means.get(asked, 0.0) > bar
    ]
    for row in rows:
        bar = WORST_DROP.get(row["asked"])
        if bar is not None and row["drop"] > bar:
            found.append(f"{row['task']} drops by {row['drop']:.2f} points at {row['asked']:.0%}; the bar is {bar}")
    return found
