"""The paper's experiment, row by row: a configuration file says model, task, how much is removed, and the mode.

Every row writes one result file, whole or not at all, and is skipped once that is there; dense models and statistics
are made once and shared by the rows that need the same.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..calibration import Calibration
from ..calibration.fingerprint import model_fingerprint
from ..clock import NOTHING, Clock, Took
from ..compression import Search, removed_fraction
from ..compression.plan import AXES
from ..data.digest import digest_of_rows
from ..errors import TCSPError
from ..files import new_folder, write_whole
from ..loading import load_model, load_tokenizer, resolve_name
from ..tasks import Task, find_task, score
from .arguments import check_teaching
from .distil import run_training, task_trainer
from .finetune import Schedule, choose_rows, finetune
from .models import load_for_task

MODES = ("retraining-free", "fine-tuned", "distilled", "from-pretrained")
_LABELS = {"model", "task", "remove", "mode"}
_TEXTS = {"model", "task", "mode", "train_split", "eval_split", "form"}
_NUMBERS = {"dense_epochs", "dense_lr", "epochs", "lr"}
_SWITCHES = {"ready", "bf16"}
_COUNTS = {
    "batch_size": 1,
    "max_length": 8,
    "seed": 0,
    "calibration_samples": 1,
    "train_samples": 1,
    "eval_samples": 1,
}
"""Whole numbers, and the least that each may be."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: of its file.
        model: folder or Hub name; fine-tuned on the task first unless `ready`.
        task: see `tasks.TASKS`.
        remove: fraction of the non-embedding parameters to remove.
        mode: `"retraining-free"` (no label, no training), `"fine-tuned"` (labels alone) or `"distilled"`, all three
            from the fine-tuned dense model; or `"from-pretrained"` (the model itself, before any training on the task,
            compressed and then fine-tuned as the dense one is, on labels alone).
        axes: what may be cut.
        ready: the model is fine-tuned on the task already.
        dense_epochs, dense_lr: of the dense model's fine-tuning, and of `"from-pretrained"`.
        epochs, lr: of the compressed model's; as many epochs as the dense one had when None.
        batch_size, max_length, seed, bf16: of both.
        distillation, temperature, hidden_weight, dropout: of `"distilled"`; see `TCSPTrainingArguments`.
        calibration_samples, train_samples, eval_samples: caps; None takes all.
        train_split, eval_split, form: None takes the task's own.
    """

    name: str
    model: str
    task: str
    remove: float
    mode: str
    axes: tuple[str, ...] = AXES
    ready: bool = False
    dense_epochs: float = 3.0
    dense_lr: float = 5e-5
    epochs: float | None = None
    lr: float = 5e-5
    batch_size: int = 32
    max_length: int | None = None
    seed: int = 0
    bf16: bool = False
    distillation: float = 0.9
    temperature: float = 2.0
    hidden_weight: float = 1.0
    dropout: bool | None = None
    calibration_samples: int = 2000
    train_samples: int | None = None
    eval_samples: int | None = None
    train_split: str = "train"
    eval_split: str | None = None
    form: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Row":
        """A row from a TOML file.

        Raises:
            TCSPError: the file is damaged, lacks a field, or holds an unknown or impossible one.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TCSPError(f"{path} cannot be read: {error}") from error
        return cls.parse(path, text)

    @classmethod
    def parse(cls, path: Path, text: str) -> "Row":
        """A row from the text of its file.

        Raises:
            TCSPError: see `read`.
        """
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise TCSPError(f"{path} cannot be read: {error}") from error
        known = {field.name for field in dataclasses.fields(cls)} - {"name"}
        for name in found:
            if name not in known:
                raise TCSPError(f"{path} has the unknown field {name!r}; allowed: {', '.join(sorted(known))}.")
        for name in sorted(_LABELS - set(found)):
            raise TCSPError(f"{path} lacks the field {name!r}.")
        for name, value in found.items():
            wanted = _refused(name, value)
            if wanted is not None:
                raise TCSPError(f"{path}: {name} is {value!r}; it must be {wanted}.")
        if "axes" in found:
            found["axes"] = tuple(found["axes"])
        row = cls(name=path.stem, **found)
        find_task(row.task)
        if not row.axes or any(axis not in AXES for axis in row.axes):
            raise TCSPError(f"{path}: axes is {list(row.axes)!r}; it must name some of {', '.join(AXES)}.")
        if row.mode not in MODES:
            raise TCSPError(f"{path}: mode is {row.mode!r}; allowed: {', '.join(MODES)}.")
        if not isinstance(row.remove, float) or not 0.0 < row.remove < 1.0:
            raise TCSPError(f"{path}: remove is {row.remove!r}; it must be a fraction between 0 and 1.")
        if row.mode == "from-pretrained" and row.ready:
            raise TCSPError(f"{path}: mode is 'from-pretrained', but ready says that the model is fine-tuned already.")
        try:
            row.schedule(dense=True)
            row.schedule()
            check_teaching(row.distillation, row.temperature, row.hidden_weight, row.dropout)
        except TCSPError as error:
            raise TCSPError(f"{path}: {error}") from error
        return row

    def schedule(self, dense: bool = False) -> Schedule:
        """How the dense, or the compressed model is trained."""
        epochs = self.dense_epochs if dense or self.epochs is None else self.epochs
        rate = self.dense_lr if dense else self.lr
        return Schedule(epochs, rate, self.batch_size, self.max_length, seed=self.seed, bf16=self.bf16)

    def cut(self) -> dict[str, Any]:
        """What is removed, and how it is chosen, as options of `TCSPTrainingArguments`."""
        return {"remove": self.remove, "axes": list(self.axes), "calibration_samples": self.calibration_samples}

    def teaching(self) -> dict[str, Any]:
        """What the dense model's part in the loss is, as options of `TCSPTrainingArguments`."""
        if self.mode in ("fine-tuned", "from-pretrained"):
            return {"distillation": 0.0}
        names = ("distillation", "temperature", "hidden_weight", "dropout")
        return {name: getattr(self, name) for name in names}

    def fields(self) -> dict[str, Any]:
        """As JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def key(self, *names: str) -> str:
        """Hash of some fields: what rows that agree on them may share."""
        text = json.dumps([self.fields()[name] for name in names])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def work(self, results: Path) -> Path:
        """Where the trainer keeps its checkpoints: another place for other settings under the same name."""
        return results / "work" / f"{self.name}-{self.key(*self.fields())}"

    @property
    def dense_key(self) -> str:
        own = () if self.ready else ("dense_epochs", "dense_lr", "batch_size", "bf16", "train_samples", "form")
        scored = ("max_length", "eval_samples", "eval_split")
        return self.key("model", "task", "seed", "ready", "train_split", *scored, *own)

    @property
    def stats_key(self) -> str:
        return f"{self.dense_key}-{self.key('calibration_samples', 'train_samples')}"


def _refused(name: str, value: Any) -> str | None:
    """What a row's field must be, where the value is of another type; None where it is right or checked elsewhere."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name in _TEXTS and not isinstance(value, str):
        return "text"
    if name in _NUMBERS and not number:
        return "a number"
    if name in _SWITCHES and not isinstance(value, bool):
        return "true or false"
    if name in _COUNTS and not (number and isinstance(value, int) and value >= _COUNTS[name]):
        return f"a whole number, at least {_COUNTS[name]}"
    if name == "axes" and not (isinstance(value, list) and all(isinstance(axis, str) for axis in value)):
        return f"a list of some of {', '.join(AXES)}"
    return None


