"""What a calibration costs beside the passes that it cannot do without, in one alternating run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from ..calibration import Calibration, calibrate
from ..calibration.inputs import Batch, InputOptions, batches
from ..compression.subspace import spectrum
from .latency import CLOCKS, alternate
from .memory import PeakMemory

EPSILON = 0.3
"""As the default of `compress`."""


@dataclass(frozen=True)
class CostRow:
    """Seconds of one shape and number of tokens.

    Attributes:
        forward, backward: the plain forward pass over the same batches, and forward and backward together, with respect
            to the hidden states alone (no gradient of a parameter): the limits.
        sigma, both: `calibrate` without and with gradients.
        projection: the eigen-problems of all sites (balanced).
        peak_bytes: most memory during `both`.
    """

    hidden_size: int
    layers: int
    tokens: int
    forward: float
    sigma: float
    backward: float
    both: float
    projection: float
    peak_bytes: int

    @property
    def sigma_ratio(self) -> float:
        return self.sigma / self.forward

    @property
    def both_ratio(self) -> float:
        return self.both / self.backward


def random_classifier(hidden_size: int, layers: int) -> Any:
    """A BERT classifier with random weights; heads of 64 (or fewer) entries, four neurons for each entry."""
    heads = max(1, hidden_size // 64)
    config = BertConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        num_labels=2,  # type: ignore[call-arg]  # (of every configuration, declared for none)
    )
    return BertForSequenceClassification(config).eval()


def random_rows(tokens: int, vocab_size: int, seed: int = 0) -> Iterator[dict[str, list[int]]]:
    """Sequences of 8 to 56 random tokens, `tokens` in all."""
    generator = torch.Generator().manual_seed(seed)
    while tokens > 0:
        length = min(tokens, int(torch.randint(8, 57, (1,), generator=generator)))
        yield {"input_ids": torch.randint(5, vocab_size, (length,), generator=generator).tolist()}
        tokens -= length


def measure_cost(
    model: PreTrainedModel, tokens: int, batch_size: int = 32, rounds: int = 3, clock: str = "wall"
) -> CostRow:
    """Time a model that classifies on random rows, and solve the eigen-problems of its sites; clock: see `CLOCKS`."""
    config = model.config
    rows = list(random_rows(tokens, config.vocab_size))
    options = InputOptions(
        tokenizer=None,
        batch_size=batch_size,
        max_length=config.max_position_embeddings,
        max_sequences=None,
        text_columns=None,
        max_target_length=1,
        targets=False,
        pad_token_id=0,
        vocab_size=config.vocab_size,
    )
    ready = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches(rows, options)]

    def with_gradients() -> Calibration:
        return calibrate(model, rows, batch_size=batch_size, sample_tokens=0, progress=False)

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: plain_forward(model, ready),
        "sigma": lambda: calibrate(model, rows, batch_size=batch_size, sample_tokens=0, fisher=False, progress=False),
        "backward": lambda: plain_backward(model, ready),
        "both": with_gradients,
    }
    found = alternate(calls, rounds, 1, model.device, clock=CLOCKS[clock])
    with PeakMemory(model.device) as memory:
        stats = with_gradients()
    started = CLOCKS[clock]()
    solve(stats)
    projection = CLOCKS[clock]() - started
    seconds = {name: timing.median / 1000 for name, timing in found.items()}
    return CostRow(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        tokens=stats.tokens,
        projection=projection,
        peak_bytes=memory.peak,
        **seconds,
    )


@torch.no_grad()
def plain_forward(model: PreTrainedModel, ready: list[Batch]) -> None:
    for batch in ready:
        model(**batch)


def plain_backward(model: PreTrainedModel, ready: list[Batch]) -> None:
    """Forward and backward with respect to the hidden states; parameters are left as they were."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    table: Any = model.get_input_embeddings()
    handle = table.register_forward_hook(lambda _module, _args, output: output.detach().requires_grad_(True))
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        for batch in ready:
            model(**batch).logits.log_softmax(-1)[:, 0].sum().backward()
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


def solve(stats: Calibration) -> None:
    """The eigen-problems of every site, one after the other; nothing is kept."""
    for site in stats.sites.values():
        spectrum("balanced", site.second_moment, site.fisher, EPSILON)


def memory_growth(model: PreTrainedModel, few: int, many: int, batch_size: int = 32) -> tuple[int, int]:
    """Peak memory in bytes while `few` and while `many` sequences of 16 tokens are streamed."""
    peaks = []
    for count in (few, few, many):  # the first run warms up
        stream = ({"input_ids": [5 + (i + j) % 100 for j in range(16)]} for i in range(count))
        with PeakMemory(model.device) as memory:
            calibrate(model, stream, batch_size=batch_size, sample_tokens=4096, progress=False)
        peaks.append(memory.peak)
    return peaks[1], peaks[2]
