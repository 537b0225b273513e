"""Latency of several models in one run, alternating, so that the machine's noise meets all of them."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..compression.latency import end_once
from ..errors import TCSPError
from ..export.onnx import export_onnx, require_onnx

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
"""Real seconds, or the processor's on this thread alone: what others take of a shared machine does not count then."""
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
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 11,
    warmup: int = 2,
    device: torch.device | None = None,
    seconds_at_most: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run every call once a round; the first `warmup` rounds do not count.

    With `seconds_at_most` no round begins after so many seconds, except that three rounds (or `rounds`, if fewer) are
    timed in any case, after one that does not count. `clock` gives seconds; see `CLOCKS`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for turn in range(warmup + rounds):
        late = seconds_at_most is not None and time.perf_counter() - begun > seconds_at_most
        if late and turn >= 1:
            warmup = min(warmup, turn)
        if late and turn >= warmup + min(3, rounds):
            break
        for name, call in calls.items():
            wait_for(device)
            started = clock()
            call()
            wait_for(device)
            if turn >= warmup:
                seconds[name].append(1000 * (clock() - started))
    return {
        name: Timing(statistics.median(times), sorted(times)[min(len(times) - 1, round(0.9 * (len(times) - 1)))])
        for name, times in seconds.items()
    }


def wait_for(device: torch.device | None) -> None:
    """Let an accelerator finish what it was given, so that a clock counts it."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def encoder_of(model: PreTrainedModel) -> Any:
    """The model, or the encoder of an encoder-decoder."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens (batch, length), none of them padding; the end token last, where a T5's head may read there."""
    ids = torch.randint(min(5, model.config.vocab_size - 1), model.config.vocab_size, (batch, length))
    end = getattr(model.config, "eos_token_id", None)
    if model.config.is_encoder_decoder and isinstance(end, int):
        end_once(ids, end)
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


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise TCSPError unless the model reads sequences of so many tokens."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise TCSPError(f"A length of {length} was asked for, but the model reads at most {longest} tokens.")


