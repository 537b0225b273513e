"""Latency of several models in one run, alternating, so that the machine's noise meets all of them."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..errors import TCSPError
from ..export.onnx import export_onnx, require_onnx

BACKENDS = ("eager", "sdpa", "compile", "onnx")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and what nine in ten calls stay below."""

    median: float
    p90: float


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


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 11, warmup: int = 2, device: torch.device | None = None
) -> dict[str, Timing]:
    """Run every call once a round; the first `warmup` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if turn >= warmup:
                seconds[name].append(1000 * (time.perf_counter() - started))
    return {
        name: Timing(statistics.median(times), sorted(times)[min(len(times) - 1, round(0.9 * (len(times) - 1)))])
        for name, times in seconds.items()
    }


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def encoder_of(model: PreTrainedModel) -> Any:
    """The model, or the encoder of an encoder-decoder."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens (batch, length), none of them padding."""
    ids = torch.randint(min(5, model.config.vocab_size - 1), model.config.vocab_size, (batch, length))
    ids = ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def compare_latency(
    dense: PreTrainedModel, small: PreTrainedModel, batch: int, length: int, rounds: int = 11, warmup: int = 2
) -> LatencyPair:
    """Time both models on the same random tokens; encoder models (or the encoder of an encoder-decoder)."""
    inputs = random_inputs(dense, batch, length)
    one, other = encoder_of(dense), encoder_of(small)
    found = alternate({"dense": lambda: one(**inputs), "small": lambda: other(**inputs)}, rounds, warmup, dense.device)
    return LatencyPair(batch, length, found["dense"].median, found["small"].median)


def flops(model: PreTrainedModel, batch: int, length: int) -> int:
    """Floating-point operations of the matrix products of one forward pass (two per multiplication and addition).

    Counted by PyTorch on a copy without memory, with attention written out.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        empty: Any = type(model)(config).eval()
    empty = encoder_of(empty)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(input_ids=torch.zeros(batch, length, dtype=torch.long, device="meta"))
    return int(counter.get_total_flops())


def parameter_bytes(model: PreTrainedModel) -> int:
    """Of all distinct parameters and buffers that one forward pass of the encoder may read, embeddings included."""
    return sum(p.numel() * p.element_size() for p in encoder_of(model).parameters())


def check_backends(names: list[str]) -> None:
    """Raises:
    TCSPError: an unknown back-end, or one whose packages are missing.
    """
    for name in names:
        if name not in BACKENDS:
            raise TCSPError(f"The back-end is {name!r}; allowed: {', '.join(BACKENDS)}.")
    if "onnx" in names:
        require_onnx()


def prepared(model: PreTrainedModel, backend: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """The model's encoder under a back-end of `BACKENDS`, as a function of its inputs.

    Raises:
        TCSPError: see `check_backends` and `export_onnx`.
    """
    check_backends([backend])
    if backend == "onnx":
        return _onnx_session(model)
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager" if backend == "eager" else "sdpa")
    encoder = encoder_of(model)
    runner = torch.compile(encoder) if backend == "compile" else encoder
    return lambda inputs: runner(**inputs)


def _onnx_session(model: PreTrainedModel) -> Callable[[dict[str, torch.Tensor]], Any]:
    runtime = require_onnx()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        written = export_onnx(model, folder)  # of a seq2seq model, the encoder comes first
        session = runtime.InferenceSession(
            f"{folder}/{next(iter(written))}", options, providers=["CPUExecutionProvider"]
        )
    read = {value.name for value in session.get_inputs()}

    def call(inputs: dict[str, torch.Tensor]) -> Any:
        fed = {name: value.numpy() for name, value in inputs.items()}
        if "token_type_ids" in read:
            fed["token_type_ids"] = 0 * fed["input_ids"]
        return session.run(None, {name: value for name, value in fed.items() if name in read})

    return call


@dataclass(frozen=True)
class GridPoint:
    """Dense against compressed at one point of the grid; `ideal` is the ratio of the FLOPs."""

    backend: str
    batch: int
    length: int
    dense: Timing
    small: Timing
    ideal: float

    @property
    def speedup(self) -> float:
        return self.dense.median / self.small.median


@torch.no_grad()
def latency_grid(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    backends: list[str],
    shapes: list[tuple[int, int]],
    rounds: int = 11,
    warmup: int = 3,
    done: Callable[[GridPoint], None] = lambda point: None,
) -> list[GridPoint]:
    """Time every back-end at every (batch, length); `done` is called after each point.

    Raises:
        TCSPError: see `check_backends`; before anything is timed.
    """
    check_backends(backends)
    points = []
    for backend in backends:
        one, other = prepared(dense, backend), prepared(small, backend)
        for batch, length in shapes:
            inputs = random_inputs(dense, batch, length)

            def run_dense(inputs: dict[str, torch.Tensor] = inputs, call: Callable[..., Any] = one) -> Any:
                return call(inputs)

            def run_small(inputs: dict[str, torch.Tensor] = inputs, call: Callable[..., Any] = other) -> Any:
                return call(inputs)

            found = alternate({"dense": run_dense, "small": run_small}, rounds, warmup, dense.device)
            ideal = flops(dense, batch, length) / flops(small, batch, length)
            points.append(GridPoint(backend, batch, length, found["dense"], found["small"], ideal))
            done(points[-1])
    return points
