"""Our method beside the baselines: the same model, texts, task and counting for every row; resumable row by row."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..baselines import BASELINES, Baseline
from ..calibration import Calibration
from ..calibration.fingerprint import model_fingerprint
from ..compression import Search, compress, count_parameters
from ..compression.plan import AXES
from ..configuration_tcsp import METHOD_VERSION
from ..errors import TCSPError
from ..files import check_output_folder, write_whole
from .comparison import Comparison
from .latency import check_length, compare_latency, wait_for
from .memory import PeakMemory, compression_memory

OURS = "ours"
MOST_PASSES = 12.0
"""Plain forward passes over the calibration sample that our search and refit may take."""
METHODS = (OURS, *BASELINES)
BARS = {"sst2": {0.44: (0.880, 0.010), 0.60: (0.876, 0.030), 0.75: (0.865, 0.060)}}
"""Task -> removed fraction -> the least score and the largest distance of our method (MiniLM classifier)."""

FAILURES: tuple[type[Exception], ...] = (TCSPError, vars(torch.linalg)["LinAlgError"])  # (not in its list of names)
"""What costs a row, and not the table: a method that cannot do what is asked, or whose arithmetic fails."""

_RUN, _ROWS, _STATISTICS = "run.json", "rows", "calibration"
_IDENTITY = {"model_fingerprint", "sequences", "seed", "axes", "latency", "method_version"}
RESULTS, TABLE, PICTURE = "results.json", "table.md", "pareto.png"
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the table holds.

    Attributes:
        methods: names out of `METHODS`.
        removed: fractions of the non-embedding parameters to remove at least.
        axes: of our method; None: what the family has.
        latency: (batch, length) that both models are timed on.
    """

    methods: Sequence[str]
    removed: Sequence[float]
    axes: Sequence[str] | None = None
    latency: tuple[int, int] = (8, 128)

    def check(self, model: PreTrainedModel | None = None) -> None:
        """Refuse what cannot be a table, of `model` where one is given.

        Raises:
            TCSPError: an unknown or repeated method or axis, no method, or a fraction outside (0, 1), or a
                length to time that the model cannot read.
        """
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise TCSPError(f"methods is {list(self.methods)}; it must name some of {', '.join(METHODS)}, each once.")
        if not self.removed or any(not 0.0 < value < 1.0 for value in self.removed):
            raise TCSPError(f"removed is {list(self.removed)}; it must hold numbers between 0 and 1.")
        if len(set(self.removed)) < len(self.removed):
            raise TCSPError(f"removed is {list(self.removed)}: each fraction may be named once.")
        if self.axes is not None and (not self.axes or any(axis not in AXES for axis in self.axes)):
            raise TCSPError(f"axes is {list(self.axes)}; it must name some of {', '.join(AXES)}.")
        if min(self.latency) < 1:
            raise TCSPError(f"latency is {self.latency}; batch and length must be positive.")
        if model is not None:
            check_length(model, self.latency[1])


