"""Calibration on several processes, each with a share of the data."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..errors import TCSPError
from ..ranks import on_every_rank, on_first_rank, rank_and_size
from .inputs import check_kind
from .run import NoData, calibrate
from .statistics import Calibration


class Share(Iterable[Any]):
    """Every size-th item of the data, from the rank-th on; of the first `limit` items if given."""

    def __init__(self, data: Iterable[Any], rank: int, size: int, limit: int | None) -> None:
        self._data, self._rank, self._size, self._limit = data, rank, size, limit

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._data), self._rank, self._limit, self._size)

    def __len__(self) -> int:
        if not isinstance(self._data, Sized):
            raise TypeError("a stream has no length")
        count = len(self._data) if self._limit is None else min(len(self._data), self._limit)
        return len(range(self._rank, count, self._size))


def calibrate_on_ranks(
    model: PreTrainedModel, data: Any, *, max_sequences: int | None = None, progress: bool | None = None, **options: Any
) -> Calibration:
    """As `calibrate`, every process of torch.distributed on its share of `data`.

    All processes return the statistics of all the data, equal to the last bit. Without torch.distributed it is
    `calibrate` itself. The other arguments are those of `calibrate`.

    Raises:
        TCSPError: on all processes, if any of them failed; a `DataLoader` is refused (give what it loads).
    """
    rank, size = rank_and_size()
    if size == 1:
        return calibrate(model, data, max_sequences=max_sequences, progress=progress, **options)
    check_kind(data)
    if isinstance(data, DataLoader):
        raise TCSPError(f"data is a {type(data).__name__}; on several processes it must be texts or rows of tokens.")
    share = Share(data, rank, size, max_sequences)

    def part() -> Calibration | None:
        try:
            return calibrate(model, share, progress=progress if rank == 0 else False, **options)
        except NoData:
            return None  # fewer sequences than processes

    parts = [found for found in on_every_rank(part) if found is not None]

    def merged() -> Calibration:
        if not parts:
            raise NoData("The calibration data is empty or only padding: give at least one sequence.")
        return Calibration.merge(parts)

    return on_first_rank(merged)


@contextmanager
def launched() -> Iterator[bool]:
    """Join the processes that torchrun or `accelerate launch` started; whether this one is the first.

    The statistics live on the processor, so the processes talk by gloo, whatever the model runs on.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if several:
        dist.init_process_group("gloo")
    try:
        yield rank_and_size()[0] == 0
    finally:
        if several:
            dist.destroy_process_group()


def device_of_this_process(device: str) -> str:
    """`device`; of several processes on one machine each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device
