"""Bars on a latency grid, and its Markdown form."""

from collections.abc import Iterable
from typing import Any

from .latency import GridPoint

TITLES = {
    "dense": "dense",
    "small": "compressed",
    "svd": "low-rank",
    "filters": "filters only",
    "shallow": "fewer layers",
    "int8": "dense, int8",
}
NEAR_IDEAL = {(1, 128): 0.90, (8, 128): 0.95, (32, 128): 0.95}
"""Of the FLOPs ratio, for a BERT whose hidden size alone is smaller: sdpa, and with torch.compile 0.95 everywhere."""
MIXED_REMOVED, MIXED_GAIN = 0.60, 2.0
"""A BERT cut over all axes by that much: times dense, at 8 x 128 (sdpa)."""
GENERATION_REMOVED, GENERATION_GAIN = 0.44, 1.5
"""A T5 cut by that much: times the tokens per second of dense."""


def missed(points: Iterable[GridPoint], family: str, axes: Iterable[str], removed: float) -> list[str]:
    """What falls short, in words; empty where all bars are met.

    Args:
        family: `"bert"` or `"t5"`.
        axes: what was cut.
        removed: fraction of the non-embedding parameters.
    """
    found = []
    hidden_only, every_axis = set(axes) == {"hidden"}, set(axes) == {"hidden", "filters", "heads"}
    for point in points:
        name = f"{point.part}, {point.backend}, {point.batch} x {point.length}"
        place = (point.batch, point.length)
        if point.speedup < 1.0:
            found.append(f"{name}: slower than dense ({point.speedup:.2f})")
        if family == "bert" and hidden_only and place in NEAR_IDEAL and point.backend in ("sdpa", "compile"):
            bar = NEAR_IDEAL[place] if point.backend == "sdpa" else 0.95
            if point.speedup < bar * point.ideal:
                share = point.speedup / point.ideal
                found.append(
                    f"{name}: {point.speedup:.2f} times dense, {share:.2f} of the FLOPs ratio, below {bar:.2f}"
                )
        far = every_axis and family == "bert" and removed >= MIXED_REMOVED - 0.005
        if far and place == (8, 128) and point.backend == "sdpa" and point.speedup < MIXED_GAIN:
            found.append(f"{name}: {point.speedup:.2f} times dense at {removed:.0%} removed, below {MIXED_GAIN}")
        cut = point.part == "generation" and removed >= GENERATION_REMOVED - 0.005
        if cut and point.speedup < GENERATION_GAIN:
            found.append(f"{name}: {point.speedup:.2f} times dense at {removed:.0%} removed, below {GENERATION_GAIN}")
    return found


def columns(points: Iterable[GridPoint]) -> list[str]:
    """Names of the models that were timed anywhere, dense and compressed first."""
    names = {name for point in points for name in point.times}
    return [name for name in TITLES if name in names]


def row(point: GridPoint, names: list[str]) -> list[str]:
    """Cells: place, milliseconds (90th percentile) of dense and compressed, gains, ideal, share of it."""
    cells = [point.part, point.backend, f"{point.batch} x {point.length}"]
    cells += [f"{point.times[name].median:.1f} ({point.times[name].p90:.1f})" for name in ("dense", "small")]
    cells += [f"{point.speedup:.2f}", f"{point.ideal:.2f}", f"{point.speedup / point.ideal:.0%}"]
    return cells + [f"{point.gain(name):.2f}" if name in point.times else "" for name in names[2:]]


def heads(names: list[str]) -> list[str]:
    first = [
        "part",
        "back-end",
        "batch x length",
        "dense ms (p90)",
        "compressed ms (p90)",
        "speed-up",
        "ideal",
        "of it",
    ]
    return first + [TITLES[name] for name in names[2:]]


def markdown(title: str, points: list[GridPoint], notes: list[str]) -> str:
    """A page: title, notes, one table."""
    names = columns(points)
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    table = [heads(names), ["---"] * len(heads(names)), *(row(point, names) for point in points)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    generation = [point for point in points if point.part == "generation"]
    if generation:
        lines += ["", "Tokens per second in generation: " + "; ".join(map(_speeds, generation)) + "."]
    return "\n".join(lines) + "\n"


def _speeds(point: GridPoint) -> str:
    speeds = {name: 1000 * point.tokens / timing.median for name, timing in point.times.items()}
    listed = ", ".join(f"{TITLES[name]} {speed:.1f}" for name, speed in speeds.items())
    return f"{point.backend} {point.batch} x {point.length}: {listed}"


def as_rows(points: Iterable[GridPoint]) -> list[dict[str, Any]]:
    """For JSON."""
    rows = []
    for point in points:
        made: dict[str, Any] = {
            "part": point.part,
            "backend": point.backend,
            "batch": point.batch,
            "length": point.length,
            "ideal": point.ideal,
            "speedup": point.speedup,
        }
        for name, timing in point.times.items():
            made[name] = {"median": timing.median, "p90": timing.p90}
        if point.tokens:
            made["tokens"] = point.tokens
        rows.append(made)
    return rows
