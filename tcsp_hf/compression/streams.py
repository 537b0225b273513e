"""The calibration sample packed without padding, and activations kept on disk while the refit walks through layers."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..calibration.sample import NAMES, column_of
from .least_squares import HELD_OUT_EVERY

GROUP_TOKENS = 1024


@dataclass(frozen=True)
class Group:
    """Sequences of one length: tokens start .. start + count * length of the packed sample; `members` are their
    indices in the sample."""

    start: int
    count: int
    length: int
    members: tuple[int, ...] = ()

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)


class PackedSample:
    """Token sequences one after the other, grouped by exact length.

    Attributes:
        tokens: number of tokens.
        groups: in packed order; `GROUP_TOKENS` tokens at most (and as many that a decoder's attend to), unless one
            sequence has more.
        input_ids, token_type_ids, positions: (tokens,) int64.
        held_out: (tokens,) bool, tokens of the sequences that choose the regularisation.
    """

    def __init__(self, sequences: Sequence[dict[str, list[int]]], column: str = "input_ids") -> None:
        """column: `"input_ids"` or `"decoder_input_ids"`, whose tokens are packed."""
        inputs = [len(row["input_ids"]) for row in sequences]  # what a decoder's tokens attend to comes along
        ordered = sorted(range(len(sequences)), key=lambda i: (len(sequences[i][column]), inputs[i], i))
        ids: list[int] = []
        types: list[int] = []
        held: list[bool] = []
        self.groups: list[Group] = []
        self._places: dict[int, tuple[int, int]] = {}
        at = 0
        while at < len(ordered):
            length = len(sequences[ordered[at]][column])
            members: list[int] = []
            while at < len(ordered) and len(sequences[ordered[at]][column]) == length:
                longest = max(length, inputs[ordered[at]])  # of the members so far too: they are sorted
                if members and (len(members) + 1) * longest > GROUP_TOKENS:
                    break
                members.append(ordered[at])
                at += 1
            if length == 0:
                continue
            self.groups.append(Group(len(ids), len(members), length, tuple(members)))
            for i in members:
                row = sequences[i]
                self._places[i] = (len(ids), length)
                ids += row[column]
                types += row.get("token_type_ids", [0] * length)
                held += [i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] * length
        self.tokens = len(ids)
        self.input_ids = torch.tensor(ids)
        self.token_type_ids = torch.tensor(types)
        self.held_out = torch.tensor(held, dtype=torch.bool)
        positions = [torch.arange(group.length).repeat(group.count) for group in self.groups]
        self.positions = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)

    def padded_rows(self, members: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed rows of these sequences (n, longest), and which of them are real; the others repeat a row."""
        places = torch.tensor([self._places[i] for i in members])
        offset = torch.arange(int(places[:, 1].max()))
        real = offset < places[:, 1:]
        return places[:, :1] + offset * real, real


def padded_batches(
    sequences: Sequence[dict[str, list[int]]], device: torch.device, max_tokens: int = GROUP_TOKENS
) -> list[dict[str, torch.Tensor]]:
    """The sequences sorted by length, padded with zeros, with masks; at most `max_tokens` entries in a batch."""
    ordered = sorted(sequences, key=lambda row: (len(row["input_ids"]), len(row.get("decoder_input_ids", ()))))
    batches: list[dict[str, torch.Tensor]] = []
    members: list[dict[str, list[int]]] = []

    def close() -> None:
        if members:
            batch: dict[str, torch.Tensor] = {}
            for name in NAMES:
                column = column_of(members, name)
                if column is None:
                    continue
                rows = [torch.tensor(row, dtype=torch.int64) for row in column]
                batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
                if name in ("input_ids", "decoder_input_ids"):
                    ones = [torch.ones_like(row) for row in rows]
                    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True).to(device)
                    batch["attention_mask" if name == "input_ids" else "decoder_attention_mask"] = mask
            batches.append(batch)
            members.clear()

    for row in ordered:
        longest = max(len(row["input_ids"]), len(row.get("decoder_input_ids", ())))
        if members and (len(members) + 1) * longest > max_tokens:
            close()
        members.append(row)
    close()
    return batches


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

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, width) of any rows (n,)."""
        self._file.flush()
        whole = np.memmap(self._file, dtype=np.float32, mode="r", shape=(self.tokens, self.width))
        return torch.from_numpy(np.asarray(whole[rows.numpy()]))

    def close(self) -> None:
        self._file.close()
