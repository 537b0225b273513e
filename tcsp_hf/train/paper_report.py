"""What the rows of the paper's experiment come to: means over seeds, drops against bars, a table and a picture."""

import json
import statistics
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import TCSPError
from ..files import write_whole
from ..tasks import find_task
from .paper import DEFAULTS

MEAN_DROP = {0.44: 0.0, 0.6: 0.0, 0.8: 0.8}
"""Removed fraction -> the largest mean drop over the tasks after distillation, in points."""
WORST_DROP = {0.44: 1.6, 0.6: 1.6, 0.8: 1.6}
"""Removed fraction -> the largest drop of any task after distillation, in points."""
LEAST_KEPT = {0.94: 0.96}
"""Removed fraction -> the share of the dense score that is kept at least, on the mean over the tasks."""


_HEAD = "| model | task | metric |"
_MARK = "<!-- Written by `tcsp bench paper`. -->"


@dataclass(frozen=True)
class Group:
    """Rows that differ in their seed alone.

    Attributes:
        model, task, remove, mode: as in `Row`.
        settings: what else sets these rows apart from others of the table, as `name=value`; empty where nothing does.
        metric: the task's headline.
        removed: mean of what was really removed.
        dense, scores: one for every seed, in points (hundredths; SQuAD's metrics are in points already).
        seconds: mean of calibration, search, refit and training; None where one went on from a checkpoint.
        dense_seconds: mean of the dense model's training; None where it came trained.
        step: time of a training step, as a fraction of the dense model's; None where either was not trained.
    """

    model: str
    task: str
    remove: float
    mode: str
    settings: str
    metric: str
    removed: float
    dense: tuple[float, ...]
    scores: tuple[float, ...]
    seconds: float | None
    dense_seconds: float | None
    step: float | None

    @property
    def drop(self) -> float:
        """Mean points lost."""
        return statistics.mean(self.dense) - statistics.mean(self.scores)


def groups_of(results: list[dict[str, Any]]) -> list[Group]:
    """Results by model, task, fraction, mode and whatever else differs between them, but for the seed."""
    rows = [DEFAULTS | result["row"] for result in results]
    own = ("name", "seed", "model", "task", "remove", "mode")
    names = [name for name in (rows[0] if rows else {}) if name not in own]
    varied = [name for name in names if len({json.dumps(row[name]) for row in rows}) > 1]
    found: dict[tuple[str, str, float, str, str], list[dict[str, Any]]] = {}
    for row, result in zip(rows, results, strict=True):
        settings = ", ".join(f"{name}={row[name]}" for name in varied)
        found.setdefault((row["model"], row["task"], row["remove"], row["mode"], settings), []).append(result)
    groups = []
    for (model, task, remove, mode, settings), members in sorted(found.items()):
        percent = 1.0 if find_task(task).is_qa else 100.0
        name = members[0]["headline"]
        groups.append(
            Group(
                model,
                task,
                remove,
                mode,
                settings,
                name,
                statistics.mean(member["removed"] for member in members),
                tuple(percent * member["dense"][name] for member in members),
                tuple(percent * member["scores"][name] for member in members),
                _mean([_seconds(member, "seconds") for member in members]),
                _mean([_seconds(member, "dense_seconds") for member in members]),
                _mean([_step(member) for member in members]),
            )
        )
    return groups


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def _step(result: dict[str, Any]) -> float | None:
    """A training step's time over the dense model's: the processor's, where it was measured."""
    steps = result.get("timed_steps", result["steps"])
    if not steps or not result["dense_steps"]:
        return None
    own, dense = result.get("training_processor_seconds"), result.get("dense_processor_seconds")
    if own is None or dense is None:
        own, dense = result["training_seconds"], result["dense_seconds"]
    return (own / steps) / (dense / result["dense_steps"])


def _seconds(result: dict[str, Any], name: str) -> float | None:
    """The processor's own seconds where they were measured, otherwise those of the clock."""
    if name == "seconds" and result.get("timed_steps", result["steps"]) != result["steps"]:
        return None
    own = result.get(name.replace("seconds", "processor_seconds"))
    return result[name] if own is None else own


def _named(mode: str, settings: str) -> str:
    return f"{mode} ({settings})" if settings else mode


def _whole(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f}"