DEFAULTS = {field.name: field.default for field in dataclasses.fields(Row) if field.default is not dataclasses.MISSING}


def read_rows(source: Path) -> list[Row]:
    """Rows of a TOML file, or of all of a folder's, by name.

    Raises:
        TCSPError: none are there, or one is not valid.
    """
    paths = [source] if source.is_file() else sorted(source.glob("*.toml"))
    if not paths:
        raise TCSPError(f"{source} holds no rows: name a .toml file or a folder of them.")
    return [Row.read(path) for path in paths]


def write_grid(
    folder: Path,
    models: Iterable[str],
    tasks: Iterable[str],
    removes: Iterable[float],
    modes: Iterable[str] = MODES,
    seeds: Iterable[int] = (0,),
    settings: Iterable[str] = (),
) -> list[Path]:
    """A configuration file for every model, task, fraction, mode and seed; none is written unless all are valid.

    Args:
        settings: further fields for all of them, each as TOML (`"dense_epochs = 5"`).

    Raises:
        TCSPError: a row that is not valid, two of one name, or one whose file is there with other settings.
    """
    texts: dict[Path, str] = {}
    there = {dataclasses.replace(row, name="") for row in read_rows(folder)} if any(folder.glob("*.toml")) else set()
    for model, task, remove, mode, seed in itertools.product(models, tasks, removes, modes, seeds):
        short = model.rstrip("/").split("/")[-1]
        path = folder / f"{short}-{task}-{100 * remove:.6g}-{mode}{f'-seed{seed}' if seed else ''}.toml"
        lines = [
            f"model = {json.dumps(model)}",
            f'task = "{task}"',
            f"remove = {remove}",
            f'mode = "{mode}"',
            f"seed = {seed}",
            *settings,
        ]
        if path in texts:
            raise TCSPError(f"Two rows would be called {path.stem}: give them one after the other, in two folders.")
        texts[path] = "\n".join(lines) + "\n"
    wanted = {path: Row.parse(path, text) for path, text in texts.items()}
    for path, row in wanted.items():
        if path.exists() and Row.read(path) != row:
            raise TCSPError(f"{path} is there with other settings: remove it, or name another folder for these rows.")
    folder.mkdir(parents=True, exist_ok=True)
    # those that are not there, perhaps under another name
    written = [path for path, row in wanted.items() if dataclasses.replace(row, name="") not in there]
    for path in written:
        write_whole(path, texts[path])
    return written


