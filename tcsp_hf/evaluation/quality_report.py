"""The table of a comparison for people: cells for a terminal, Markdown, points for a picture."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
_DASH = "-"


def columns(dense: Row) -> list[str]:
    """Heads of the columns; the first one names the method."""
    return [
        "method",
        "removed",
        "with embeddings",
        dense["score_name"],
        f"{dense['distance_name']} to dense",
        "agreement",
        "GFLOPs",
        "ms",
        "speed-up",
        "calibration + method, s",
        "peak MB",
    ]


def cells(row: Row) -> list[str]:
    """One row of the table; dashes where the method cannot do what is asked."""
    if "error" in row:
        return [row["title"], *[_DASH] * 10]
    agreement, calibration = row["agreement"], row["calibration_seconds"]
    return [
        row["title"],
        f"{row['removed']:.1%}",
        f"{row['removed_with_embeddings']:.1%}",
        f"{row['score']:.4f}",
        f"{row['distance']:.4f}",
        _DASH if agreement is None else f"{agreement:.1%}",
        f"{row['flops'] / 1e9:.3g}",
        f"{row['small_ms']:.1f}",
        f"{row['speedup']:.2f}",
        f"{_DASH if calibration is None else format(calibration, '.0f')} + {row['seconds']:.0f}",
        f"{row['peak_memory'] / 1e6:.0f}",
    ]


def notes(dense: Row, rows: Sequence[Row], latency: tuple[int, int], short: Sequence[str]) -> list[str]:
    """What a reader must know beside the table, and where our method falls short."""
    target = dense.get("target_length")
    found = [
        f"Dense: {dense['score_name']} {dense['score']:.4f} on {dense['items']:,} items, "
        f"{dense['non_embedding_parameters']:,} parameters without embeddings, {dense['flops'] / 1e9:.3g} GFLOPs for "
        f"{dense['mean_length']} tokens (the mean length){'' if target is None else f', {target} of the target'}.",
        f"Removed: at least what was asked, embeddings left out and residual maps counted. Latency: medians of "
        f"alternating runs at {latency[0]} × {latency[1]} tokens on {dense['device']}, {dense['threads']} threads (the "
        "encoder of an encoder-decoder). Peak memory: of the process while the method runs.",
    ]
    passes = [row["forward_passes"] for row in rows if row.get("forward_passes") is not None]
    if passes:
        found.append(
            f"Search and refit took the time of {min(passes):.1f} to {max(passes):.1f} plain forward passes of the "
            "dense model over the calibration sample."
        )
    added = [row["added_memory"] for row in rows if row["method"] == "ours" and row.get("added_memory") is not None]
    if added:
        yardstick = max(row["memory_yardstick"] for row in rows if row.get("memory_yardstick") is not None)
        found.append(
            f"Search and refit added at most {max(added) / 1e6:.0f} MB to the process; a result of the dense size, one "
            f"block's normal equations and one batch are {yardstick / 1e6:.0f} MB."
        )
    found += [f"{row['title']} at {row['asked']:.0%}: {row['error']}" for row in rows if "error" in row]
    return found + [f"Short: {line}." for line in short]


def markdown(title: str, dense: Row, rows: Sequence[Row], remarks: Sequence[str]) -> str:
    """A Markdown table, the rows in their order under a line for each fraction asked."""
    names = columns(dense)
    lines = [f"# {title}", "", _line(names), _line(["---"] + ["---:"] * (len(names) - 1))]
    asked = None
    for row in rows:
        if row["asked"] != asked:
            asked = row["asked"]
            lines.append(_line([f"**{asked:.0%} asked**", *[""] * (len(names) - 1)]))
        lines.append(_line(cells(row)))
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks)]) + "\n"


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"


def curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, float]]]:
    """Title -> points (removed fraction, milliseconds, score)."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(row["title"], []).append((row["removed"], row["small_ms"], row["score"]))
    return found
