"""Latency of two models in one run, alternating, so that the machine's noise meets both."""

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LatencyPair:
    """Median milliseconds of one forward pass at (batch, length)."""

    batch: int
    length: int
    dense_ms: float
    small_ms: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.small_ms


@torch.no_grad()
def compare_latency(
    dense: PreTrainedModel, small: PreTrainedModel, batch: int, length: int, rounds: int = 11, warmup: int = 2
) -> LatencyPair:
    """Time both models on the same random tokens; encoder models (or the encoder of an encoder-decoder)."""
    ids = torch.randint(5, dense.config.vocab_size, (batch, length), device=dense.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models = [model.get_encoder() if model.config.is_encoder_decoder else model for model in (dense, small)]
    seconds: list[list[float]] = [[], []]
    for turn in range(warmup + rounds):
        for model, times in zip(models, seconds, strict=True):
            _wait(ids.device)
            started = time.perf_counter()
            model(**inputs)
            _wait(ids.device)
            if turn >= warmup:
                times.append(time.perf_counter() - started)
    medians = [1000 * statistics.median(times) for times in seconds]
    return LatencyPair(batch, length, medians[0], medians[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
