"""How far a changed model's outputs are from the dense model's, in the units of the Fisher estimate (nats)."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import family_of
from .objectives import first_tokens

MASKED_FRACTION = 0.15
"""Share of the tokens that a masked-LM head is calibrated on."""


def categorical_kl(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(softmax(dense) || softmax(other)) (...,) of logits (..., classes)."""
    expected, found = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def _token_kl(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`categorical_kl` (batch, tokens) of logits (batch, tokens, classes), one sequence after the other."""
    return torch.stack([categorical_kl(*pair) for pair in zip(dense, other, strict=True)])


def divergence(model: PreTrainedModel, objective: str, inputs: dict[str, Any], dense: Any, other: Any) -> torch.Tensor:
    """Sum over a batch of the divergence that `objective`'s Fisher information approximates to second order.

    Args:
        inputs: of both forward passes; `dense` and `other` are their outputs.
        objective: a name of `objectives.objective_of`.
    """
    mask = inputs["attention_mask"]
    if objective.startswith("embedding"):
        return _embedding(objective, inputs, dense, other)
    if objective == "question_answering":
        gone = mask == 0
        pairs = ((dense.start_logits, other.start_logits), (dense.end_logits, other.end_logits))
        lowest = torch.finfo(torch.float32).min
        masked = [tuple(part.float().masked_fill(gone, lowest) for part in pair) for pair in pairs]
        return torch.stack([categorical_kl(*pair).sum() for pair in masked]).sum()
    if objective == "classification":
        return _classification(model, dense.logits, other.logits)
    if objective == "pretraining":
        tokens = _token_kl(dense.prediction_logits, other.prediction_logits)
        sentence = categorical_kl(dense.seq_relationship_logits, other.seq_relationship_logits).sum()
        return sentence + MASKED_FRACTION * (tokens * mask).sum()
    per_token = _token_kl(dense.logits, other.logits)
    if objective == "seq2seq_lm":
        return (per_token * inputs["decoder_attention_mask"]).sum()
    return (per_token * mask).sum() * (MASKED_FRACTION if objective == "masked_lm" else 1.0)


def _classification(model: PreTrainedModel, dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        pairs = [torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (dense, other)]
        return categorical_kl(*pairs).sum()
    if dense.shape[-1] == 1 or problem == "regression":
        return 0.5 * (dense.float() - other.float()).square().sum()
    return categorical_kl(dense, other).sum()


def _embedding(objective: str, inputs: dict[str, Any], dense: Any, other: Any) -> torch.Tensor:
    """Half the squared distance of the unit vectors over D: what a random unit probe sees; (1 - cosine) / D."""
    units = []
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    for outputs in (dense, other):
        hidden = outputs.last_hidden_state.float()
        if objective.endswith("pooler"):
            pooled = outputs.pooler_output.float()
        elif objective.endswith("cls"):
            pooled = first_tokens(hidden, mask)
        else:
            weights = mask.to(hidden).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        units.append(nn.functional.normalize(pooled, dim=-1))
    return 0.5 * (units[0] - units[1]).square().sum() / units[0].shape[-1]


def model_inputs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A padded batch of sample sequences as the model takes it: every choice is a question of its own."""
    if family_of(model)[1] == "ForMultipleChoice":
        return {name: value.unsqueeze(1) for name, value in batch.items()}
    return batch