def take_known(rows: Iterable[Row], known: Path, results: Path) -> int:
    """Put results of earlier runs, perhaps of another machine, beside those of `results`; returns how many.

    Args:
        known: a `results.json`. Of its entries those count whose settings are a row's, where that has not run yet.

    Raises:
        TCSPError: it cannot be read.
    """
    try:
        entries = {entry["row"]["name"]: entry for entry in json.loads(known.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TCSPError(f"{known} is no results.json of `tcsp bench paper`: {error!r}.") from error
    taken = 0
    for row in rows:
        entry, path = entries.get(row.name), results / f"{row.name}.json"
        if entry is not None and not path.exists() and DEFAULTS | entry["row"] == row.fields():
            write_whole(path, json.dumps(entry, indent=2) + "\n")
            taken += 1
    return taken


@dataclass
class Shared:
    """What rows of one dense model use together while they follow each other; the last model's is kept.

    Attributes:
        key: of the statistics.
        calibration: statistics of the dense model; None until they are known.
        search: what was measured for other fractions.
    """

    key: str = ""
    calibration: Calibration | None = None
    search: Search = field(default_factory=Search)

    def take(self, key: str, folder: Path) -> None:
        """Turn to the model with these statistics, read from a folder where they are there."""
        if self.key != key:
            found = Calibration.load(folder) if folder.is_dir() else None
            self.key, self.calibration, self.search = key, found, Search()


def in_order(rows: list[Row]) -> list[Row]:
    """Rows of one dense model next to each other, otherwise as they are."""
    first = {row.stats_key: i for i, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: first[row.stats_key])


def run_row(
    row: Row, results: Path, quiet: bool = True, progress: bool | None = False, shared: Shared | None = None
) -> dict[str, Any]:
    """A row's result, from its file where the row has run before.

    Args:
        shared: hand the same one to rows that follow each other.

    Raises:
        TCSPError: the file there is of a row with other fields, or what is kept of other weights or rows.
    """
    path = results / f"{row.name}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if DEFAULTS | found["row"] != row.fields():  # a result may be older than a field
            raise TCSPError(
                f"{path} is the result of other settings: rename the row, or remove the file to run it again."
            )
        return found
    task = find_task(row.task)
    data = choose_rows(task.load(row.train_split), row.train_samples, row.seed)
    held_out = task.load(row.eval_split)
    held_out = held_out.select(range(min(row.eval_samples or len(held_out), len(held_out))))
    folder, dense_record = _dense(row, task, data, held_out, results, quiet, progress)
    small: Any
    if row.mode == "from-pretrained":
        folder = resolve_name(row.model)
        dense, tokenizer = load_for_task(folder, task, row.form, row.seed)[0], load_tokenizer(folder)
        small, spent = None, NOTHING  # the trainer makes it
    else:
        dense, tokenizer = load_model(folder), load_tokenizer(folder)
        small, spent = _compressed(row, task, data, dense, tokenizer, results, quiet, shared or Shared())
    took, work = None, row.work(results)
    if row.mode != "retraining-free":
        trainer = task_trainer(
            dense,
            tokenizer,
            task,
            data,
            row.schedule(dense=small is None),
            work,
            quiet=quiet,
            student=small,
            untrained=small is None,
            save_strategy="epoch",
            save_total_limit=1,
            **row.teaching(),
            **(row.cut() if small is None else {}),
        )
        small, took = run_training(trainer, row.fields())
        spent += took.whole
    result = {
        "row": row.fields(),
        "removed": removed_fraction(dense, small),
        "dense": dense_record["scores"],
        "dense_seconds": dense_record["seconds"],
        "dense_processor_seconds": dense_record.get("processor_seconds"),
        "dense_steps": dense_record["steps"],
        "scores": score(small, tokenizer, task, held_out, max_length=row.max_length, progress=progress),
        "headline": task.headline,
        "eval_rows": len(held_out),
        "seconds": round(spent.wall, 1),
        "processor_seconds": spent.processor,
        "training_seconds": None if took is None else round(took.training.wall, 3),
        "training_processor_seconds": None if took is None else took.training.processor,
        "steps": 0 if took is None else took.steps,
        "timed_steps": 0 if took is None else took.timed_steps,
        "threads": torch.get_num_threads(),
    }
    write_whole(path, json.dumps(result, indent=2) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    return result


def _dense(
    row: Row, task: Task, data: Any, held_out: Any, results: Path, quiet: bool, progress: bool | None
) -> tuple[str, dict[str, Any]]:
    """The dense fine-tuned model's folder (or name), its scores and what it took; kept for other rows."""
    kept = results / "dense" / row.dense_key
    name = resolve_name(row.model)
    model = load_model(name) if row.ready else load_for_task(name, task, row.form, row.seed)[0]
    source = _source(model, scored=held_out, **({} if row.ready else {"trained": data}))
    if kept.is_dir():
        _check_source(kept, kept / "record.json", source)
    else:
        with new_folder(kept, overwrite=True) as staging:  # its name says what it holds
            tokenizer = load_tokenizer(name)
            took = None
            if not row.ready:
                took = finetune(model, tokenizer, task, data, row.schedule(dense=True), staging / "trainer", quiet)
                model.save_pretrained(staging)
                tokenizer.save_pretrained(staging)
            record = {
                "scores": score(model, tokenizer, task, held_out, max_length=row.max_length, progress=progress),
                "seconds": None if took is None else round(took.training.wall, 3),
                "processor_seconds": None if took is None else took.training.processor,
                "steps": None if took is None else took.steps,
                "source": source,
            }
            (staging / "record.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    record = json.loads((kept / "record.json").read_text(encoding="utf-8"))
    return (name if row.ready else str(kept)), record


def _compressed(
    row: Row, task: Task, data: Any, dense: Any, tokenizer: Any, results: Path, quiet: bool, shared: Shared
) -> tuple[Any, Took]:
    """The compressed model before training, kept for other modes; what calibration, search and refit took."""
    kept = results / "compressed" / f"{row.stats_key}-{row.key('remove', 'axes')}"
    source = _source(dense, calibrated=data)
    if kept.is_dir():
        _check_source(kept, kept / "record.json", source)
    else:
        statistics = results / "statistics" / row.stats_key
        record = statistics.with_name(f"{statistics.name}.json")
        if statistics.is_dir():
            _check_source(statistics, record, source)
        shared.take(row.stats_key, statistics)
        searched = shared.search.took  # nothing where this row has to search
        trainer = task_trainer(
            dense,
            tokenizer,
            task,
            data,
            row.schedule(),
            row.work(results),
            quiet=quiet,
            calibration=shared.calibration,
            search=shared.search,
            **row.cut(),
        )
        if shared.calibration is None:
            clock = Clock()
            shared.calibration = trainer.calibrate()
            assert shared.calibration is not None  # there are no other ranks here
            record.parent.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(clock.read().fields() | {"source": source}) + "\n")
            shared.calibration.save(statistics)
        calibrated = _took(record)
        clock = Clock()
        small = trainer.compress()
        spent = calibrated + searched + clock.read()
        with new_folder(kept, overwrite=True) as staging:
            small.save_pretrained(staging)
            written = json.dumps(spent.fields() | {"source": source})
            (staging / "record.json").write_text(written + "\n", encoding="utf-8")
    return load_model(str(kept)), _took(kept / "record.json")


def _source(model: Any, **rows: Any) -> dict[str, str]:
    """What a kept folder is made from: the fingerprint of a model, and a digest of the rows under each name."""
    return {"weights": model_fingerprint(model)} | {name: digest_of_rows(data) for name, data in rows.items()}


def _check_source(kept: Path, record: Path, source: dict[str, str]) -> None:
    """Refuse a kept folder whose record names another source; older versions recorded none.

    Raises:
        TCSPError: it does.
    """
    found = json.loads(record.read_text(encoding="utf-8")).get("source", {})
    if any(found.get(name, value) != value for name, value in source.items()):
        raise TCSPError(f"{kept} was made from other weights or rows than the row names now: remove it.")


def _took(record: Path) -> Took:
    """What was written down; older versions knew the clock on the wall alone."""
    found = json.loads(record.read_text(encoding="utf-8"))
    return Took(found["wall"], found["processor"]) if "wall" in found else Took(found["seconds"], None)
