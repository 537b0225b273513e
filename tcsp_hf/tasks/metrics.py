"""GLUE's metrics, in numpy, as an `evaluate.Metric` that needs neither a network nor scikit-learn.

The values equal `sklearn.metrics.accuracy_score`, `f1_score`, `matthews_corrcoef`, `scipy.stats.pearsonr` and
`spearmanr` (tested); where a correlation is not defined because one side is constant, it is 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from .table import TASKS, find_task

Array = npt.NDArray[Any]


def accuracy(predictions: Array, references: Array) -> float:
    """Share of equal entries."""
    return float((predictions == references).mean())


def f1(predictions: Array, references: Array) -> float:
    """Harmonic mean of precision and recall of the class 1; 0 where there is none on either side."""
    hits = int(((predictions == 1) & (references == 1)).sum())
    named = int((predictions == 1).sum() + (references == 1).sum())
    return 2.0 * hits / named if named else 0.0


def matthews_correlation(predictions: Array, references: Array) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004): the correlation of the one-hot labels."""
    classes = np.unique(np.concatenate([predictions, references]))
    ours = (predictions[:, None] == classes).astype(float)
    theirs = (references[:, None] == classes).astype(float)
    ours -= ours.mean(0)
    theirs -= theirs.mean(0)
    scale = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    return float((ours * theirs).sum()) / scale if scale else 0.0


def pearson(predictions: Array, references: Array) -> float:
    """Correlation of two series of numbers."""
    ours = predictions.astype(float) - predictions.astype(float).mean()
    theirs = references.astype(float) - references.astype(float).mean()
    scale = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return float(np.clip(ours @ theirs / scale, -1.0, 1.0)) if scale else 0.0


def spearmanr(predictions: Array, references: Array) -> float:
    """Correlation of the ranks; equal numbers share the mean of their ranks."""
    return pearson(_ranks(predictions), _ranks(references))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2.0)[inverse]


FORMULAS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}
_CITATION = (
    "@inproceedings{wang2019glue, title={{GLUE}}, author={Wang, Alex and others}, booktitle={ICLR}, year={2019}}"
)


class GlueMetric(evaluate.Metric):
    """`GlueMetric("mrpc").compute(predictions=ids, references=ids)` -> every metric of the task.

    Predictions and references are label ids, for `"stsb"` numbers.
    """

    def __init__(self, task: str, **kwargs: Any) -> None:
        """Raises TCSPError for an unknown task; other arguments are those of `evaluate.Metric`."""
        find_task(task)
        super().__init__(config_name=task, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if TASKS[self.config_name].is_regression else "int64")
        return evaluate.MetricInfo(
            description="The metrics of a GLUE task.",
            citation=_CITATION,
            inputs_description="predictions, references: label ids, or numbers for stsb.",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        ours, theirs = np.asarray(predictions), np.asarray(references)
        return {name: FORMULAS[name](ours, theirs) for name in TASKS[self.config_name].metrics}
