"""One table of tasks: columns, labels, metrics, splits. Column names and label ids are those of the Hub's data sets.

Sources: GLUE (Wang et al. 2019, arXiv 1804.07461) as `nyu-mll/glue`; SQuAD v1.1 (Rajpurkar et al. 2016, arXiv
1606.05250) and v2 (2018, arXiv 1806.03822) as `rajpurkar/squad` and `rajpurkar/squad_v2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..data.checks import (
    check_texts,
    checked_questions,
    labels_are_hidden,
    same_in_another_order,
    with_class_labels,
    with_number_labels,
)
from ..data.sources import load_data, load_known, only_split
from ..errors import TCSPError

CLASSIFICATION, SPANS, TEXT = "classification", "spans", "text"
FORMS = (CLASSIFICATION, SPANS, TEXT)
"""How a model answers: with a label's logits, with the start and end of a span, or by writing text."""
SCORES = (0.0, 5.0)
"""STS-B's lowest and highest label."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as in `TASKS`, and of its data for `load_data`.
        columns: one or two text columns, in the order a BERT reads them.
        labels: names by label id; empty for a regression (STS-B) and for question answering.
        metrics: what is reported, the headline first.
        splits: names of the labelled evaluation splits, the default first.
        answers: question answering: `"spans"` (v1.1) or `"optional"` (v2, some questions have none); "" otherwise.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: tuple[str, ...] = ("validation",)
    answers: str = ""

    @property
    def is_qa(self) -> bool:
        return bool(self.answers)

    @property
    def is_regression(self) -> bool:
        return not self.labels and not self.is_qa

    @property
    def headline(self) -> str:
        """The metric that stands for the task in tables."""
        return self.metrics[0]

    @property
    def form(self) -> str:
        """How an encoder with a head answers."""
        return SPANS if self.is_qa else CLASSIFICATION

    @property
    def max_length(self) -> int:
        """Usual number of tokens of an input."""
        return 384 if self.is_qa else 128

    def load(self, split: str | None = None, source: str | None = None) -> Any:
        """The data of a split as a `datasets.Dataset`; `source` names other data with the same columns.

        Labels are the numbers of `labels`, whatever order or names of them the data has.

        Raises:
            TCSPError: no such split, missing columns, rows that are not the task's, or hidden labels (GLUE's test
                splits).
        """
        name, split = source or self.name, split or self.splits[0]
        alone = only_split(source)
        if alone in self.splits and alone != split:
            raise TCSPError(
                f"{name!r} is one file that is called after an evaluation split: for the split {split!r} give a folder "
                f"with {split}{Path(name).suffix} in it."
            )
        data = load_data(name, split) if source else load_known(name, split)
        target = "answers" if self.is_qa else "label"
        found = getattr(data, "column_names", None)
        missing = [column for column in (*self.columns, target) if found is None or column not in found]
        if missing:
            raise TCSPError(
                f"The data {name!r} (split {split!r}) lacks the column {missing[0]!r} of the task {self.name!r}; it "
                f"has: {', '.join(found or ['no columns'])}."
            )
        if len(data) == 0:
            raise TCSPError(f"The split {split!r} of {name!r} is empty.")
        check_texts(data, self.columns, name)
        if self.is_qa:
            return checked_questions(data, name, answered=self.answers == "spans")
        if labels_are_hidden(data):
            raise TCSPError(f"The labels of {name!r} (split {split!r}) are hidden: take {', '.join(self.splits)}.")
        if self.is_regression:
            return with_number_labels(data, name, *SCORES)
        return with_class_labels(data, self.labels, name)


_NLI = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_QA = ("question", "context")
TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("validation_matched", "validation_mismatched"),
        ),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Task("qnli", ("question", "sentence"), _NLI, ("accuracy",)),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task("rte", _PAIR, _NLI, ("accuracy",)),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task("stsb", _PAIR, (), ("spearmanr", "pearson")),
        Task("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",)),
        Task("squad", _QA, (), ("f1", "exact_match"), answers="spans"),
        Task("squad_v2", _QA, (), ("f1", "exact_match"), answers="optional"),
    )
}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        TCSPError: there is none.
    """
    if name not in TASKS:
        raise TCSPError(f"There is no task {name!r}; allowed: {', '.join(TASKS)}.")
    return TASKS[name]


def form_of(model: PreTrainedModel, task: Task) -> str:
    """How this model answers the task: one of `FORMS`.

    Raises:
        TCSPError: its head does not fit the task, or has its labels in another order.
    """
    name = type(model).__name__
    heads = {
        "ForSequenceClassification": CLASSIFICATION,
        "ForQuestionAnswering": SPANS,
        "ForConditionalGeneration": TEXT,
    }
    form = next((form for head, form in heads.items() if name.endswith(head)), None)
    if form is None or form not in (task.form, TEXT):
        wanted = next(head for head, form in heads.items() if form == task.form)
        raise TCSPError(
            f"A {name} cannot answer {task.name!r}: that needs a ...{wanted} or ...ForConditionalGeneration."
        )
    wanted_labels = 1 if task.is_regression else len(task.labels)
    if form == CLASSIFICATION and model.config.num_labels != wanted_labels:
        raise TCSPError(
            f"The model has {model.config.num_labels} outputs, but {task.name!r} needs {wanted_labels}: it was "
            "fine-tuned on another task."
        )
    if form == CLASSIFICATION and task.labels:
        names = label_names(model)
        if same_in_another_order(names, task.labels):
            raise TCSPError(
                f"The model's outputs are {', '.join(names)} (id2label), in another order than {task.name!r} counts "
                f"its labels: {', '.join(task.labels)}. Put the rows of its last layer and id2label in that order."
            )
    return form


def label_names(model: PreTrainedModel) -> list[str]:
    """The name of every output of a classifier, by its number: `LABEL_0` where it has no other."""
    named: Any = model.config.id2label or {}
    return [str(named.get(i, f"LABEL_{i}")) for i in range(model.config.num_labels or 0)]


def texts_of(task: Task, data: Any) -> list[str | tuple[str, str]]:
    """Every row's text, or pair of texts."""
    columns: Sequence[list[str]] = [list(data[column]) for column in task.columns]
    return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))
