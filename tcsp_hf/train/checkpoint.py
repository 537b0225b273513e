"""What a checkpoint of the trainer holds beside transformers' own files, and which checkpoint to resume from."""

import json
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TCSPError
from ..files import write_whole
from .sites import SiteTargets

logger = logging.getLogger("tcsp_hf")
_RECORD, _TARGETS = "tcsp_trainer.json", "tcsp_trainer.safetensors"
_STATE = "trainer_state.json"
_RUN = "tcsp_run.json"


@dataclass(frozen=True)
class Record:
    """Of a compression that a checkpoint goes back to.

    Attributes:
        budget: what the sizes were chosen by.
        model_fingerprint: of the dense model.
    """

    budget: dict[str, Any]
    model_fingerprint: str

    def save(self, folder: Path) -> None:
        text = json.dumps({"budget": self.budget, "model_fingerprint": self.model_fingerprint}, indent=2)
        (folder / _RECORD).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Raises TCSPError where a checkpoint has none, or a broken one."""
        try:
            found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            return cls(dict(found["budget"]), str(found["model_fingerprint"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TCSPError(
                f"{folder} cannot be resumed from: {_RECORD} is missing or damaged ({error}). It must be a checkpoint "
                "of a TCSP trainer that compressed a dense model, saved with save_only_model=False."
            ) from error


def save_targets(folder: Path, targets: SiteTargets) -> None:
    targets.save(folder / _TARGETS)


def load_targets(folder: Path) -> SiteTargets | None:
    return SiteTargets.load(folder / _TARGETS) if (folder / _TARGETS).is_file() else None


def checkpoint_to_resume(wanted: str | os.PathLike[str] | bool | None, output_dir: str) -> Path | None:
    """The folder to resume from: the one named, for True the last complete one, None for a fresh start.

    The state is what a checkpoint's writing ends with: without it, the run was killed in between.

    Raises:
        TCSPError: there is no such complete checkpoint.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is not True:
        folder = Path(wanted)
        if not _is_complete(folder):
            raise TCSPError(f"{folder} is no complete checkpoint: {_STATE} is missing or damaged.")
        return folder
    last = last_complete(output_dir)
    if last is None:
        raise TCSPError(f"There is no complete checkpoint in {output_dir}: train without resume_from_checkpoint first.")
    return last


def last_complete(output_dir: str) -> Path | None:
    """The last complete checkpoint of a trainer's folder; None where a run was killed before there was one."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: _step(path), reverse=True)
    for folder in found:
        if _is_complete(folder):
            return folder
        logger.warning("%s is incomplete (the run was killed while writing it): it is passed over.", folder)
    return None


def claim(folder: Path, run: dict[str, Any]) -> Path | None:
    """Where a run that was killed goes on: the last complete checkpoint in its folder, None where there is none yet.

    Args:
        run: all that the trained weights depend on. It is kept in the folder, which from then on is this run's.

    Raises:
        TCSPError: the checkpoints there are of another run, or nothing says of which.
    """
    last, run = last_complete(str(folder)), json.loads(json.dumps(run))
    if last is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _RUN, json.dumps(run, indent=2) + "\n")
        return None
    try:
        found = dict(json.loads((folder / _RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TCSPError(
            f"{folder} holds checkpoints, but {_RUN}, which says of which run, is missing or damaged ({error}): name "
            "another folder."
        ) from error
    for name, value in run.items():
        if found.get(name) != value:
            raise TCSPError(
                f"{folder} holds checkpoints of a run with {name}={found.get(name)!r}, but now {name} is {value!r}: go "
                "on with the same value, or name another folder."
            )
    return last


def _step(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_resumable(folder: Path, budget: dict[str, Any], fingerprints: Collection[str]) -> Record:
    """The record of a checkpoint, which must go back to this dense model and this budget.

    Args:
        fingerprints: that the dense model may have been recorded by.

    Raises:
        TCSPError: it is of a dense model, of another one, or was cut by another budget.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TCSPError(f"{folder} holds no model to resume from: config.json cannot be read ({error}).") from error
    if not str(config.get("model_type", "")).startswith("tcsp_"):
        raise TCSPError(
            f"{folder} is a checkpoint of a dense model (model_type {config.get('model_type')!r}): a TCSP trainer "
            "resumes from a compressed one. Load it as the dense model and train without resume_from_checkpoint."
        )
    record = Record.load(folder)
    for name, value in budget.items():
        if record.budget.get(name) != value:
            raise TCSPError(
                f"{folder} was compressed with {name}={record.budget.get(name)!r}, but now {name} is {value!r}: resume "
                "with the same value, or start anew in another output_dir."
            )
    if record.model_fingerprint not in fingerprints:
        raise TCSPError(f"{folder} was compressed from another dense model: give the one that the run began with.")
    return record
