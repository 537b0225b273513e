"""What models are scored on: labelled texts for a classifier, pairs or a search for a sentence encoder."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from ..calibration.inputs import TEXT_COLUMNS
from ..errors import TCSPError
from ..tasks.metrics import matthews_correlation, spearmanr
from ..tasks.predict import predict, split_pairs
from .classification import compare
from .embeddings import embed, recall_at

_CLASSIFIED, _EMBEDDED = 128, 256  # tokens per text, as `predict` and `embed` cut them
Texts = list[str] | list[tuple[str, str]]
Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class Score:
    """One model on one task.

    Attributes:
        score: the task's own figure in [-1, 1]; higher is better.
        distance: how far the outputs are from the dense model's; 0 for the dense model itself.
        agreement: share of items on which both models decide alike; None where nothing is decided.
    """

    score: float
    distance: float
    agreement: float | None


class Task(ABC, Generic[Outputs]):
    """Texts, what a model makes of them, and what that is worth.

    Attributes:
        name: of the data.
        score_name, distance_name: what `Score.score` and `Score.distance` are.
        items: how many items are scored.
        longest: tokens that the model reads; None is any number.
    """

    score_name: ClassVar[str] = "accuracy"
    distance_name: ClassVar[str] = "KL"
    usual_length: ClassVar[int] = _CLASSIFIED
    name: str
    longest: int | None = None

    @property
    def max_length(self) -> int:
        """Tokens that a text is cut to."""
        return self.usual_length if self.longest is None else min(self.usual_length, self.longest)

    @property
    @abstractmethod
    def items(self) -> int: ...

    @abstractmethod
    def texts(self) -> Texts:
        """Every text that a model reads for a score."""

    @abstractmethod
    def outputs(self, model: PreTrainedModel, tokenizer: Any, progress: bool | None, description: str) -> Outputs:
        """What `score` compares: logits (texts, classes), embeddings (texts, D) or answers."""

    @abstractmethod
    def score(self, reference: Outputs, outputs: Outputs) -> Score:
        """Score a model's outputs; `reference` holds the dense model's."""

    def calibration_texts(self, data: Any, sequences: int, seed: int) -> Any:
        """At most `sequences` of the data's texts, chosen by the seed, as `calibrate` takes them."""
        if hasattr(data, "shuffle"):
            return data.shuffle(seed=seed).select(range(min(sequences, len(data))))
        return random.Random(seed).sample(data, min(sequences, len(data)))

    def check_calibration(self, data: Any, name: str) -> None:
        """Refuse data, called `name`, that `calibration_texts` cannot read, before any work.

        Raises:
            TCSPError: columns that the task's texts are made of are missing.
        """
        return

    def mean_length(self, tokenizer: Any) -> int:
        """Mean number of tokens of a text, rounded."""
        return mean_size(_tokenise(tokenizer, self.texts(), self.max_length))

    def target_length(self, tokenizer: Any) -> int | None:
        """Mean number of tokens of what a decoder writes, rounded; None where it reads the text itself, or is none."""
        return None


def mean_size(rows: Sequence[Sequence[int]]) -> int:
    """Mean number of entries, rounded, at least 1."""
    return max(1, round(sum(map(len, rows)) / len(rows)))


def _tokenise(tokenizer: Any, texts: Texts, max_length: int) -> list[list[int]]:
    found: list[list[int]] = tokenizer(*split_pairs(texts), truncation=True, max_length=max_length)["input_ids"]
    return found


class _Labelled(Task[torch.Tensor]):
    """Texts with labels, for a model with a sequence classification head."""

    def __init__(self, name: str, texts: Texts, labels: Sequence[float]) -> None:
        self.name, self._texts, self.labels = name, texts, torch.tensor(labels)

    @property
    def items(self) -> int:
        return len(self._texts)

    def texts(self) -> Texts:
        return self._texts

    def outputs(self, model: PreTrainedModel, tokenizer: Any, progress: bool | None, description: str) -> torch.Tensor:
        return predict(
            model, tokenizer, self._texts, max_length=self.max_length, progress=progress, description=description
        )


class Classification(_Labelled):
    """Accuracy of a sequence classifier; KL is from the dense model's distribution to the compressed one's, in nats."""

    def score(self, reference: torch.Tensor, outputs: torch.Tensor) -> Score:
        found = compare(reference, outputs, self.labels.tolist())
        return Score(self._value(found.accuracy, outputs), found.kl, found.agreement)

    def _value(self, accuracy: float, outputs: torch.Tensor) -> float:
        return accuracy


