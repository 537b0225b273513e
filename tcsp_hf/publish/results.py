"""Measured results that a model card shows, as JSON beside the checkpoint."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from ..errors import TCSPError

RESULTS_FILE = "tcsp_results.json"
"""Where a checkpoint's folder keeps them; the card is filled from it."""


@dataclass(frozen=True)
class Evaluation:
    """One score of the compressed model, with the dense model's where it was measured in the same way.

    Attributes:
        task: the Hub's name of the task, e.g. `"text-classification"`.
        dataset: the Hub's name of the data (`"nyu-mll/glue"`), with `config` (`"sst2"`) and `split`.
        metric: the Hub's name of the metric (`"accuracy"`); `value` in the metric's own unit.
        dense: the same metric of the dense model, None where it was not measured.
        name: how the data is called in the card; the dataset's name when None.
    """

    task: str
    dataset: str
    split: str
    metric: str
    value: float
    dense: float | None = None
    config: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one forward pass at (batch, length), dense and compressed in one run."""

    batch: int
    length: int
    dense_ms: float
    small_ms: float

    def __post_init__(self) -> None:
        for name in ("batch", "length", "dense_ms", "small_ms"):
            if not getattr(self, name) > 0:
                raise TCSPError(f"latency: {name} is {getattr(self, name)!r}; it must be above 0.")


@dataclass(frozen=True)
class CardResults:
    """What a card shows beside what the checkpoint itself says. Everything may be missing.

    Attributes:
        command: the command line or code that made the checkpoint.
        base_model: Hub name of the dense model, where the checkpoint knows only a folder.
        license: of the dense model, by its Hub identifier (`"apache-2.0"`).
        language: of the dense model (`"en"`).
        machine: what latency was measured on.
        evaluations, latency: measured.
        pictures: caption -> file name beside the card.
    """

    command: str | None = None
    base_model: str | None = None
    license: str | None = None
    language: str | None = None
    machine: str | None = None
    evaluations: tuple[Evaluation, ...] = ()
    latency: tuple[Latency, ...] = ()
    pictures: dict[str, str] = field(default_factory=dict)

    def merge(self, newer: "CardResults") -> "CardResults":
        """These results, each replaced where `newer` has it; scores and latencies of the same key likewise."""
        fields: dict[str, Any] = {}
        for name in ("command", "base_model", "license", "language", "machine"):
            value = getattr(newer, name)
            fields[name] = getattr(self, name) if value is None else value
        scores = {(e.task, e.dataset, e.config, e.split, e.metric): e for e in (*self.evaluations, *newer.evaluations)}
        times = {(entry.batch, entry.length): entry for entry in (*self.latency, *newer.latency)}
        return CardResults(
            **fields,
            evaluations=tuple(scores.values()),
            latency=tuple(times.values()),
            pictures={**self.pictures, **newer.pictures},
        )

    def to_json(self) -> str:
        """As `load` reads it; what is missing is left out."""
        content = {name: value for name, value in dataclasses.asdict(self).items() if value}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CardResults":
        """Read a JSON file with these fields.

        Raises:
            TCSPError: unreadable, an unknown field, a missing one, or a value of the wrong type.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TCSPError(f"The results {path} cannot be read: {error}") from error
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: Any, where: str = "results") -> "CardResults":
        """From the content of such a file.

        Raises:
            TCSPError: see `load`; the message names the field.
        """
        fields = _checked(cls, content, where)
        for name, kind in (("evaluations", Evaluation), ("latency", Latency)):
            entries = fields.get(name, [])
            fields[name] = tuple(
                kind(**_checked(kind, entry, f"{where}: {name}[{i}]")) for i, entry in enumerate(entries)
            )
        for caption, file in fields.get("pictures", {}).items():
            if not isinstance(file, str) or Path(file).name != file:
                raise TCSPError(f"{where}: pictures[{caption!r}] is {file!r}; it must be a file name without a folder.")
        return cls(**fields)


def _json_types(hint: Any) -> tuple[type, ...]:
    """What JSON may hold where a field has this type."""
    if isinstance(hint, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _json_types(part))
    if hint is float:
        return (int, float)
    return (list,) if get_origin(hint) is tuple else (get_origin(hint) or hint,)


def _checked(kind: Any, content: Any, where: str) -> dict[str, Any]:
    """`content` as keyword arguments of the dataclass `kind`."""
    if not isinstance(content, dict):
        raise TCSPError(f"{where} is a {type(content).__name__}; it must be a JSON object.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in content:
        if name not in fields:
            raise TCSPError(f"{where} has the unknown field {name!r}; allowed: {', '.join(fields)}.")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in content:
            if required:
                raise TCSPError(f"{where} lacks the field {name!r}.")
            continue
        value = content[name]
        allowed = _json_types(f.type)
        if isinstance(value, bool) or not isinstance(value, allowed):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise TCSPError(f"{where}: {name} is {value!r}; it must be of type {names}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise TCSPError(f"{where}: {name} is {value!r}; it must be a finite number.")
    return dict(content)
