"""What a compressed model really lost, on sequences of the calibration's own sample."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..calibration.divergence import divergence, model_inputs
from ..calibration.objectives import objective_of
from ..errors import TCSPError
from ..modes import evaluating
from ..offload import device_of
from .least_squares import HELD_OUT_EVERY
from .streams import GROUP_TOKENS, padded_batches

_SEQUENCES = 200
_TOKENS = 8192
_LOGITS = 2**26  # of a batch
_FACTOR = 10.0
_HARMLESS = 0.01


def probe_sequences(stats: Calibration, sequences: int, tokens: int) -> list[dict[str, list[int]]]:
    """The first held-out sequences of the sample, within both limits (at least one, where there is any)."""
    rows = stats.sample.sequences()
    held = [row for i, row in enumerate(rows) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] or rows
    chosen: list[dict[str, list[int]]] = []
    used = 0
    for row in held:
        used += max(len(row["input_ids"]), len(row.get("decoder_input_ids", ())))
        if chosen and (len(chosen) >= sequences or used > tokens):
            break
        chosen.append(row)
    return chosen


def objective_name(dense: PreTrainedModel, stats: Calibration) -> str:
    """What the model's outputs are compared by: the statistics' objective, or the head's own for those without."""
    return stats.objective if stats.objective != "none" else objective_of(dense, None)[0]


def _batch_tokens(dense: PreTrainedModel, objective: str) -> int:
    """Tokens of a batch: fewer where each has a vocabulary of logits, and that is large."""
    if objective not in ("masked_lm", "pretraining", "seq2seq_lm"):
        return GROUP_TOKENS
    return min(GROUP_TOKENS, max(64, _LOGITS // int(dense.config.vocab_size)))


def measured_loss(dense: PreTrainedModel, small: Any, stats: Calibration) -> float | None:
    """Mean divergence to the dense model, in nats per sequence; None without a sample.

    Raises:
        TCSPError: it is no finite number.
    """
    rows = probe_sequences(stats, _SEQUENCES, _TOKENS)
    if not rows:
        return None
    objective = objective_name(dense, stats)
    total = 0.0
    with evaluating(dense), torch.no_grad():
        for batch in padded_batches(rows, device_of(dense), _batch_tokens(dense, objective)):
            inputs = model_inputs(dense, batch)
            expected, found = dense(**inputs, return_dict=True), small(**inputs, return_dict=True)
            if objective.startswith("embedding"):
                found.last_hidden_state = small.lift(found.last_hidden_state)
            total += float(divergence(dense, objective, batch, expected, found))
            del expected, found  # before the next batch has its own
    if not math.isfinite(total):
        raise TCSPError(
            "The compressed model's outputs on the calibration's own sequences hold a NaN or an infinity: compress in "
            "float32 (load the dense model with dtype=torch.float32), or to a larger size."
        )
    return total / len(rows)


def doubt_about(predicted: float | None, measured: float | None, embedding_size: int | None) -> str | None:
    """Why a model must not be trusted whose measured loss lies beyond what its prediction allows; None if it does not.

    Predictions are right within a factor of three on the models at hand. Beyond ten times (and more than 0.01 nats, or
    0.01 of the cosine), something else went wrong than the cut.

    Args:
        predicted, measured: nats per sequence, or (1 - cosine) / D; None where it is not known.
        embedding_size: D for an embedding model, whose losses are divided by it; None for others.
    """
    if predicted is None or measured is None:
        return None
    bound = _FACTOR * predicted + _HARMLESS / (embedding_size or 1)
    if measured <= bound:
        return None
    return (
        f"The compressed model's loss on held-out sequences is {measured:.3g}, but {predicted:.3g} was predicted (at "
        f"most {bound:.3g}, with the prediction's error): compress less, calibrate on more text, or in float32."
    )
