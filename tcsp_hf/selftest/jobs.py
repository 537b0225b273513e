"""The commands that are disturbed, what they start from, and how to see whether a result is whole."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from ..calibration import Calibration
from ..errors import TCSPError
from ..files import set_aside
from ..publish.checkpoint import read_checkpoint
from .tiny import save_inputs

Command = Callable[[list[str]], None]
"""Runs one `tcsp` command line, given without the word `tcsp`; raises what goes wrong."""
Digest = dict[str, str]

_NOTES = {"notes.txt": "mine", "mine/data.bin": "x" * 1000, "out.txt": "not the output"}
_VOLATILE = ("results.json",)  # holds seconds


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        arguments: words of the command; `{inputs}` and `{work}` are filled in.
        check: raises unless the output folder is whole and can be loaded.
        start_from: a folder of the inputs that is copied to `out` first (the user's own).
    """

    name: str
    arguments: tuple[str, ...]
    check: Callable[[Path], object]
    start_from: str | None = None

    def words(self, inputs: Path, work: Path) -> list[str]:
        return [word.format(inputs=inputs, work=work) for word in self.arguments]


def _check_compressed(folder: Path) -> None:
    read_checkpoint(folder)
    AutoModelForSequenceClassification.from_pretrained(folder)


def _check_card(folder: Path) -> None:
    read_checkpoint(folder)
    if not (folder / "README.md").read_text(encoding="utf-8").startswith("---\n"):
        raise TCSPError(f"{folder} has no card.")


_CALIBRATE = ("calibrate", "{inputs}/bert", "--data", "{inputs}/texts.txt", "-o", "{work}/out", "-q")
_COMPRESS = (
    *("compress", "{inputs}/bert", "--stats", "{inputs}/stats", "--hidden-size", "8", "--no-refit"),
    *("-o", "{work}/out", "-q"),
)
_TRAIN = (
    *("train", "--model", "{inputs}/bert", "--data", "{inputs}/texts.txt", "--hidden-size", "8", "--epochs", "2"),
    *("--train-samples", "24", "--batch-size", "16", "--checkpoints", "{work}/run", "-o", "{work}/out", "-q"),
)
JOBS = (
    Job("calibrate", _CALIBRATE, Calibration.load),
    Job("calibrate --overwrite", (*_CALIBRATE, "--overwrite"), Calibration.load, start_from="old"),
    Job("compress", _COMPRESS, _check_compressed),
    Job("train", _TRAIN, _check_compressed),
    Job(
        "export",
        ("export", "{inputs}/small-t5", "{work}/out", "--format", "t5", "-q"),
        AutoModelForSeq2SeqLM.from_pretrained,
    ),
    Job("card", ("card", "{work}/out"), _check_card, start_from="small"),
)
"""Everything that writes, by its own command line."""


def prepare(inputs: Path, command: Command) -> None:
    """Make what the jobs start from: dense models, statistics, compressed checkpoints, and an older output."""
    save_inputs(inputs)
    bert, t5, texts = (str(inputs / name) for name in ("bert", "t5", "texts.txt"))
    command(["calibrate", bert, "--data", texts, "-o", str(inputs / "stats"), "-q"])
    command(["calibrate", bert, "--data", texts, "-o", str(inputs / "old"), "-q", "--seed", "1"])
    command(["calibrate", t5, "--data", texts, "-o", str(inputs / "stats-t5"), "-q"])
    command(["compress", bert, "--stats", str(inputs / "stats"), "--hidden-size", "8", "-o", str(inputs / "small")])
    (inputs / "small" / "README.md").unlink()
    words = ["--stats", str(inputs / "stats-t5"), "--hidden-size", "8", "--no-refit", "-o", str(inputs / "small-t5")]
    command(["compress", t5, *words])


def lay_out(work: Path, inputs: Path, job: Job) -> Digest:
    """A fresh folder with files of a user and, where the job needs it, the folder `out`; what is in it."""
    shutil.rmtree(work, ignore_errors=True)
    for name, text in _NOTES.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text, encoding="utf-8")
    if job.start_from is not None:
        shutil.copytree(inputs / job.start_from, work / "out")
    return digest(work / "out")


def digest(folder: Path) -> Digest:
    """SHA-256 of every file below, by its path; files that hold times are only named."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            found[name] = "" if name in _VOLATILE else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def lost(work: Path, inputs: Path, before: Digest) -> str | None:
    """Which file of the user's is not as it was; None when all are."""
    for name, text in _NOTES.items():
        path = work / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            return name
    return None if digest(inputs) == before else "one of the inputs"


def not_whole(work: Path, job: Job, start: Digest, end: Digest) -> str | None:
    """Why `out` is neither as it was nor the whole result; None when it is one of them."""
    out = work / "out"
    found = digest(out)
    if found in (start, end):
        return None
    visible = {name: value for name, value in found.items() if not name.startswith(".")}
    if job.name == "card" and visible in (start, end):
        return None
    aside = [digest(old) for old in set_aside(out)]
    if not out.exists() and start in aside:
        return None  # between two renames: the next run puts it back
    return f"out holds {sorted(found) or 'nothing'}"
