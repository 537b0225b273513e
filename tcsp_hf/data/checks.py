"""Checks of labelled rows, whoever wrote them: text that is text, labels that are a model's, answers to questions.

They read whole columns, so that they take no time beside a model's. Rows are counted from 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TCSPError

_TEXT = ("string", "large_string")


def normalised(names: Sequence[Any]) -> list[str]:
    """Names of labels as they are compared: `"Not-Entailment"` is `"not_entailment"`."""
    return [str(name).lower().replace("-", "_").replace(" ", "_") for name in names]


def same_in_another_order(names: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists of label names hold the same ones, but not at the same numbers."""
    ours, theirs = normalised(names), normalised(others)
    return ours != theirs and sorted(ours) == sorted(theirs)


def check_texts(data: Any, columns: Sequence[str], name: str) -> None:
    """Refuse columns of a `datasets.Dataset` that are not text in every row; `name` is what an error calls the data.

    Raises:
        TCSPError: another type, or a null.
    """
    for column in columns:
        values = _column(data, column)
        if str(values.type) not in _TEXT:
            raise TCSPError(
                f"The column {column!r} of {name!r} holds {values.type}, not text: give strings (quote the column)."
            )
        _refuse_nulls(values, column, name)


def with_class_labels(data: Any, names: Sequence[str], name: str) -> Any:
    """The data with labels (integers) that count `names`; names of labels in text, or in another order, are mapped.

    Raises:
        TCSPError: a label that is none of them.
    """
    values = _column(data, "label")
    _refuse_nulls(values, "label", name)
    kind, known = str(values.type), normalised(names)
    allowed = f"the numbers 0 to {len(names) - 1} ({', '.join(names)})"
    if kind in _TEXT:
        found = [str(label) for label in values.unique().to_pylist()]
        if not set(normalised(found)) <= set(known):
            shown = ", ".join(repr(label) for label in found[:3])
            raise TCSPError(f"The labels of {name!r} are {shown}{', ...' * (len(found) > 3)}; they must be {allowed}.")
        return _with_labels(data, np.array([known.index(label) for label in normalised(values.to_pylist())]))
    labels = _numbers(values, name, allowed)
    whole = labels.astype(np.int64, copy=False) if labels.dtype.kind != "f" else _whole(labels, name, allowed)
    _refuse_row(whole >= len(names), whole, name, allowed)
    _refuse_row(whole < 0, whole, name, allowed)
    own = getattr(data.features["label"], "names", None)
    if own is not None and same_in_another_order(own, names):
        return _with_labels(data, np.array([known.index(label) for label in normalised(own)])[whole])
    return data if labels.dtype.kind in "iu" else _with_labels(data, whole)


def with_number_labels(data: Any, name: str, lowest: float = -np.inf, highest: float = np.inf) -> Any:
    """The data with labels that are finite numbers of floating point, from `lowest` to `highest`.

    Raises:
        TCSPError: another type, a null, or a number that is not finite or out of bounds.
    """
    values = _column(data, "label")
    _refuse_nulls(values, "label", name)
    allowed = "finite numbers" if highest == np.inf else f"numbers from {lowest:g} to {highest:g}"
    labels = _numbers(values, name, allowed)
    _refuse_row(~(np.isfinite(labels) & (labels >= lowest) & (labels <= highest)), labels, name, allowed)
    return data if labels.dtype.kind == "f" else _with_labels(data, labels.astype(np.float32))


def labels_are_hidden(data: Any) -> bool:
    """Whether every label is -1, as in GLUE's test splits."""
    values = _column(data, "label")
    if str(values.type) in _TEXT or values.null_count or not len(values):
        return False
    return bool((np.asarray(values.to_numpy()) == -1).all())


