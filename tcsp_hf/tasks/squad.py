"""Extractive question answering: windows over long paragraphs, and answers from the logits of all windows.

As in Devlin et al. 2019 (arXiv 1810.04805, §4.2-4.3): a span's score is the sum of its start and end logits over all
windows of the question; the null answer's is that of the first token, in the window where it is smallest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TCSPError

Array = npt.NDArray[Any]
DOC_STRIDE = 128
MAX_ANSWER_TOKENS = 30
N_BEST = 20


def encode_windows(tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], max_length: int) -> Any:
    """Overlapping windows of (question, context), of at most `max_length` tokens, unpadded, with character offsets.

    Raises:
        TCSPError: a slow tokenizer (it knows no offsets), or questions that leave no room for the context.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TCSPError("Spans need a fast tokenizer (tokenizer.json): a slow one does not know character offsets.")
    questions = [question.strip() for question in questions]
    longest = max(len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"])
    room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 8:
        raise TCSPError(
            f"max_length is {max_length}, but a question has {longest} tokens: no room for the context. Raise it."
        )
    return tokenizer(
        questions,
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=min(DOC_STRIDE, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def answer_positions(encoded: Any, window: int, answer: dict[str, Any]) -> tuple[int, int]:
    """First and last token of the answer in a window; (0, 0), the first token, where it is not wholly inside."""
    if not len(answer["text"]):
        return 0, 0
    start = int(answer["answer_start"][0])
    end = start + len(answer["text"][0])
    kinds, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window]
    inside = [i for i, kind in enumerate(kinds) if kind == 1]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return 0, 0
    first = max(i for i in inside if offsets[i][0] <= start)
    last = min(i for i in inside if offsets[i][1] >= end)
    return first, max(first, last)


@dataclass(frozen=True)
class Window:
    """Logits (length,) of one window, and each token's character range in the context (None outside of it)."""

    start_logits: Array
    end_logits: Array
    offsets: list[tuple[int, int] | None]


@dataclass(frozen=True)
class Answer:
    """The best answer to a question: its text ("" where none is better) and the probability that there is none."""

    text: str
    no_answer_probability: float


def best_answer(context: str, windows: Sequence[Window], optional: bool) -> Answer:
    """The best of the `N_BEST` spans of every window; with `optional`, none where the null answer scores higher."""
    spans: list[tuple[float, int, int]] = []
    null = float("inf")
    for window in windows:
        null = min(null, float(window.start_logits[0] + window.end_logits[0]))
        inside = np.array([i for i, offset in enumerate(window.offsets) if offset is not None], dtype=int)
        starts = inside[np.argsort(-window.start_logits[inside], kind="stable")[:N_BEST]]
        ends = inside[np.argsort(-window.end_logits[inside], kind="stable")[:N_BEST]]
        scores = window.start_logits[starts][:, None] + window.end_logits[ends][None]
        lengths = ends[None] - starts[:, None]
        for i, j in zip(*np.nonzero((lengths >= 0) & (lengths < MAX_ANSWER_TOKENS)), strict=True):
            first, last = window.offsets[starts[i]], window.offsets[ends[j]]
            if first is not None and last is not None:
                spans.append((float(scores[i, j]), first[0], last[1]))
    spans = sorted(spans, key=lambda span: -span[0])[:N_BEST]
    scores_of = np.array([null, *(span[0] for span in spans)])
    weights = np.exp(scores_of - scores_of.max())
    probability = float(weights[0] / weights.sum())
    if not spans or (optional and null > spans[0][0]):
        return Answer("", probability)
    return Answer(context[spans[0][1] : spans[0][2]], probability)