def flops(model: PreTrainedModel, batch: int, length: int, part: str = "encoder") -> int:
    """Floating-point operations of the matrix products of one forward pass (two per multiplication and addition).

    Counted by PyTorch on a copy without memory, with attention written out.

    Args:
        part: `"encoder"`, or `"prefill"`: an encoder-decoder's decoder, reading `length` tokens and as many states.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        empty: Any = type(model)(config)
        empty = empty.to(model.dtype).eval()
        ids = torch.zeros(batch, length, dtype=torch.long)
        if part == "prefill":
            given = {"encoder_outputs": memory_of(model, batch, length, "meta"), "decoder_input_ids": ids}
        else:
            empty, given = encoder_of(empty), {"input_ids": ids}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            empty(**given)
    return int(counter.get_total_flops())


def memory_of(model: PreTrainedModel, batch: int, length: int, device: Any) -> BaseModelOutput:
    """Made-up encoder states, for a decoder to read."""
    width = encoder_of(model).final_layer_norm.weight.shape[0]
    return BaseModelOutput(last_hidden_state=torch.randn(batch, length, width, device=device, dtype=model.dtype))


def token_bytes(model: PreTrainedModel) -> int:
    """What a decoder reads to write one token: its linears and the LM head, without the keys and values it keeps."""
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (".decoder." in f".{name}" or name == "lm_head")
        and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    ]
    return sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)


def parameter_bytes(model: PreTrainedModel) -> int:
    """Of all distinct parameters that one forward pass of the encoder may read, embeddings included; no buffers."""
    return sum(p.numel() * p.element_size() for p in encoder_of(model).parameters())


def check_clock(clock: str, device: str) -> None:
    """Refuse a clock before any work.

    Raises:
        TCSPError: an unknown clock, or the processor's where the work is not all on one thread of it.
    """
    if clock not in CLOCKS:
        raise TCSPError(f"--clock is {clock!r}; allowed: {', '.join(CLOCKS)}.")
    if clock == "cpu" and (device != "cpu" or torch.get_num_threads() != 1):
        raise TCSPError(
            f"--clock cpu counts one thread of the processor, but the device is {device!r} with "
            f"{torch.get_num_threads()} threads: set OMP_NUM_THREADS=1, or use --clock wall."
        )


def check_backends(names: list[str]) -> None:
    """Refuse back-ends before any work.

    Raises:
        TCSPError: an unknown back-end, or one whose packages are missing.
    """
    for name in names:
        if name not in BACKENDS:
            raise TCSPError(f"The back-end is {name!r}; allowed: {', '.join(BACKENDS)}.")
    if "onnx" in names:
        require_onnx()


Starter = Callable[[int, int], Callable[[], Any]]
"""(batch, length) -> what runs a model on such inputs."""


def prepared(model: PreTrainedModel, backend: str, part: str = "encoder", new_tokens: int = 32) -> Starter:
    """A model under a back-end of `BACKENDS`, ready for inputs of any size.

    Args:
        part: `"encoder"`; of an encoder-decoder also `"prefill"` (the decoder over `length` tokens) and `"generation"`
            (`new_tokens` tokens from given encoder states).

    Raises:
        TCSPError: see `check_backends` and `export_onnx`; a part that the back-end does not run.
    """
    check_backends([backend])
    if part != "encoder" and backend in ("compile", "onnx"):
        raise TCSPError(f"The back-end {backend!r} runs the encoder only, not the {part}.")
    if backend == "onnx":
        session = _onnx_session(model)
        return lambda batch, length: partial(session, random_inputs(model, batch, length))
    wanted = "eager" if backend == "eager" else "sdpa"
    if model.config._attn_implementation != wanted:
        model = copy.deepcopy(model)
        model.set_attn_implementation(wanted)
    runner: Any = model if part != "encoder" else encoder_of(model)

    def encode(batch: int, length: int) -> Callable[[], Any]:
        inputs = random_inputs(model, batch, length)
        # for every batch and length anew: a graph for any is slower
        chosen = torch.compile(runner, dynamic=False) if backend == "compile" else runner
        return lambda: chosen(**inputs)

    def prefill(batch: int, length: int) -> Callable[[], Any]:
        ids = random_inputs(model, batch, length)["input_ids"]
        memory = memory_of(model, batch, length, model.device)
        return lambda: runner(encoder_outputs=memory, decoder_input_ids=ids, use_cache=True)

    def generate(batch: int, length: int) -> Callable[[], Any]:
        memory = memory_of(model, batch, length, model.device)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
        return lambda: runner.generate(encoder_outputs=memory, **options)

    return {"encoder": encode, "prefill": prefill, "generation": generate}[part]


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


PARTS = ("encoder", "prefill", "generation")


@dataclass(frozen=True)
class GridPoint:
    """All models at one point of the grid.

    Attributes:
        part: of `PARTS`.
        times: of `"dense"`, `"small"` (compressed) and peers, for one call.
        ideal: what a perfect machine would gain: the ratio of the FLOPs; in generation of the bytes read for a token.
        tokens: new tokens of one call in generation, of all sequences together.
    """

    part: str
    backend: str
    batch: int
    length: int
    times: dict[str, Timing]
    ideal: float
    tokens: int = 0

    @property
    def dense(self) -> Timing:
        return self.times["dense"]

    @property
    def small(self) -> Timing:
        return self.times["small"]

    def gain(self, name: str) -> float:
        """How many times faster than dense."""
        return self.dense.median / self.times[name].median

    @property
    def speedup(self) -> float:
        return self.gain("small")


@torch.no_grad()
def latency_grid(
    models: Mapping[str, PreTrainedModel],
    backends: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rounds: int = 11,
    warmup: int = 3,
    done: Callable[[GridPoint], None] = lambda point: None,
    part: str = "encoder",
    seconds: float | None = None,
    new_tokens: int = 32,
    clock: str = "wall",
) -> list[GridPoint]:
    """Time every back-end at every (batch, length); `done` is called after each point.

    Args:
        models: `"dense"`, `"small"`, and peers; peers run under `sdpa` alone.
        rounds, warmup, seconds: see `alternate`, for each point.
        clock: of `CLOCKS`.

    Raises:
        TCSPError: see `check_backends`; before anything is timed.
    """
    check_backends(list(backends))
    dense, small = models["dense"], models["small"]
    points = []
    for backend in backends:
        chosen = {name: model for name, model in models.items() if backend == "sdpa" or name in ("dense", "small")}
        ready = {name: prepared(model, backend, part, new_tokens) for name, model in chosen.items()}
        for batch, length in shapes:
            if backend == "compile":
                torch.compiler.reset()  # no more than so many graphs are kept, and the next ones run uncompiled
            calls = {name: start(batch, length) for name, start in ready.items()}
            found = alternate(calls, rounds, warmup, dense.device, seconds, CLOCKS[clock])
            if part == "generation":
                ideal = token_bytes(dense) / token_bytes(small)
            else:
                ideal = flops(dense, batch, length, part) / flops(small, batch, length, part)
            tokens = batch * new_tokens if part == "generation" else 0
            points.append(GridPoint(part, backend, batch, length, found, ideal, tokens))
            done(points[-1])
    return points
