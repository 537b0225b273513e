"""Scores of a classifier, and how far a compressed one is from its dense model."""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Agreement:
    """A compressed classifier against labels and against its dense model.

    Attributes:
        accuracy: share of right labels.
        kl: mean Kullback-Leibler divergence of the dense model's distribution to the compressed one's, in nats.
        agreement: share of sentences on which both choose the same label.
    """

    accuracy: float
    kl: float
    agreement: float


def compare(dense_logits: torch.Tensor, logits: torch.Tensor, labels: Sequence[int]) -> Agreement:
    """All logits (texts, classes)."""
    reference, candidate = dense_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (reference.exp() * (reference - candidate)).sum(-1).mean()
    chosen = logits.argmax(-1)
    return Agreement(
        accuracy=float((chosen == torch.tensor(labels)).float().mean()),
        kl=float(kl),
        agreement=float((chosen == dense_logits.argmax(-1)).float().mean()),
    )