def checked_questions(data: Any, name: str, answered: bool) -> Any:
    """Rows of SQuAD's form, with ids that are text: those of the rows' numbers where the column is missing.

    Args:
        answered: whether every question must have an answer (v1.1).

    Raises:
        TCSPError: an id that stands twice, or answers in another form.
    """
    from datasets import Value

    form = "{'text': [strings], 'answer_start': [whole numbers]}"
    if "id" not in data.column_names:
        data = data.add_column("id", [str(i) for i in range(len(data))])
    ids = _column(data, "id")
    _refuse_nulls(ids, "id", name)
    if str(ids.type).startswith(("int", "uint")):
        data = data.cast_column("id", Value("string"))
        ids = _column(data, "id")
    if str(ids.type) not in _TEXT:
        raise TCSPError(f"The column 'id' of {name!r} holds {ids.type}; it must be strings or whole numbers.")
    if len(ids.unique()) < len(ids):
        keys, counts = np.unique(ids.to_numpy().astype(str), return_counts=True)
        raise TCSPError(f"The id {str(keys[counts > 1][0])!r} stands twice in {name!r}: every question needs its own.")
    answers = _column(data, "answers")
    fields = {answers.type.field(i).name: str(answers.type.field(i).type) for i in range(answers.type.num_fields)}
    texts, starts = fields.get("text", ""), fields.get("answer_start", "")
    if not (
        str(answers.type).startswith("struct")
        and "list<" in texts
        and texts.endswith((": string>", ": large_string>", ": null>"))
        and "list<" in starts
        and starts.endswith((*(f"int{bits}>" for bits in (8, 16, 32, 64)), ": null>"))
    ):
        raise TCSPError(f"The answers of {name!r} are {answers.type}; they must be {form}.")
    _refuse_nulls(answers, "answers", name)
    for row, answer in enumerate(answers.to_pylist()):
        found, at = answer["text"], answer["answer_start"]
        if found is None or at is None or len(found) != len(at) or None in found or None in at:
            shown = f"{str(answer)[:80]} in row {row} (counted from 0)"
            raise TCSPError(f"The answers of {name!r} are {shown}; they must be {form}, as many of both.")
        if answered and not found:
            raise TCSPError(
                f"Row {row} of {name!r} (counted from 0) has no answer: leave it out, or take the task 'squad_v2'."
            )
    return data


def check_answers_stand_there(data: Any) -> None:
    """Refuse rows of SQuAD's form whose first answer is not in the context at the place that they say.

    Raises:
        TCSPError: one that is not; it names the question's id.
    """
    columns = ["id", "context", "answers"]
    for batch in data.select_columns(columns).with_format("arrow").iter(10_000):
        for key, context, answer in zip(*(batch[name].to_pylist() for name in columns), strict=True):
            if not answer["text"]:
                continue
            text, start = answer["text"][0], answer["answer_start"][0]
            if start < 0 or context[start : start + len(text)] != text:
                raise TCSPError(
                    f"The answer {text[:60]!r} to question {key!r} does not stand at the character {start} of its "
                    f"context, where {context[max(start, 0) : max(start, 0) + len(text)][:60]!r} is: answer_start "
                    "counts the context's characters from 0."
                )


def _column(data: Any, column: str) -> Any:
    """A column as Arrow's array."""
    return data.select_columns([column]).with_format("arrow")[:][column]


def _refuse_nulls(values: Any, column: str, name: str) -> None:
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise TCSPError(f"The column {column!r} of {name!r} holds nothing in row {row} (counted from 0): leave it out.")


def _numbers(values: Any, name: str, allowed: str) -> npt.NDArray[Any]:
    labels = np.asarray(values.to_numpy())
    if labels.dtype.kind not in "biuf":
        raise TCSPError(f"The labels of {name!r} are {values.type}; they must be {allowed}.")
    return labels


def _whole(labels: npt.NDArray[Any], name: str, allowed: str) -> npt.NDArray[np.int64]:
    _refuse_row(~np.isfinite(labels) | (labels != np.floor(labels)), labels, name, allowed)
    return labels.astype(np.int64)


def _refuse_row(wrong: npt.NDArray[np.bool_], labels: npt.NDArray[Any], name: str, allowed: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise TCSPError(
            f"The data {name!r} holds the label {labels[row]} in row {row} (counted from 0); labels must be {allowed}."
        )


def _with_labels(data: Any, labels: npt.NDArray[Any]) -> Any:
    return data.remove_columns("label").add_column("label", labels)