def method_of(name: str, axes: Sequence[str] | None, search: Search | None = None) -> Baseline:
    """A method by its name; ours as one more of the same kind, `search` shared by its rows."""
    if name != OURS:
        return BASELINES[name]
    chosen = AXES if axes is None else tuple(axes)

    def ours(dense: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
        return compress(dense, stats, remove=removed, axes=chosen, search=search)

    return Baseline(f"ours ({', '.join(chosen)})", "this package", ours, True)


class QualityFolder:
    """The folder of a table: `run.json` says what is compared, `rows/` holds a file for every finished row."""

    def __init__(self, folder: Path, identity: dict[str, Any], fresh: bool) -> None:
        """Open a new or empty folder, or one of the same comparison.

        Args:
            folder: where.
            identity: what all rows of the table have in common.
            fresh: forget what an earlier run left there.

        Raises:
            TCSPError: the folder holds something else, or rows of another comparison.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.check(folder)
        found = self._found()
        if found is None:
            pass
        elif fresh:
            self._forget()
        else:
            for name, value in self.identity.items():
                new = name == "texts" and name not in found  # (folders of earlier versions do not have it)
                if name != "model" and not new and found.get(name) != value:  # the fingerprint says which model it is
                    raise TCSPError(
                        f"{folder} holds rows of another comparison: {name} is {found.get(name)!r} there and {value!r} "
                        "now. Name another folder, or start again there with fresh (--fresh)."
                    )
        (folder / _ROWS).mkdir(parents=True, exist_ok=True)
        self._seconds = None if found is None or fresh else found.get("calibration_seconds")
        self._write_run()

    @staticmethod
    def check(folder: Path) -> None:
        """Refuse a folder of other things, before any long work.

        Raises:
            TCSPError: it is neither new, nor empty, nor one of this benchmark.
        """
        if not (folder / _RUN).is_file():
            check_output_folder(folder, False)
        elif _IDENTITY - _read_object(folder / _RUN).keys():
            raise TCSPError(f"{folder / _RUN} was not written by this benchmark: name another folder.")

    def _found(self) -> dict[str, Any] | None:
        path = self.folder / _RUN
        if not path.is_file():
            return None
        return _read_object(path)

    def _forget(self) -> None:
        for path in (self.folder / _ROWS).glob("*.json"):
            path.unlink()
        for path in (self.statistics / name for name in ("calibration.json", "calibration.safetensors")):
            path.unlink(missing_ok=True)
        if self.statistics.is_dir():
            self.statistics.rmdir()
        for name in (_RUN, RESULTS, TABLE, PICTURE):
            (self.folder / name).unlink(missing_ok=True)

    def _write_run(self) -> None:
        run = {**self.identity, "calibration_seconds": self._seconds}
        write_whole(self.folder / _RUN, json.dumps(run, indent=2) + "\n")

    @property
    def statistics(self) -> Path:
        """Where the statistics are kept (they hold a sample of the calibration's tokens)."""
        return self.folder / _STATISTICS

    @property
    def calibration_seconds(self) -> float | None:
        return self._seconds

    @calibration_seconds.setter
    def calibration_seconds(self, seconds: float) -> None:
        self._seconds = seconds
        self._write_run()

    def _path(self, key: str) -> Path:
        return self.folder / _ROWS / f"{key}.json"

    def read(self, key: str) -> Row | None:
        """A finished row; None where there is none, or where it says that the method could not do it."""
        path = self._path(key)
        if not path.is_file():
            return None
        row = _read_object(path)
        return None if "error" in row else row

    def finished(self) -> list[Row]:
        """All finished rows of methods, of this and earlier runs: by fraction, then in the order of `METHODS`."""
        names = [path.stem for path in sorted((self.folder / _ROWS).glob("*.json")) if path.stem != "dense"]
        rows = [row for row in map(self.read, names) if row is not None and row.get("method") in METHODS]
        return sorted(rows, key=lambda row: (row["asked"], METHODS.index(row["method"])))

    def write(self, key: str, row: Row) -> None:
        write_whole(self._path(key), json.dumps(row, indent=2) + "\n")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TCSPError(f"{path} cannot be read: {error}. Delete it, or start again with fresh (--fresh).") from error
    if not isinstance(found, dict):
        raise TCSPError(f"{path} is not a JSON object. Delete it, or start again with fresh (--fresh).")
    return found


def identity_of(comparison: Comparison, plan: Plan, names: dict[str, Any]) -> dict[str, Any]:
    """What must not change between runs into one folder; `names` adds how model and data were named."""
    return {
        **names,
        "model_fingerprint": model_fingerprint(comparison.dense),
        "sequences": comparison.sequences,
        "seed": comparison.seed,
        "axes": None if plan.axes is None else list(plan.axes),
        "latency": list(plan.latency),
        "target_length": comparison.target_length,
        "device": str(comparison.dense.device),
        "threads": torch.get_num_threads(),
        "method_version": METHOD_VERSION,
        "texts": comparison.digest,
    }


def run_quality(
    comparison: Comparison, plan: Plan, folder: QualityFolder, progress: bool | None
) -> tuple[Row, list[Row]]:
    """The dense row, and the rows of the plan and of earlier runs into the folder; what is there is not made again.

    A method that cannot do what is asked gives a row with `error` instead of figures, and is tried again next time.
    """
    comparison.cache = folder.statistics
    dense = folder.read("dense")
    if dense is None:
        dense = _dense_row(comparison)
        folder.write("dense", dense)
    failed: list[Row] = []
    search = Search()
    total = len(plan.methods) * len(plan.removed)
    bar = tqdm(total=total, unit="row", desc="quality", disable=None if progress is None else not progress)
    with bar:
        for removed in plan.removed:
            for name in plan.methods:
                bar.set_postfix_str(f"{name} at {removed:.0%}")
                key = f"{name}-{removed:g}"
                row = folder.read(key)
                if row is None:
                    row = _row(comparison, plan, folder, search, name, removed)
                    folder.write(key, row)
                if "error" in row:
                    failed.append(row)
                bar.update(1)
    return dense, sorted(folder.finished() + failed, key=lambda row: (row["asked"], METHODS.index(row["method"])))


def _dense_row(comparison: Comparison) -> Row:
    score, count = comparison.dense_score, count_parameters(comparison.dense)
    return {
        "task": comparison.task.name,
        "items": comparison.task.items,
        "score_name": comparison.task.score_name,
        "distance_name": comparison.task.distance_name,
        "score": score.score,
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "mean_length": comparison.mean_length,
        "target_length": comparison.target_length,
        "flops": comparison.flops(comparison.dense),
        "threads": torch.get_num_threads(),
        "device": str(comparison.dense.device),
    }


def _row(comparison: Comparison, plan: Plan, folder: QualityFolder, search: Search, name: str, removed: float) -> Row:
    dense, method = comparison.dense, method_of(name, plan.axes, search)
    stats = comparison.stats
    if comparison.calibration_seconds is not None and comparison.calibration_seconds != folder.calibration_seconds:
        folder.calibration_seconds = comparison.calibration_seconds
    row: Row = {"method": name, "title": method.title, "source": method.source, "asked": removed}
    # before ours: weights that are only mapped come into memory with the first pass, and are none that it adds
    forward = comparison.forward_seconds if name == OURS else None
    wait_for(dense.device)
    started, searched = time.perf_counter(), search.seconds
    try:
        with PeakMemory(dense.device) as memory:
            small = method.compress(dense, stats, removed)
            wait_for(dense.device)
    except FAILURES as error:
        return {**row, "error": str(error)}
    seconds = time.perf_counter() - started
    if name == OURS and search.seconds == searched:
        seconds += searched  # as if the row had been alone
    passes = None if forward is None else seconds / forward
    before, after = count_parameters(dense), count_parameters(small)
    score = comparison.score(small)
    flops, dense_flops = comparison.flops(small), comparison.flops(dense)
    latency = compare_latency(dense, small, *plan.latency)
    return {
        **row,
        "removed": 1.0 - after.non_embedding / before.non_embedding,
        "removed_with_embeddings": 1.0 - after.total / before.total,
        "parameters": after.total,
        "non_embedding_parameters": after.non_embedding,
        "score": score.score,
        "distance": score.distance,
        "agreement": score.agreement,
        "flops": flops,
        "flops_ratio": flops / dense_flops,
        "dense_ms": latency.dense_ms,
        "small_ms": latency.small_ms,
        "speedup": latency.speedup,
        "calibration_seconds": folder.calibration_seconds if method.reads_statistics else 0.0,
        "seconds": seconds,
        "forward_passes": passes,
        "peak_memory": memory.peak,
        "added_memory": memory.peak - memory.start,
        "memory_yardstick": compression_memory(dense),
    }


def shortfalls(rows: Sequence[Row], task: str | None) -> list[str]:
    """Where our method falls below a baseline in both score and distance, or short of the bars of the task.

    The bars are those of one model: without a task none count.
    """
    found = []
    bars = BARS.get(task, {}) if task is not None else {}
    for ours in (row for row in rows if row["method"] == OURS):
        asked = ours["asked"]
        if "error" in ours:
            found.append(f"at {asked:.0%} our method gave nothing: {ours['error']}")
            continue
        passes = ours.get("forward_passes")
        if bars and passes is not None and passes > MOST_PASSES:
            found.append(f"at {asked:.0%} ours took {passes:.1f} forward passes; the bar is {MOST_PASSES:.0f}")
        for other in rows:
            same = other["asked"] == asked and other["method"] != OURS and "error" not in other
            if same and other["score"] > ours["score"] and other["distance"] < ours["distance"]:
                found.append(
                    f"at {asked:.0%} {other['title']} is better in both: {other['score']:.4f} and "
                    f"{other['distance']:.4f}, ours {ours['score']:.4f} and {ours['distance']:.4f}"
                )
        least, most = bars.get(asked, (-float("inf"), float("inf")))
        if not (ours["score"] >= least and ours["distance"] <= most):  # (true of no number as well)
            found.append(
                f"at {asked:.0%} ours has {ours['score']:.4f} and {ours['distance']:.4f}; the bar is {least} and {most}"
            )
    return found
