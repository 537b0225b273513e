"""Pictures (extra `[plots]`: matplotlib)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .calibration import Calibration
from .compression.subspace import spectrum
from .errors import TCSPError
from .evaluation.latency import GridPoint

PICTURES = (".png", ".svg", ".pdf")
"""What a picture's file name may end with."""


def require_matplotlib() -> Any:
    """matplotlib's pyplot without a display.

    Raises:
        TCSPError: matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise TCSPError("Pictures need matplotlib: pip install 'tcsp_hf[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def pictures_possible() -> bool:
    """Whether matplotlib is installed."""
    try:
        require_matplotlib()
    except TCSPError:
        return False
    return True


def draw_spectra(axes: Any, stats: Calibration, widths: dict[str, int], sites: Sequence[str] | None = None) -> None:
    """Energy that k directions leave out, one curve a site, the first site dark and the last light.

    Args:
        axes: matplotlib axes.
        stats: whose spectra are drawn (PCA).
        widths: site name -> kept width, marked on its curve; sites that are not there get no mark.
        sites: which ones; all when None.
    """
    from matplotlib import colormaps  # whoever gives axes has matplotlib, and keeps its backend

    names = list(stats.sites if sites is None else sites)
    colours = colormaps["viridis"]
    for i, name in enumerate(names):
        values = spectrum("pca", stats.sites[name].second_moment, None, 1.0).values
        lost = 1.0 - (values.cumsum(0) / values.sum()).numpy()
        colour = colours(i / max(1, len(names) - 1))
        axes.semilogy(range(1, len(values)), lost[:-1].clip(1e-9), color=colour, linewidth=1.2)
        width = widths.get(name, len(values))
        if width < len(values):
            axes.plot([width], [max(lost[width - 1], 1e-9)], "o", color=colour, markersize=4)
    axes.set_xlabel("directions kept")
    axes.set_ylabel("energy left out")
    axes.set_ylim(1e-5, 1)
    axes.set_title("Spectrum of the hidden states, first site (dark) to last (light)")
    axes.grid(alpha=0.3)


def spectrum_picture(path: str | os.PathLike[str], stats: Calibration, widths: dict[str, int]) -> None:
    """The picture of `draw_spectra` alone, as a .png, .svg or .pdf file."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    draw_spectra(axes, stats, widths)
    figure.savefig(Path(path), dpi=130)
    pyplot.close(figure)


def demo_picture(
    path: str | os.PathLike[str],
    stats: Calibration,
    widths: dict[str, int],
    comparison: dict[str, tuple[float, float]],
) -> None:
    """Left: energy that k directions leave out, for every site; right: dense against compressed, in percent.

    Args:
        path: a .png, .svg or .pdf file.
        stats, widths: see `draw_spectra`.
        comparison: label -> (dense, compressed) figures; bars show compressed / dense.
    """
    pyplot = require_matplotlib()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2), layout="constrained")
    draw_spectra(left, stats, widths)

    labels = list(comparison)
    shares = [100 * small / dense if dense else 0.0 for dense, small in comparison.values()]
    bars = right.barh(range(len(labels)), shares, color="#33708f")
    right.bar_label(bars, labels=[f"{share:.0f} %" for share in shares], padding=-36, color="white")
    right.axvline(100, color="black", linewidth=1)
    right.set_yticks(range(len(labels)), labels)
    right.invert_yaxis()
    right.set_xlim(0, max(115, *shares) * 1.1)
    right.set_xlabel("compressed, in % of dense")
    right.set_title("Compressed against dense")
    figure.savefig(Path(path), dpi=130)
    pyplot.close(figure)


def quality_picture(
    path: str | os.PathLike[str],
    curves: dict[str, list[tuple[float, float, float]]],
    dense: tuple[float, float],
    score_name: str,
    first: str,
) -> None:
    """Score against measured latency (left) and against what is removed (right), a curve for every method.

    Args:
        path: a .png, .svg or .pdf file.
        curves: title of the method -> points (removed fraction, milliseconds, score).
        dense: milliseconds and score of the dense model.
        score_name: label of the vertical axes.
        first: title of the curve that is drawn boldly, on top.
    """
    pyplot = require_matplotlib()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    colours = pyplot.get_cmap("tab10")
    for i, (title, points) in enumerate(curves.items()):
        points = sorted(points)
        own = title == first
        style: dict[str, Any] = {
            "label": title,
            "color": "black" if own else colours(i % 10),
            "marker": "o" if own else ".",
            "linewidth": 2.2 if own else 1.2,
            "zorder": 3 if own else 2,
        }
        scores = [score for _, _, score in points]
        left.plot([milliseconds for _, milliseconds, _ in points], scores, **style)
        right.plot([100 * removed for removed, _, _ in points], scores, **style)
    left.plot([dense[0]], [dense[1]], "*", color="black", markersize=13)
    for axes in (left, right):
        axes.axhline(dense[1], color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    left.set_xlabel("median latency in ms (star: dense)")
    left.set_ylabel(score_name)
    right.set_xlabel("parameters removed without embeddings, in % (dotted: dense)")
    right.legend(fontsize="small")
    figure.savefig(Path(path), dpi=130)
    pyplot.close(figure)


def latency_picture(path: str | os.PathLike[str], grid: list[GridPoint], title: str) -> None:
    """Speed-up of every point of a latency grid, one row of bars for each part and back-end; marks for the ideal."""
    pyplot = require_matplotlib()
    rows = list(dict.fromkeys((point.part, point.backend) for point in grid))
    size = (max(6.0, 0.9 * len(grid) / len(rows) + 2), 2.6 * len(rows))
    figure, axes = pyplot.subplots(len(rows), 1, figsize=size, squeeze=False, layout="constrained")
    colours = pyplot.get_cmap("tab10")
    for axis, (part, backend) in zip(axes[:, 0], rows, strict=True):
        points = [point for point in grid if (point.part, point.backend) == (part, backend)]
        names = [name for name in points[0].times if name != "dense"]
        places, width = range(len(points)), 0.8 / len(names)
        for i, name in enumerate(names):
            shifted = [place + (i - (len(names) - 1) / 2) * width for place in places]
            colour = "#33708f" if name == "small" else colours(i % 10)
            label = "compressed" if name == "small" else name
            axis.bar(shifted, [point.gain(name) for point in points], width, color=colour, label=label)
        axis.plot(places, [point.ideal for point in points], "_", color="black", markersize=18, label="ideal")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_ylabel(f"{part}, {backend}")
        axis.set_xticks(places, [f"{point.batch}×{point.length}" for point in points])
        axis.legend(loc="lower right", fontsize="x-small", ncols=len(names) + 1)
    axes[0, 0].set_title(f"{title} (times faster)", fontsize="medium")
    axes[-1, 0].set_xlabel("batch × tokens")
    figure.savefig(Path(path), dpi=110)
    pyplot.close(figure)
