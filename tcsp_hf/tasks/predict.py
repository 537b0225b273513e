"""The logits of a classifier on texts."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel


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
    """Logits (texts, classes) in float32, in the order of `texts` (strings or pairs of strings)."""
    order = sorted(range(len(texts)), key=lambda i: len(str(texts[i])))
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    bar = tqdm(total=len(texts), unit="text", desc=description, disable=None if progress is None else not progress)
    with bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            pairs = [(t, None) if isinstance(t, str) else t for t in (texts[i] for i in chosen)]
            first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            batch = tokenizer(
                first,
                None if second[0] is None else second,
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(model.device)
            for i, row in zip(chosen, model(**batch).logits.float().cpu(), strict=True):
                found[i] = row
            bar.update(len(chosen))
    return torch.stack(found)
