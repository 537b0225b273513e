"""A bounded sample of the calibration's own token sequences, kept beside the statistics.

The closed-form refit needs inputs, not only moments. The sequences with the smallest hashes are kept, up to the first
hash at which they would exceed the token budget: the sample does not depend on order, batching or sharding, and samples
of shards merge.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import TCSPError

NAMES = ("input_ids", "token_type_ids", "decoder_input_ids")
_NO_LIMIT = 1 << 128  # above every hash


def column_of(rows: Sequence[dict[str, list[int]]], name: str) -> list[list[int]] | None:
    """What every row has by this name; None where not all have it. Token types that some have are 0 in the others, as
    the model takes them there."""
    if name == "token_type_ids" and any(name in row for row in rows):
        return [row[name] if name in row else [0] * len(row["input_ids"]) for row in rows]
    return [row[name] for row in rows] if all(name in row for row in rows) else None


@dataclass(order=True)
class _Entry:
    rank: int  # negated hash: the heap's smallest is the first to go
    rows: dict[str, list[int]] = field(compare=False)


class TokenSample:
    """Sequences of token ids, at most `budget` tokens in all.

    Every sequence is a dictionary of lists: `input_ids`, perhaps `token_type_ids`, perhaps `decoder_input_ids`.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._heap: list[_Entry] = []
        self._tokens = 0
        self._limit = _NO_LIMIT  # smallest hash that was dropped: nothing from there on is ever kept

    def add(self, key: int, rows: dict[str, list[int]]) -> None:
        """Offer one sequence with its hash."""
        size = _length(rows)
        if not all(rows.values()) or size > self.budget or key >= self._limit:
            return
        heapq.heappush(self._heap, _Entry(-key, rows))
        self._tokens += size
        while self._tokens > self.budget:
            self._drop_from(-self._heap[0].rank)

    def _drop_from(self, limit: int) -> None:
        """Forget the sequences whose hashes are `limit` or greater, for good."""
        self._limit = min(self._limit, limit)
        while self._heap and -self._heap[0].rank >= self._limit:
            self._tokens -= _length(heapq.heappop(self._heap).rows)

    @property
    def tokens(self) -> int:
        return self._tokens

    def sequences(self) -> list[dict[str, list[int]]]:
        """The kept sequences, smallest hash first."""
        return [entry.rows for entry in sorted(self._heap, reverse=True)]

    @classmethod
    def merge(cls, parts: Iterable["TokenSample"]) -> "TokenSample":
        parts = list(parts)
        merged = cls(max((part.budget for part in parts), default=0))
        merged._limit = min((part._limit for part in parts), default=_NO_LIMIT)
        for part in parts:
            for entry in part._heap:
                merged.add(-entry.rank, entry.rows)
        return merged

    def tensors(self) -> dict[str, torch.Tensor]:
        """Flat int32 tensors and lengths, for safetensors. Hashes are stored as two int64 halves."""
        entries = sorted(self._heap, reverse=True)
        found = {"sample.budget": torch.tensor([self.budget])}
        if self._limit < _NO_LIMIT:
            found["sample.limit"] = torch.tensor([_halves(self._limit)])
        if not entries:
            return found
        found["sample.keys"] = torch.tensor([_halves(-entry.rank) for entry in entries])
        for name in NAMES:
            column = column_of([entry.rows for entry in entries], name)
            if column is not None:
                found[f"sample.{name}"] = torch.tensor([token for row in column for token in row], dtype=torch.int32)
                found[f"sample.{name}.lengths"] = torch.tensor([len(row) for row in column])
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "TokenSample":
        """Inverse of `tensors`; statistics without a sample give an empty one.

        Raises:
            TCSPError: the tensors contradict each other.
        """
        budget = tensors.get("sample.budget")
        sample = cls(0 if budget is None else int(_integers(tensors, "sample.budget", (1,))[0]))
        if "sample.limit" in tensors:
            sample._limit = _whole(*_integers(tensors, "sample.limit", (1, 2))[0].tolist())
        if "sample.keys" not in tensors:
            return sample
        keys = _integers(tensors, "sample.keys", (-1, 2))
        columns: dict[str, list[list[int]]] = {}
        for name in NAMES:
            if f"sample.{name}" not in tensors:
                continue
            flat = _integers(tensors, f"sample.{name}", (-1,))
            lengths = _integers(tensors, f"sample.{name}.lengths", (len(keys),))
            if bool((lengths < 0).any()) or int(lengths.sum()) != len(flat) or bool((flat < 0).any()):
                raise TCSPError(f"The statistics' token sample is damaged: {name} does not fit its lengths.")
            columns[name] = [part.tolist() for part in flat.split(lengths.tolist())]
        if "input_ids" not in columns:
            raise TCSPError("The statistics' token sample is damaged: it has no input_ids.")
        for i, halves in enumerate(keys.tolist()):
            sample.add(_whole(*halves), {name: rows[i] for name, rows in columns.items()})
        return sample


def _integers(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The integers called `name`; -1 in `shape` is any length.

    Raises:
        TCSPError: they are missing, no integers, or of another shape.
    """
    found = tensors.get(name)
    good = found is not None and found.dtype in (torch.int32, torch.int64) and found.dim() == len(shape)
    if found is None or not good or any(want not in (-1, size) for want, size in zip(shape, found.shape, strict=True)):
        raise TCSPError(f"The statistics' token sample is damaged: {name} is missing, or no integers of its shape.")
    return found


def _length(rows: dict[str, list[int]]) -> int:
    return len(rows["input_ids"]) + len(rows.get("decoder_input_ids", ()))


def _halves(key: int) -> list[int]:
    """A 128-bit hash as two signed 64-bit numbers, the high one first."""
    return [half - (1 << 64) if half >= 1 << 63 else half for half in (key >> 64, key & (1 << 64) - 1)]


def _whole(high: int, low: int) -> int:
    """Inverse of `_halves`."""
    return (high % (1 << 64)) << 64 | low % (1 << 64)
