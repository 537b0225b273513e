"""How far a compressed classifier is from its dense model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
