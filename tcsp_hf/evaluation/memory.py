"""Peak memory of a piece of work."""

import threading
from types import TracebackType

import psutil
import torch

_INTERVAL = 0.01


class PeakMemory:
    """Context: the most memory in use while it is open, in bytes, as `peak`.

    On a CUDA device what torch allocated there; elsewhere the resident memory of this process, read a hundred times a
    second (the high-water mark of the operating system would remember earlier work).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._read()

    def _read(self) -> None:
        self.peak = max(self.peak, int(self._process.memory_info().rss))

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._read()
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
