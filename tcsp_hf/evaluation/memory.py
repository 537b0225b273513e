"""Peak memory of a piece of work, and what a compression needs at least."""

import threading
from types import TracebackType
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from ..compression.memory import trim
from ..compression.streams import GROUP_TOKENS

_INTERVAL = 0.01


class PeakMemory:
    """Context: the most memory in use while it is open, in bytes, as `peak`; `start` was in use before.

    On a CUDA device what torch allocated there; elsewhere the resident memory of this process, read a hundred times a
    second (the high-water mark of the operating system would remember earlier work).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.start = 0
        self.peak = 0

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._read()

    def _read(self) -> None:
        self.peak = max(self.peak, int(self._process.memory_info().rss))

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.start = torch.cuda.memory_allocated(self._device)
        else:
            trim()  # holes of earlier work would take what is new
            self._read()
            self.start = self.peak
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._thread.join()
            self._read()


def compression_memory(dense: PreTrainedModel) -> int:
    """Bytes of a result as large as the dense model, one block's normal equations, and one batch of its rows.

    The yardstick for what search and refit take beside the loaded model. Solving the equations takes a few copies of
    them more.
    """
    config: Any = dense.config
    bert = config.model_type == "bert"
    inputs = config.intermediate_size + config.hidden_size + 1 if bert else config.d_ff
    equations = 2 * inputs * (inputs + config.hidden_size) * 8
    batch = GROUP_TOKENS * (inputs + config.hidden_size) * 4
    return sum(p.numel() * p.element_size() for p in dense.parameters()) + equations + batch