def summary(groups: list[Group]) -> list[dict[str, Any]]:
    """Over the tasks, for every model, fraction and mode: mean and worst drop in points, mean share kept."""
    cells: dict[tuple[str, float, str, str], list[Group]] = {}
    for group in groups:
        cells.setdefault((group.model, group.remove, group.mode, group.settings), []).append(group)
    rows = []
    for (model, remove, mode, settings), members in cells.items():
        worst = max(members, key=lambda group: group.drop)
        kept = [statistics.mean(g.scores) / statistics.mean(g.dense) for g in members if statistics.mean(g.dense)]
        rows.append(
            {
                "model": model,
                "remove": remove,
                "mode": mode,
                "settings": settings,
                "tasks": [group.task for group in members],
                "mean_drop": statistics.mean(group.drop for group in members),
                "worst_drop": worst.drop,
                "worst_task": worst.task,
                "kept": statistics.mean(kept) if kept else None,
            }
        )
    return rows


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """Where a distilled model lost more than the bar, from `summary`."""
    found = []
    for row in (row for row in rows if row["mode"] == "distilled"):
        asked, name = row["remove"], row["model"].rstrip("/").split("/")[-1]
        mean, worst, kept = MEAN_DROP.get(asked), WORST_DROP.get(asked), LEAST_KEPT.get(asked)
        if mean is not None and row["mean_drop"] > mean:
            found.append(f"{name} at {asked:.0%} loses {row['mean_drop']:.2f} points on the mean; the bar is {mean}")
        if worst is not None and row["worst_drop"] > worst:
            found.append(
                f"{name} at {asked:.0%} loses {row['worst_drop']:.2f} points on {row['worst_task']}; the bar is {worst}"
            )
        if kept is not None and row["kept"] is not None and row["kept"] < kept:
            found.append(f"{name} at {asked:.0%} keeps {row['kept']:.1%} of the dense score; the bar is {kept:.0%}")
    return found


def references() -> dict[str, Any]:
    """Published figures of other work, with their sources."""
    return json.loads(files("tcsp_hf.data").joinpath("references.json").read_text(encoding="utf-8"))


def report(results: list[dict[str, Any]], folder: Path) -> Path:
    """Write `results.json` and `README.md`: our rows, and the published figures below them, marked as theirs."""
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    groups = groups_of(results)
    lines = [
        _MARK,
        "",
        f"{_HEAD} removed | mode | seeds | dense | compressed | change | seconds | dense seconds | step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        cells = [
            group.model.rstrip("/").split("/")[-1],
            group.task,
            group.metric,
            f"{group.removed:.1%}",
            _named(group.mode, group.settings),
            str(len(group.scores)),
            _with_spread(group.dense),
            _with_spread(group.scores),
            f"{-group.drop:+.2f}",
            _whole(group.seconds),
            _whole(group.dense_seconds),
            "-" if group.step is None else f"{group.step:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model | asked | mode | tasks | mean change | worst change | of the dense score |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary(groups):
        kept = "-" if row["kept"] is None else f"{row['kept']:.1%}"
        name = row["model"].rstrip("/").split("/")[-1]
        lines.append(
            f"| {name} | {row['remove']:.0%} | {_named(row['mode'], row['settings'])} | {len(row['tasks'])} | "
            f"{-row['mean_drop']:+.2f} | {-row['worst_drop']:+.2f} ({row['worst_task']}) | {kept} |"
        )
    published = references()
    lines += [
        "",
        "Scores are those of the last weights; nothing was selected on the evaluation split. Behind ± is the standard "
        "deviation over seeds. Seconds are of calibration, search, refit and training, then of the dense model's "
        "training: the processor's own where it does the work, so that other work does not count. A step's time is a "
        "fraction of the dense model's (the teacher's forward pass is part of a distilled one). `from-pretrained` rows "
        "were compressed before any training on the task, then trained as the dense model was; their seconds are all "
        "that it takes (- where a row went on from a checkpoint).",
        "",
        published["note"],
        "",
        "| published | model | task | removed | result | source |",
        "|---|---|---|---|---|---|",
    ]
    for entry in published["rows"]:
        removed = f"{entry['removed']:.1%}" if "removed" in entry else "-"
        lines.append(
            f"| {entry['method']} | {entry['model']} | {entry['task']} | {removed} | {entry['result']} | "
            f"{entry['source']} |"
        )
    write_whole(folder / "README.md", "\n".join(lines) + "\n")
    return folder / "README.md"


def check_place(folder: Path) -> None:
    """Refuse a folder whose README.md is another one than `report` writes.

    Raises:
        TCSPError: so it is.
    """
    path = folder / "README.md"
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith((_MARK, _HEAD)):
        raise TCSPError(f"{path} was not written by `tcsp bench paper` and is left as it is: name another folder.")


def _with_spread(values: tuple[float, ...]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Score kept against fraction removed, a line for every model, task and mode; needs matplotlib."""
    from ..plots import require_matplotlib

    pyplot = require_matplotlib()
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}  # by the model's path: names may be alike
    for group in groups_of(results):
        dense = statistics.mean(group.dense)
        if dense:
            point = (100 * group.removed, 100 * statistics.mean(group.scores) / dense)
            lines.setdefault((group.model, group.task, _named(group.mode, group.settings)), []).append(point)
    for (model, *more), points in lines.items():
        label = ", ".join([model.rstrip("/").split("/")[-1], *more])
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axis.axhline(100, color="black", linewidth=1)
    axis.set_xlabel("removed, in % of the non-embedding parameters")
    axis.set_ylabel("score, in % of the dense model's")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
