"""What a compressed model really lost, on sequences of the calibration's own sample."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..calibration.divergence import divergence, model_inputs
from ..calibration.objectives import objective_of
from ..errors import TCSPError
from .least_squares import HELD_OUT_EVERY
from .streams import padded_batches

_SEQUENCES = 200
_TOKENS = 8192


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
    return stats.objective if stats.objective != "none" else objective_of(dense, "mean")[0]


def measured_loss(dense: PreTrainedModel, small: Any, stats: Calibration) -> float | None:
    """Mean divergence to the dense model, in nats per sequence; None without a sample.

    Raises:
        TCSPError: it is no finite number.
    """
    rows = probe_sequences(stats, _SEQUENCES, _TOKENS)
    if not rows:
        return None
    objective = objective_name(dense, stats)
    total, training = 0.0, [module for module in dense.modules() if module.training]
    dense.eval()
    with torch.no_grad():
        for batch in padded_batches(rows, dense.device):
            inputs = model_inputs(dense, batch)
            expected, found = dense(**inputs), small(**inputs)
            if objective.startswith("embedding"):
                found.last_hidden_state = small.lift(found.last_hidden_state)
            total += float(divergence(dense, objective, batch, expected, found))
    for module in training:
        module.training = True
    if not math.isfinite(total):
        raise TCSPError(
            "The compressed model's outputs on the calibration's own sequences hold a NaN or an infinity: compress in "
            "float32 (load the dense model with dtype=torch.float32), or to a larger size."
        )
    return total / len(rows)
