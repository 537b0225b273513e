"""Memory that large matrices leave behind."""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import psutil

_WORTH = 4 * 2**20
"""Bytes: holes of smaller matrices are used again soon, and looking through the heap takes a millisecond or more."""

_Item = TypeVar("_Item")

_BATCHES = 6  # batches' rows: one batch has four matrices of them, which are wanted again at once


@cache
def _malloc_trim() -> Any:
    """glibc's `malloc_trim`; None with other allocators."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Give freed memory back to the system.

    glibc keeps the pages of what was freed from its heap, blocks of up to 32 MB among them.
    """
    found = _malloc_trim()
    if found is not None:
        found(0)


def give_back(freed: int) -> None:
    """`trim` where matrices of `freed` bytes came and went."""
    if freed >= _WORTH:
        trim()


class Growth:
    """Gives freed memory back whenever the process has grown by some batches' rows since the last time.

    Tensors of ever other sizes leave holes that the next ones do not fit into.
    """

    def __init__(self, rows: int, entries: int) -> None:
        """rows, entries: of a batch, float32. Nothing is watched where it is small."""
        self._bound = _BATCHES * 4 * rows * entries
        self._process = psutil.Process() if self._bound >= _WORTH and _malloc_trim() is not None else None
        self._start = self._resident()

    def _resident(self) -> int:
        return 0 if self._process is None else int(self._process.memory_info().rss)

    def between(self, batches: Iterable[_Item]) -> Iterator[_Item]:
        """The same batches, with a look at the process between them, when little but a batch's rows is in use."""
        for batch in batches:
            yield batch
            self._look()

    def _look(self) -> None:
        if self._resident() - self._start > self._bound:
            trim()
            self._start = self._resident()
