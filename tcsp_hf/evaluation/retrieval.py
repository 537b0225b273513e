"""Two sentence encoders on one search: each on its own index, and one's queries on the other's."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TCSPError
from .embeddings import recall_at

Encoder = Callable[[Sequence[str], str], torch.Tensor]
"""(texts, what they are called on the progress bar) -> unit vectors (texts, D)."""
RANKS = (1, 10)


@dataclass(frozen=True)
class Search:
    """Questions (each about the paragraph with the index in `answers`) and paragraphs, all different."""

    paragraphs: list[str]
    questions: list[str]
    answers: list[int]

    @classmethod
    def of(cls, data: Any, questions: int | None = None, seed: int = 0) -> "Search":
        """From SQuAD's columns `context` and `question`: all paragraphs, and all questions or some drawn by the seed.

        Raises:
            TCSPError: the columns are missing, or no question is asked for.
        """
        missing = [name for name in ("context", "question") if name not in data.column_names]
        if missing:
            raise TCSPError(f"The data has no column {missing[0]!r}; it has: {', '.join(data.column_names)}.")
        if questions is not None and questions < 1:
            raise TCSPError(f"questions is {questions}; at least 1 is needed.")
        contexts, asked = list(data["context"]), list(data["question"])
        places = {text: i for i, text in enumerate(dict.fromkeys(contexts))}
        chosen: Sequence[int] = range(len(asked))
        if questions is not None and questions < len(asked):
            chosen = sorted(random.Random(seed).sample(chosen, questions))
        return cls(list(places), [asked[i] for i in chosen], [places[contexts[i]] for i in chosen])


def compare_search(search: Search, dense: Encoder, small: Encoder) -> dict[str, Any]:
    """Recall at `RANKS` of every pairing of queries and index, and mean cosines between both models' vectors.

    Raises:
        TCSPError: the two models' vectors have different lengths; one paragraph says so before the others are read.
    """
    encoders = {"dense": dense, "compressed": small}
    sizes = {label: encoder(search.paragraphs[:1], label).shape[1] for label, encoder in encoders.items()}
    if len(set(sizes.values())) > 1:
        raise TCSPError(
            f"The vectors have {sizes['dense']} and {sizes['compressed']} entries: only models that share a space can "
            "be compared (compress with --sentence-transformer, whose last step maps back)."
        )
    made = {}
    for label, encoder in encoders.items():
        made[label, "index"] = encoder(search.paragraphs, f"{label} paragraphs")
        made[label, "queries"] = encoder(search.questions, f"{label} questions")
    recalls = {
        f"{queries} on {index}": recall_at(made[queries, "queries"], made[index, "index"], search.answers, RANKS)
        for queries, index in (
            ("dense", "dense"),
            ("compressed", "compressed"),
            ("compressed", "dense"),
            ("dense", "compressed"),
        )
    }
    cosines = {
        kind: float((made["dense", key] * made["compressed", key]).sum(1).mean())
        for kind, key in (("paragraphs", "index"), ("questions", "queries"))
    }
    return {
        "paragraphs": len(search.paragraphs),
        "questions": len(search.questions),
        "recall": recalls,
        "cosine": cosines,
    }
