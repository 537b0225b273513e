"""The logits of a classifier on texts."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import TCSPError
from .inputs import input_length, right_padding


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str | tuple[str, str]],
    *,
    batch_size: int = 64,
    max_length: int = 128,
    progress: bool | None = False,
    description: str = "predict",
) -> torch.Tensor:
    """Logits (texts, classes) in float32, in the order of `texts` (strings or pairs of strings).

    Longer inputs than the model has positions for are cut, whatever `max_length` is.

    Raises:
        TCSPError: strings and pairs together, or a pair that is not one of strings.
    """
    columns = split_pairs(texts)
    tokenizer, max_length = right_padding(tokenizer), input_length(model, max_length)
    order = sorted(range(len(texts)), key=lambda i: len(str(texts[i])))
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    bar = tqdm(total=len(texts), unit="text", desc=description, disable=None if progress is None else not progress)
    with bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                *([column[i] for i in chosen] for column in columns),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(model.device)
            for i, row in zip(chosen, model(**batch).logits.float().cpu(), strict=True):
                found[i] = row
            bar.update(len(chosen))
    return torch.stack(found)


def split_pairs(texts: Sequence[str | tuple[str, str]]) -> list[list[str]]:
    """The texts as a tokenizer takes them: one list of strings, or two of the same length.

    Raises:
        TCSPError: neither all strings nor all pairs of strings.
    """
    rows = [tuple(text) if isinstance(text, (tuple, list)) else (text,) for text in texts]
    size = len(rows[0]) if rows else 1
    for i, row in enumerate(rows):
        if len(row) != size or size > 2 or not all(isinstance(part, str) for part in row):
            raise TCSPError(f"Text {i} is {str(texts[i])[:80]!r}; all must be strings, or all pairs of strings.")
    return [[row[side] for row in rows] for side in range(size)]
