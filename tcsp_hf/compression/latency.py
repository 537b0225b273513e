"""A budget of time: sizes are searched by FLOPs, built with random weights, and timed beside the dense model."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import TCSPError
from ..offload import device_of
from .builder import Builder
from .plan import Costs, LossCurves, Sizes, allocate
from .request import Request

_BATCH = 8
_ROUNDS = 6
_TOLERANCE = 0.02
_REPEATS, _WARM_UP = 9, 2


def allocate_by_latency(
    builder: Builder, lengths: dict[str, float], costs: Costs, curves: LossCurves, request: Request
) -> tuple[Sizes, list[dict[str, float]]]:
    """Sizes of the least predicted loss that take at most `request.latency` of the dense model's time here.

    Returns:
        The sizes, and what was timed: rows of `flops` and `latency`, both as fractions of the dense model's.

    Raises:
        TCSPError: no sizes that were tried are that fast; the message names the fastest.
    """
    target = request.latency or 1.0
    dense_flops = costs.flops(costs.dense())
    run = _runner(builder, lengths)
    rows: list[dict[str, float]] = []
    best: tuple[float, Sizes] | None = None
    low, high, share = 0.0, 1.0, target
    for _ in range(_ROUNDS):
        try:
            sizes = allocate(
                curves, costs, share * dense_flops, request.axes, request.multiple_of, request.uniform, by_flops=True
            )
        except TCSPError:
            low = share
            share = (low + high) / 2
            continue
        with torch.random.fork_rng(devices=[]):  # its weights are random, and made on the CPU
            small: Any = builder.model_class(builder.config(sizes))
        small = small.to(device=device_of(builder.dense), dtype=builder.dense.dtype).eval()
        fraction = _time_ratio(run, builder.dense, small)
        rows.append({"flops": round(share, 4), "latency": round(fraction, 4)})
        if fraction <= target:
            low = share
            if best is None or share > best[0]:
                best = (share, sizes)
            if fraction >= target - _TOLERANCE:
                break
        else:
            high = share
        share = min(max(share * target / fraction, low + 0.25 * (high - low)), low + 0.75 * (high - low))
    if best is None:
        fastest = min((row["latency"] for row in rows), default=float("nan"))
        raise TCSPError(
            f"latency={target} was not reached with axes {request.axes} on this machine: the fastest result that was "
            f"timed takes {fastest:.3f} of the dense model's time. Ask for that, or cut more axes."
        )
    return best[1], rows


def _runner(builder: Builder, lengths: dict[str, float]) -> Callable[[PreTrainedModel], Any]:
    """Runs a model on a batch of mean length."""
    config, device = builder.dense.config, device_of(builder.dense)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randint(config.vocab_size, (_BATCH, max(1, round(lengths[stack]))), generator=generator).to(device)
        for name, stack in (("input_ids", "encoder"), ("decoder_input_ids", "decoder"))
        if stack == "encoder" or lengths["decoder"] > 0
    }
    eos = getattr(config, "eos_token_id", None)
    if builder.family == "t5" and isinstance(eos, int):
        end_once(inputs["input_ids"], eos)
    if builder.head == "ForMultipleChoice":
        inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}

    def run(model: PreTrainedModel) -> Any:
        with torch.no_grad():
            return model(**inputs)

    return run


def end_once(ids: torch.Tensor, eos: int) -> None:
    """Make the end token the last one of every row of tokens (batch, length), and no other, in place: the head of a T5
    classifier reads there."""
    ids[ids == eos] = 0 if eos else 1
    ids[:, -1] = eos


def _time_ratio(run: Callable[[PreTrainedModel], Any], dense: PreTrainedModel, small: PreTrainedModel) -> float:
    """Median time of `small` over that of `dense`, taken in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    device = device_of(dense)
    for turn in range(_WARM_UP + _REPEATS):
        for model, times in zip((dense, small), seconds, strict=True):
            _wait(device)
            started = time.perf_counter()
            run(model)
            _wait(device)
            if turn >= _WARM_UP:
                times.append(time.perf_counter() - started)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
