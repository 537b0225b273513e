"""Tasks as text in, text out, in the wording that T5 was trained with (Raffel et al. 2020, arXiv 1910.10683)."""

from collections.abc import Mapping
from typing import Any

from .table import Task

NO_ANSWER = "unanswerable"
"""What a model writes for a question of SQuAD v2 without an answer (T5 was not trained on v2: this word is ours)."""

_ORDER = {"mnli": ("hypothesis", "premise")}
_MAX_ANSWER_TOKENS, _MAX_LABEL_TOKENS = 32, 8
_MAX_ANSWER_LETTERS = 256


def source_text(task: Task, row: Mapping[str, Any]) -> str:
    """What the encoder reads: `"mrpc sentence1: ... sentence2: ..."`, `"question: ... context: ..."`."""
    columns = _ORDER.get(task.name, task.columns)
    body = " ".join(f"{column}: {row[column]}" for column in columns)
    return body if task.is_qa else f"{task.name} {body}"


def target_text(task: Task, row: Mapping[str, Any]) -> str:
    """What the decoder writes: the label's name, the score to the nearest 0.2, or the first answer."""
    if task.is_qa:
        answers = row["answers"]["text"]
        return str(answers[0]) if len(answers) else NO_ANSWER
    if task.is_regression:
        return f"{round(float(row['label']) * 5) / 5:.1f}"
    return task.labels[int(row["label"])]


def max_target_tokens(task: Task, tokenizer: Any) -> int:
    """Tokens of the longest target, the end token among them: more where a tokenizer knows letters or bytes alone."""
    if task.is_qa:
        spelt = len(tokenizer(NO_ANSWER, add_special_tokens=False)["input_ids"]) >= len(NO_ANSWER)
        return _MAX_ANSWER_LETTERS if spelt else _MAX_ANSWER_TOKENS
    lengths = [len(tokenizer(text_target=label)["input_ids"]) for label in task.labels]
    return max([_MAX_LABEL_TOKENS, *lengths])


def read_answer(task: Task, text: str) -> str:
    """The answer of a question in a written text; "" says that there is none."""
    return "" if task.answers == "optional" and text.strip() == NO_ANSWER else text.strip()


def read_label(task: Task, text: str, reference: float) -> float:
    """The label id (or number) in a written text. What is no label counts as wrong, what is no number as 0."""
    text = text.strip()
    if task.is_regression:
        try:
            return min(5.0, max(0.0, float(text)))
        except ValueError:
            return 0.0
    if text in task.labels:
        return task.labels.index(text)
    return (int(reference) + 1) % len(task.labels)
