"""What the gradients are gradients of: the log-likelihood of an output drawn from the model's own distribution.

The second moment of these gradients is the true Fisher information with respect to the hidden states (Amari 1998;
the labels are drawn from the model, so none are needed). For a model without a distribution over outputs, an
embedding model, the output is probed with random unit vectors instead.

Every draw belongs to its sequence (its generator is seeded by the sequence's own tokens), so the statistics do not
depend on batching, order, padding or sharding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import family_of
from ..errors import TCSPError
from ..pooling import POOLINGS, pooling_of_model


class Draws:
    """Random numbers for a batch: row i comes from generators of its own, a fresh one for every call.

    So neither the other rows, nor how many numbers an earlier call took (padding lengthens rows), change anything.
    """

    def __init__(self, keys: Sequence[int]) -> None:
        self._keys = list(keys)
        self._calls = 0

    def _generators(self) -> list[np.random.Generator]:
        counter = self._calls << 192
        self._calls += 1
        return [np.random.Generator(np.random.Philox(key=key, counter=counter)) for key in self._keys]

    def uniform(self, count: int) -> torch.Tensor:
        """(batch, count) in [0, 1); a longer row begins as a shorter one does, so padding changes nothing."""
        return torch.from_numpy(np.stack([generator.random(count) for generator in self._generators()]))

    def normal(self, count: int) -> torch.Tensor:
        """(batch, count) standard normal."""
        return torch.from_numpy(np.stack([generator.standard_normal(count) for generator in self._generators()]))


def sample_categorical(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Indices (n,) drawn from softmax(logits (n, classes)) by inverting the distribution function at uniform (n,)."""
    chances = logits.detach().double().softmax(-1)
    if torch.are_deterministic_algorithms_enabled():  # sums along a row are not, on a GPU
        chances = chances.cpu()
    cumulative = chances.cumsum(-1).to(logits.device)
    points = (uniform.to(cumulative) * cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, points, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def classification(model: PreTrainedModel, outputs: Any, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
    """logits (batch, classes): categorical; one output or `regression`: Gaussian of unit variance; `multi_label`:
    independent Bernoullis."""
    logits = _upcast(outputs.logits)
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        labels = (draws.uniform(logits.shape[-1]).to(logits) < logits.detach().sigmoid()).to(logits)
        return -nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    if logits.shape[-1] == 1 or problem == "regression":
        return (draws.normal(logits.shape[-1]).to(logits) * logits).sum()
    chosen = sample_categorical(logits, draws.uniform(1).squeeze(-1).to(logits.device))
    return logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).sum()


def token_outputs(logits: torch.Tensor, valid: torch.Tensor, draws: Draws) -> torch.Tensor:
    """logits (batch, length, classes), valid (batch, length): one categorical draw for every valid position.

    Row by row over sequences, so that the logits of one sequence at a time are held in float64.
    """
    uniform = draws.uniform(logits.shape[1]).to(logits.device)
    total = logits.new_zeros((), dtype=torch.float64)
    for row, mask, points in zip(logits, valid, uniform, strict=True):
        kept = _upcast(row[mask])
        if kept.shape[0] == 0:
            continue
        chosen = sample_categorical(kept, points[: kept.shape[0]])
        total = total + kept.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).sum()
    return total


def question_answering(
    model: PreTrainedModel, outputs: Any, batch: dict[str, torch.Tensor], draws: Draws
) -> torch.Tensor:
    """start_logits and end_logits (batch, length): one categorical draw each, over the real tokens."""
    total = outputs.start_logits.new_zeros((), dtype=torch.float64)
    uniform = draws.uniform(2)
    for i, logits in enumerate((outputs.start_logits, outputs.end_logits)):
        masked = _upcast(logits).masked_fill(batch["attention_mask"] == 0, float("-inf"))
        chosen = sample_categorical(masked, uniform[:, i].to(logits.device))
        total = total + masked.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).sum()
    return total


def _masked_positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    masked = batch.get("masked_positions")
    return batch["attention_mask"].bool() if masked is None else masked


def masked_lm(model: PreTrainedModel, outputs: Any, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
    """logits (batch, length, vocabulary): a draw at every masked position."""
    return token_outputs(outputs.logits, _masked_positions(batch), draws)


def pretraining(model: PreTrainedModel, outputs: Any, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
    """Masked-LM and next-sentence draws together."""
    next_sentence = _upcast(outputs.seq_relationship_logits)
    chosen = sample_categorical(next_sentence, draws.uniform(1).squeeze(-1).to(next_sentence.device))
    likelihood = next_sentence.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).sum()
    return likelihood + token_outputs(outputs.prediction_logits, _masked_positions(batch), draws)


def token_classification(
    model: PreTrainedModel, outputs: Any, batch: dict[str, torch.Tensor], draws: Draws
) -> torch.Tensor:
    return token_outputs(outputs.logits, batch["attention_mask"].bool(), draws)


def seq2seq_lm(model: PreTrainedModel, outputs: Any, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
    """logits (batch, target length, vocabulary): a draw at every position of the decoder's input."""
    return token_outputs(outputs.logits, batch["decoder_attention_mask"].bool(), draws)


def first_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The states (batch, D) of every sequence's first real token; hidden (batch, length, D), mask (batch, length)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.long().argmax(1)]


def embedding(pooling: str) -> Callable[..., torch.Tensor]:
    """Random unit probes against the L2-normalised pooled output (batch, D)."""

    def objective(model: PreTrainedModel, outputs: Any, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
        hidden = _upcast(outputs.last_hidden_state)
        mask = batch.get("decoder_attention_mask", batch["attention_mask"])
        if pooling == "pooler":
            pooled = _upcast(outputs.pooler_output)
        elif pooling == "cls":
            pooled = first_tokens(hidden, mask)
        else:
            weights = mask.to(hidden).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        unit = nn.functional.normalize(pooled, dim=-1)
        probe = nn.functional.normalize(draws.normal(unit.shape[-1]).to(unit), dim=-1)
        return (probe * unit).sum()

    return objective


def objective_of(model: PreTrainedModel, pooling: str | None) -> tuple[str, Callable[..., torch.Tensor]]:
    """Name and function of the objective that fits the model's head.

    Args:
        pooling: of a model without a head; None: see `pooling_of_model`.

    Raises:
        TCSPError: an unknown pooling, or "pooler" for a model that has none.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise TCSPError(f"pooling is {pooling!r}; allowed: {', '.join(POOLINGS)}.")
    _, head = family_of(model)
    if head in ("Model", "EncoderModel"):
        pooling = pooling_of_model(model, pooling)
        if pooling == "pooler" and getattr(model, "pooler", None) is None:
            raise TCSPError("pooling='pooler' was asked for, but this model has no pooler; allowed: 'mean', 'cls'.")
        return f"embedding-{pooling}", embedding(pooling)
    known: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
        "ForMaskedLM": ("masked_lm", masked_lm),
        "ForPreTraining": ("pretraining", pretraining),
        "ForSequenceClassification": ("classification", classification),
        "ForMultipleChoice": ("classification", classification),
        "ForNextSentencePrediction": ("classification", classification),
        "ForTokenClassification": ("token_classification", token_classification),
        "ForQuestionAnswering": ("question_answering", question_answering),
        "ForConditionalGeneration": ("seq2seq_lm", seq2seq_lm),
    }
    return known[head]
