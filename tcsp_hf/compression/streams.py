"""The calibration sample packed without padding, and activations kept on disk while the refit walks through layers."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .least_squares import HELD_OUT_EVERY

_GROUP_TOKENS = 4096


@dataclass(frozen=True)
class Group:
    """Sequences of one length: tokens start .. start + count * length of the packed sample."""

    start: int
    count: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)


class PackedSample:
    """Token sequences one after the other, grouped by exact length.

    Attributes:
        tokens: number of tokens.
        groups: in packed order.
        input_ids, token_type_ids, positions: (tokens,) int64.
        first: (tokens,) bool, the first token of each sequence.
        held_out: (tokens,) bool, tokens of the sequences that choose the regularisation.
    """

    def __init__(self, sequences: Sequence[dict[str, list[int]]]) -> None:
        ordered = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]["input_ids"]), i))
        ids: list[int] = []
        types: list[int] = []
        held: list[bool] = []
        self.groups: list[Group] = []
        at = 0
        while at < len(ordered):
            length = len(sequences[ordered[at]]["input_ids"])
            members: list[int] = []
            while at < len(ordered) and len(sequences[ordered[at]]["input_ids"]) == length:
                if members and (len(members) + 1) * length > _GROUP_TOKENS:
                    break
                members.append(ordered[at])
                at += 1
            self.groups.append(Group(len(ids), len(members), length))
            for i in members:
                row = sequences[i]
                ids += row["input_ids"]
                types += row.get("token_type_ids", [0] * length)
                held += [i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] * length
        self.tokens = len(ids)
        self.sequences = len(sequences)
        self.input_ids = torch.tensor(ids)
        self.token_type_ids = torch.tensor(types)
        self.held_out = torch.tensor(held, dtype=torch.bool)
        positions = [torch.arange(group.length).repeat(group.count) for group in self.groups]
        self.positions = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
        self.first = self.positions == 0


class Stream:
    """A (tokens, width) float32 matrix in a temporary file: memory does not grow with the sample."""

    def __init__(self, tokens: int, width: int) -> None:
        self.width = width
        self.tokens = tokens
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close, or with the object)
        self._file.truncate(tokens * width * 4)

    def write(self, rows: slice, values: torch.Tensor) -> None:
        self._file.seek(rows.start * self.width * 4)
        self._file.write(values.detach().to("cpu", torch.float32).contiguous().numpy().data)

    def read(self, rows: slice) -> torch.Tensor:
        count = rows.stop - rows.start
        buffer = np.empty((count, self.width), dtype=np.float32)
        self._file.seek(rows.start * self.width * 4)
        self._file.readinto(buffer.data)
        return torch.from_numpy(buffer)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, self.tokens, _GROUP_TOKENS):
            yield self.read(slice(start, min(start + _GROUP_TOKENS, self.tokens)))

    def close(self) -> None:
        self._file.close()
