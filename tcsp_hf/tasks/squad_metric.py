"""SQuAD's exact match and F1 (v1.1 and v2), by the definitions of the official evaluation scripts, offline.

Sources: the appendices of Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import datasets
import evaluate

from ..errors import TCSPError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, answer: str) -> float:
    """1 where both read the same after `normalise`."""
    return float(normalise(prediction) == normalise(answer))


def overlap(prediction: str, answer: str) -> float:
    """F1 of the two bags of normalised words, v1.1: 0 where nothing is shared."""
    ours, theirs = normalise(prediction).split(), normalise(answer).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2.0 * shared / (len(ours) + len(theirs)) if shared else 0.0


def overlap_v2(prediction: str, answer: str) -> float:
    """As `overlap`, and 1 where both are empty: no answer."""
    return (
        exact(prediction, answer) if not (normalise(prediction) and normalise(answer)) else overlap(prediction, answer)
    )


def score_v1(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Percent over all questions; the best answer of each counts, an unanswered question scores 0."""
    return {
        "f1": _mean_best(overlap, predictions, answers, list(answers)),
        "exact_match": _mean_best(exact, predictions, answers, list(answers)),
    }


def score_v2(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    no_answer: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Percent over all questions, over those with an answer (`HasAns_`) and those without (`NoAns_`).

    Args:
        predictions: question id -> text; "" says that there is no answer.
        answers: question id -> answers; empty where there is none.
        no_answer: question id -> probability that there is none: adds `best_f1` and `best_exact_match`, the scores
            at the thresholds that are best on these questions.
    """
    golds = {key: [text for text in texts if normalise(text)] or [""] for key, texts in answers.items()}
    has = [key for key, texts in golds.items() if texts != [""]]
    without = [key for key, texts in golds.items() if texts == [""]]
    found: dict[str, float] = {}
    for prefix, keys in (("", list(golds)), ("HasAns_", has), ("NoAns_", without)):
        if keys:
            found[f"{prefix}f1"] = _mean_best(overlap_v2, predictions, golds, keys)
            found[f"{prefix}exact_match"] = _mean_best(exact, predictions, golds, keys)
    if no_answer is not None:
        for name, rule in (("f1", overlap_v2), ("exact_match", exact)):
            found[f"best_{name}"] = _best_threshold(rule, predictions, golds, no_answer)
    return found


def _best(
    rule: Callable[[str, str], float], predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]], key: str
) -> float:
    if key not in predictions:
        return 0.0
    return max((rule(predictions[key], answer) for answer in answers[key]), default=0.0)


def _mean_best(
    rule: Callable[[str, str], float],
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    keys: Sequence[str],
) -> float:
    return 100.0 * sum(_best(rule, predictions, answers, key) for key in keys) / len(keys)


def _best_threshold(
    rule: Callable[[str, str], float],
    predictions: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    no_answer: Mapping[str, float],
) -> float:
    """Best mean over thresholds t, when every question with a probability above t is left unanswered.

    No threshold lies between equal probabilities (the official script looks there as well).
    """

    def probability(key: str) -> float:
        return no_answer.get(key, 0.0)

    current = best = sum(1.0 for texts in golds.values() if texts == [""])  # everything left unanswered
    for _, keys in groupby(sorted(golds, key=probability), key=probability):
        for key in keys:
            if golds[key] == [""]:
                current -= 1.0 if predictions.get(key) else 0.0
            else:
                current += _best(rule, predictions, golds, key)
        best = max(best, current)
    return 100.0 * best / len(golds)


class SquadMetric(evaluate.Metric):
    """`SquadMetric("squad").compute(predictions=[...], references=[...])`, in the format of the Hub's metrics.

    Predictions: `{"id", "prediction_text"}`, for `"squad_v2"` also `"no_answer_probability"`; references:
    `{"id", "answers": {"text": [...], "answer_start": [...]}}`.
    """

    def __init__(self, version: str = "squad", **kwargs: Any) -> None:
        """Raises TCSPError unless `version` is "squad" or "squad_v2"."""
        if version not in ("squad", "squad_v2"):
            raise TCSPError(f"version is {version!r}; allowed: 'squad', 'squad_v2'.")
        super().__init__(config_name=version, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        prediction = {"id": text, "prediction_text": text}
        if self.config_name == "squad_v2":
            prediction["no_answer_probability"] = datasets.Value("float64")
        answers = {"text": datasets.Sequence(text), "answer_start": datasets.Sequence(datasets.Value("int32"))}
        return evaluate.MetricInfo(
            description="Exact match and F1 of SQuAD.",
            citation="@inproceedings{rajpurkar2016squad, title={{SQuAD}}, author={Rajpurkar and others}, year={2016}}",
            inputs_description="predictions: id, prediction_text; references: id, answers.",
            features=datasets.Features({"predictions": prediction, "references": {"id": text, "answers": answers}}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        ours = {item["id"]: item["prediction_text"] for item in predictions}
        answers = {item["id"]: list(item["answers"]["text"]) for item in references}
        if self.config_name == "squad":
            return score_v1(ours, answers)
        return score_v2(ours, answers, {item["id"]: item["no_answer_probability"] for item in predictions})
