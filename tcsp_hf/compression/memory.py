"""Memory that large matrices leave behind."""

import ctypes
import sys
from functools import cache
from typing import Any

_WORTH = 4 * 2**20
"""Bytes: holes of smaller matrices are used again soon, and looking through the heap takes a millisecond or more."""


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
