"""How long work took: by the clock on the wall, and of the processor's own time, which other work leaves alone."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Took:
    """Seconds; `processor` sums over this process's threads, and is None where an accelerator does the work."""

    wall: float
    processor: float | None

    def __add__(self, other: "Took") -> "Took":
        known = self.processor is not None and other.processor is not None
        return Took(self.wall + other.wall, (self.processor or 0.0) + (other.processor or 0.0) if known else None)

    def fields(self) -> dict[str, Any]:
        """As JSON has them."""
        return asdict(self)


NOTHING = Took(0.0, 0.0)


class Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> Took:
        on_processor = not torch.accelerator.is_available()
        processor = time.process_time() - self._processor if on_processor else None
        return Took(time.perf_counter() - self._wall, processor)
