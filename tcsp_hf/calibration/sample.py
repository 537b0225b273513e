"""A bounded sample of the calibration's own token sequences, kept beside the statistics.

The closed-form refit needs inputs, not only moments. The sequences with the smallest hashes are kept, up to the first
hash at which they would exceed the token budget: the sample does not depend on order, batching or sharding, and samples
of shards merge.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..errors import TCSPError

NAMES = ("input_ids", "token_type_ids", "decoder_input_ids")
_NO_LIMIT = 1 << 128  # above every hash


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
        if size == 0 or size > self.budget or key >= self._limit:
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
            if all(name in entry.rows for entry in entries):
                found[f"sample.{name}"] = torch.tensor(
                    [token for entry in entries for token in entry.rows[name]], dtype=torch.int32
                )
                found[f"sample.{name}.lengths"] = torch.tensor([len(entry.rows[name]) for entry in entries])
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "TokenSample":
        """Inverse of `tensors`; statistics without a sample give an empty one.

        Raises:
            TCSPError: the tensors contradict each other.
        """
        budget = tensors.get("sample.budget")
        sample = cls(0 if budget is None else int(budget.reshape(-1)[0]))
        if "sample.limit" in tensors:
            sample._limit = _whole(*tensors["sample.limit"].reshape(-1).tolist())
        keys = tensors.get("sample.keys")
        if keys is None:
            return sample
        columns: dict[str, list[list[int]]] = {}
        for name in NAMES:
            if f"sample.{name}" not in tensors:
                continue
            flat, lengths = tensors[f"sample.{name}"], tensors.get(f"sample.{name}.lengths")
            good = lengths is not None and lengths.shape == keys.shape[:1] and bool((lengths >= 0).all())
            if not good or lengths is None or int(lengths.sum()) != flat.numel():
                raise TCSPError(f"The statistics' token sample is damaged: {name} does not fit its lengths.")
            columns[name] = [part.tolist() for part in flat.split(lengths.tolist())]
        for i, halves in enumerate(keys.tolist()):
            sample.add(_whole(*halves), {name: rows[i] for name, rows in columns.items()})
        return sample


def _length(rows: dict[str, list[int]]) -> int:
    return len(rows["input_ids"]) + len(rows.get("decoder_input_ids", ()))


def _halves(key: int) -> list[int]:
    """A 128-bit hash as two signed 64-bit numbers, the high one first."""
    return [half - (1 << 64) if half >= 1 << 63 else half for half in (key >> 64, key & (1 << 64) - 1)]


def _whole(high: int, low: int) -> int:
    """Inverse of `_halves`."""
    return (high % (1 << 64)) << 64 | low % (1 << 64)
