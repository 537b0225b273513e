"""One process or many: gather results on the first rank, send its result to all, and let all see an error."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .errors import TCSPError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """(0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_every_rank(make: Callable[[], T]) -> list[T]:
    """Every rank's result on the first rank, an empty list on the others.

    Raises:
        TCSPError: on all ranks, if any failed.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [make()]
    result, error = _attempt(make)
    errors: list[Any] = [None] * size
    dist.all_gather_object(errors, error)
    failed = [(i, text) for i, text in enumerate(errors) if text is not None]
    if failed:
        raise TCSPError(f"Process {failed[0][0]} of {size} failed: {failed[0][1]}")
    results: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(result, results)
    return results or []


def on_first_rank(make: Callable[[], T]) -> T:
    """The first rank's result on every rank: equal to the last bit.

    Raises:
        TCSPError: on all ranks, if the first one failed.
    """
    rank, size = rank_and_size()
    if size == 1:
        return make()
    sent: list[Any] = list(_attempt(make)) if rank == 0 else [None, None]
    dist.broadcast_object_list(sent)
    if sent[1] is not None:
        raise TCSPError(f"Process 0 of {size} failed: {sent[1]}")
    return sent[0]


def unwrap(trainer: Any) -> None:
    """Let go of the `DistributedDataParallel` that a `Trainer` put around its model, so that the group can be left.

    As the last owner of a group that is gone it would join the group's threads while it holds the interpreter, which
    they may be waiting for: the process would never end.
    """
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()


def _attempt(make: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return make(), None
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        return None, f"{type(error).__name__}: {error}"