class Matthews(Classification):
    """Matthews correlation of a classifier of two classes: CoLA's figure."""

    score_name = "Matthews correlation"

    def _value(self, accuracy: float, outputs: torch.Tensor) -> float:
        return matthews_correlation(outputs.argmax(-1).numpy(), self.labels.numpy())


class Regression(_Labelled):
    """Spearman correlation of a model with one output; KL is that of Gaussians of unit variance."""

    score_name = "Spearman correlation"

    def score(self, reference: torch.Tensor, outputs: torch.Tensor) -> Score:
        distance = 0.5 * (reference.double() - outputs.double()).square().mean()
        return Score(spearmanr(outputs[:, 0].numpy(), self.labels.numpy()), float(distance), None)


class Embedding(Task[torch.Tensor]):
    """Sentence embeddings: pooled as the dense model's files say, mapped back to its space, compared by cosine."""

    pooling = "mean"

    distance_name = "1 - cosine"
    usual_length = _EMBEDDED

    def outputs(self, model: PreTrainedModel, tokenizer: Any, progress: bool | None, description: str) -> torch.Tensor:
        texts = [str(text) for text in self.texts()]
        how: dict[str, Any] = {"max_length": self.max_length, "pooling": self.pooling}
        return embed(model, tokenizer, texts, **how, progress=progress, description=description)

    def calibration_texts(self, data: Any, sequences: int, seed: int) -> Any:
        """Single texts, each once: an encoder never reads pairs."""
        texts = data if isinstance(data, list) else columns_of(data)[0]
        single = [part for text in texts for part in ([text] if isinstance(text, str) else text)]
        return super().calibration_texts(list(dict.fromkeys(single)), sequences, seed)

    @staticmethod
    def distance(reference: torch.Tensor, outputs: torch.Tensor) -> float:
        return float(1.0 - (reference * outputs).sum(1).mean())


class Similarity(Embedding):
    """Spearman correlation of the cosines of pairs with human scores (STS-B)."""

    score_name = "Spearman correlation"

    def __init__(self, name: str, pairs: Sequence[tuple[str, str]], labels: Sequence[float]) -> None:
        self.name, self.pairs, self.labels = name, list(pairs), torch.tensor(labels)

    @property
    def items(self) -> int:
        return len(self.pairs)

    def texts(self) -> Texts:
        return [pair[0] for pair in self.pairs] + [pair[1] for pair in self.pairs]

    def score(self, reference: torch.Tensor, outputs: torch.Tensor) -> Score:
        first, second = outputs.split(len(self.pairs))
        value = spearmanr((first * second).sum(1).numpy(), self.labels.numpy())
        return Score(value, self.distance(reference, outputs), None)


class Retrieval(Embedding):
    """Recall@1 of questions among paragraphs; agreement: the same paragraph comes first for both models."""

    score_name = "recall@1"

    def __init__(self, name: str, paragraphs: Sequence[str], questions: Sequence[str], answers: Sequence[int]) -> None:
        self.name, self.paragraphs, self.questions = name, list(paragraphs), list(questions)
        self.answers = list(answers)

    @property
    def items(self) -> int:
        return len(self.questions)

    def texts(self) -> Texts:
        return self.paragraphs + self.questions

    def score(self, reference: torch.Tensor, outputs: torch.Tensor) -> Score:
        count = len(self.paragraphs)
        best = [(found[count:] @ found[:count].T).argmax(1) for found in (reference, outputs)]
        recall = recall_at(outputs[count:], outputs[:count], self.answers, (1,))[0]
        return Score(recall, self.distance(reference, outputs), float((best[0] == best[1]).float().mean()))


def columns_of(data: Any) -> tuple[Texts, tuple[str, ...]]:
    """Texts (or pairs) of a dataset, and the columns that they are from.

    Raises:
        TCSPError: no text column is known.
    """
    names = data.column_names
    for columns in TEXT_COLUMNS:
        if all(column in names for column in columns):
            parts = [list(data[column]) for column in columns]
            texts: Any = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
            return texts, columns
    raise TCSPError(f"The data has the columns {names}: no sentences to score on.")
