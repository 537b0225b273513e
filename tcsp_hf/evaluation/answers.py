"""Question answering by spans, and every task that a sequence-to-sequence model answers in writing."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..calibration.divergence import categorical_kl
from ..errors import TCSPError
from ..tasks.inputs import right_padding
from ..tasks.score import answers_of, score_answers, score_written, span_windows, write
from ..tasks.table import Task as LabelledTask
from ..tasks.text_to_text import max_target_tokens, source_text, target_text
from .scoring import Score, Task, Texts, mean_size

_BATCH = 32
_NAMES = {
    "f1": "F1",
    "spearmanr": "Spearman correlation",
    "matthews_correlation": "Matthews correlation",
}
_COMPARED = 256  # rows whose target is compared token by token: a vocabulary's logits for each


@dataclass(frozen=True)
class Answers:
    """What a model says to every row.

    Attributes:
        texts: its answers.
        value: the task's headline metric, a fraction.
        logits: of the distributions to compare, (choices,) or (tokens, vocabulary) each.
    """

    texts: list[str]
    value: float
    logits: list[torch.Tensor] = field(repr=False)


class _Answered(Task[Answers]):
    """Rows of a task with an own metric. KL: the mean over answers of the sum over what an answer is chosen by."""

    def __init__(self, task: LabelledTask, data: Any) -> None:
        self.name, self.task, self.data = task.name, task, data

    @property
    def score_name(self) -> str:  # type: ignore[override]
        return _NAMES.get(self.task.headline, self.task.headline)

    @property
    def usual_length(self) -> int:  # type: ignore[override]
        return self.task.max_length

    @property
    def items(self) -> int:
        return len(self.data)

    def score(self, reference: Answers, outputs: Answers) -> Score:
        pairs = list(zip(reference.logits, outputs.logits, strict=True))
        distance = sum(float(categorical_kl(expected, found).sum()) for expected, found in pairs) / len(pairs)
        same = sum(one == other for one, other in zip(reference.texts, outputs.texts, strict=True))
        return Score(outputs.value, distance * self._parts, same / len(self.data))

    _parts: ClassVar[int] = 1

    def _value(self, scores: dict[str, float]) -> float:
        return scores[self.task.headline] / (100.0 if self.task.is_qa else 1.0)


class Spans(_Answered):
    """F1 of extractive question answering; KL: of the start's and the end's distribution in a window, together."""

    _parts = 2

    def texts(self) -> Texts:
        return list(zip(self.data["question"], self.data["context"], strict=True))

    def outputs(self, model: PreTrainedModel, tokenizer: Any, progress: bool | None, description: str) -> Answers:
        windows = span_windows(model, tokenizer, self.data, _BATCH, self.max_length, progress)
        answers = answers_of(self.task, self.data, windows)
        logits = [
            torch.from_numpy(part)
            for row in windows
            for window in row
            for part in (window.start_logits, window.end_logits)
        ]
        value = self._value(score_answers(self.task, answers, self.data))
        return Answers([text for text, _ in answers.values()], value, logits)


class Written(_Answered):
    """The task's metric on what a model writes; KL: of the tokens of the right answer, given those before it."""

    def texts(self) -> Texts:
        return [source_text(self.task, row) for row in self.data]

    def calibration_texts(self, data: Any, sequences: int, seed: int) -> Any:
        """Sources alone: the model itself writes the targets."""
        if not hasattr(data, "column_names"):
            return super().calibration_texts(data, sequences, seed)
        return [source_text(self.task, row) for row in super().calibration_texts(data, sequences, seed)]

    def check_calibration(self, data: Any, name: str) -> None:
        """The sources are written out of the task's own columns; a list has texts as they are."""
        found: list[str] = getattr(data, "column_names", None) or []
        missing = [column for column in self.task.columns if column not in found]
        if missing and hasattr(data, "column_names"):
            raise TCSPError(
                f"The calibration data {name!r} lacks the column {missing[0]!r} of the task {self.name!r}, whose texts "
                f"the model reads; it has: {', '.join(found)}. Name data with {', '.join(self.task.columns)}."
            )

    def target_length(self, tokenizer: Any) -> int:
        """Of the right answers, the end token included."""
        targets = [target_text(self.task, row) for row in self.data]
        longest = max_target_tokens(self.task, tokenizer)
        return mean_size(tokenizer(text_target=targets, truncation=True, max_length=longest)["input_ids"])

    def outputs(self, model: PreTrainedModel, tokenizer: Any, progress: bool | None, description: str) -> Answers:
        written = write(model, tokenizer, self.task, self.data, _BATCH, self.max_length, progress)
        return Answers(
            written, self._value(score_written(self.task, written, self.data)), self._target_logits(model, tokenizer)
        )

    @torch.no_grad()
    def _target_logits(self, model: Any, tokenizer: Any) -> list[torch.Tensor]:
        tokenizer = right_padding(tokenizer)
        rows = [self.data[i] for i in range(min(_COMPARED, len(self.data)))]
        found: list[torch.Tensor] = []
        for start in range(0, len(rows), _BATCH):
            chosen = rows[start : start + _BATCH]
            cut = {"padding": True, "truncation": True, "return_tensors": "pt"}
            sources = tokenizer([source_text(self.task, row) for row in chosen], max_length=self.max_length, **cut)
            targets = tokenizer(
                text_target=[target_text(self.task, row) for row in chosen],
                max_length=max_target_tokens(self.task, tokenizer),
                **cut,
            )
            logits = model(
                input_ids=sources["input_ids"].to(model.device),
                attention_mask=sources["attention_mask"].to(model.device),
                labels=targets["input_ids"].to(model.device),
            ).logits
            kept = targets["attention_mask"].bool()
            found += [row[mask].float().cpu() for row, mask in zip(logits, kept, strict=True)]
        return found
