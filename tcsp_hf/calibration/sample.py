"""A bounded sample of the calibration's own token sequences, kept beside the statistics.

The closed-form refit needs inputs, not only moments. The sequences with the smallest hashes are kept until the token
budget is full: the sample does not depend on order, batching or sharding, and samples of shards merge.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..errors import TCSPError

NAMES = ("input_ids", "token_type_ids", "decoder_input_ids")


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

    def add(self, key: int, rows: dict[str, list[int]]) -> None:
        """Offer one sequence with its hash."""
        size = _length(rows)
        if size == 0 or size > self.budget:
            return
        if self._tokens >= self.budget and self._heap and -key < self._heap[0].rank:
            return
        heapq.heappush(self._heap, _Entry(-key, rows))
        self._tokens += size
        while self._tokens > self.budget:
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
        for part in parts:
            for entry in part._heap:
                merged.add(-entry.rank, entry.rows)
        return merged

    def tensors(self) -> dict[str, torch.Tensor]:
        """Flat int32 tensors and lengths, for safetensors. Hashes are stored as two int64 halves."""
        entries = sorted(self._heap, reverse=True)
        found = {"sample.budget": torch.tensor([self.budget])}
        if not entries:
            return found
        keys = [-entry.rank for entry in entries]
        halves = [[_signed(key >> 64), _signed(key & (1 << 64) - 1)] for key in keys]
        found["sample.keys"] = torch.tensor(halves)
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
        for i, (high, low) in enumerate(keys.tolist()):
            sample.add(_unsigned(high) << 64 | _unsigned(low), {name: rows[i] for name, rows in columns.items()})
        return sample


def _length(rows: dict[str, list[int]]) -> int:
    return len(rows["input_ids"]) + len(rows.get("decoder_input_ids", ()))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _unsigned(value: int) -> int:
    return value + (1 << 64) if value < 0 else value
