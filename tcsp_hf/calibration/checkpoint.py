"""A calibration that was killed goes on where it was: its sums in one file that is replaced whole."""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import TCSPError
from .inputs import Batch

_VERSION = 1


@dataclass
class Progress:
    """How far a calibration is.

    Attributes:
        batches: number of batches whose sums are in.
        digest: hash of all of them, in their order.
        record: other numbers and strings of the calibration (JSON).
        tensors: its sums.
    """

    batches: int = 0
    digest: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Checkpoint:
    """The file of one process in a folder, and which batches it has seen.

    The first batches that come are those of the interrupted run: they are compared and left out, no model runs on them.
    """

    def __init__(
        self, folder: str | os.PathLike[str], arguments: dict[str, Any], every: int, part: str = "of-1-rank-0"
    ) -> None:
        """
        Args:
            folder: made if it is missing; nothing but our own files in it is touched.
            arguments: name -> value of whatever the sums depend on, besides the data.
            every: batches between two writes.
            part: which process this is.

        Raises:
            TCSPError: the folder cannot be written, or its checkpoint is damaged or of other arguments.
        """
        self._arguments = json.loads(json.dumps(arguments))
        self._every = every
        self._path = Path(folder) / f"calibration-{part}.safetensors"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for left in self._path.parent.glob(f".{self._path.name}.*.partial"):
                left.unlink()  # of a run that was killed while it wrote
            others = sorted(path.name for path in self._path.parent.glob("calibration-of-*.safetensors"))
        except OSError as error:
            raise TCSPError(f"The checkpoint folder {folder} cannot be written: {error}") from error
        mine = self._path.name.partition("-rank-")[0]
        other = next((name for name in others if name.partition("-rank-")[0] != mine), None)
        if other is not None:
            raise TCSPError(
                f"The checkpoint {self._path.parent / other} is of another number of processes: start as many, or name "
                "another folder."
            )
        self.found = self._read() if self._path.is_file() else Progress()
        self._batches = 0
        self._digest = ""

    def is_done(self, batch: Batch) -> bool:
        """Whether the sums hold this batch already; to be asked for every batch, in order.

        Raises:
            TCSPError: the batches so far are not those of the checkpoint.
        """
        digest = hashlib.sha256(self._digest.encode())
        for name in sorted(batch):
            value = batch[name].cpu().contiguous()
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.numpy().tobytes())
        self._batches, self._digest = self._batches + 1, digest.hexdigest()
        if self._batches == self.found.batches and self._digest != self.found.digest:
            raise TCSPError(
                f"The checkpoint {self._path} is of other data: its first {self.found.batches} batches were not these. "
                "Give the same data in the same order, or name another folder."
            )
        return self._batches <= self.found.batches

    def is_due(self) -> bool:
        """Whether the sums are to be written after this batch."""
        return self._batches % self._every == 0

    def write(self, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Replace the file: all of it or nothing."""
        header = {
            "version": _VERSION,
            "arguments": self._arguments,
            "batches": self._batches,
            "digest": self._digest,
            "record": record,
        }
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", suffix=".partial", dir=self._path.parent)
        os.close(handle)
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, name, {"tcsp": json.dumps(header)})
            os.replace(name, self._path)
        finally:
            Path(name).unlink(missing_ok=True)

    def finish(self) -> None:
        """The data is over.

        Raises:
            TCSPError: before the checkpoint's last batch came.
        """
        if self._batches < self.found.batches:
            raise TCSPError(
                f"The checkpoint {self._path} is of other data: it has seen {self.found.batches} batches, and these "
                f"are {self._batches}. Give the same data in the same order, or name another folder."
            )

    def _read(self) -> Progress:
        try:
            with safe_open(self._path, "pt") as file:
                header = json.loads((file.metadata() or {})["tcsp"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = Progress(int(header["batches"]), str(header["digest"]), header["record"], tensors)
            arguments, version = dict(header["arguments"]), header["version"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise TCSPError(f"The checkpoint {self._path} is damaged ({error}): remove it to start anew.") from error
        if version != _VERSION:
            raise TCSPError(
                f"The checkpoint {self._path} has version {version}, and this version of tcsp_hf reads {_VERSION}: "
                "remove it to start anew."
            )
        for name in {**self._arguments, **arguments}:
            mine, theirs = self._arguments.get(name), arguments.get(name)
            if mine != theirs:
                raise TCSPError(
                    f"The checkpoint {self._path} is of a calibration with {name} {theirs!r}, and this one has "
                    f"{mine!r}: name another folder."
                )
        return found


def remove_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Remove the files of a finished calibration, and the folder if nothing else is in it."""
    for path in Path(folder).glob("calibration-of-*.safetensors"):
        path.unlink()
    if not any(Path(folder).iterdir()):
        Path(folder).rmdir()
