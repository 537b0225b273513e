"""Finds text by name: a local file or folder, a folder of local copies, or the Hub.

`TCSP_DATA_DIR` names a folder of local copies laid out as `glue/<task>/<split>.parquet` and
`squad/<split>.parquet`; without it the Hub's `nyu-mll/glue` and `rajpurkar/squad` are used.
"""

import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import TCSPError
from . import load_squad_sample

GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
SQUAD_SETS = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
SAMPLE = "squad-sample"
MIX = "squad-mix"
TEXTS = "squad-texts"
_PARAGRAPHS, _SENTENCES, _QUESTIONS = 60, 1300, 640
_WHOLE = 60  # paragraphs of the packaged sample; the others come sentence by sentence
_TEXT_COLUMNS = (
    "sentence1",
    "sentence2",
    "question1",
    "question2",
    "premise",
    "hypothesis",
    "question",
    "context",
    "sentence",
    "text",
)
_READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


def load_data(name: str, split: str = "train") -> Any:
    """A `datasets.Dataset`, or a list of strings for the packaged sample.

    Args:
        name: `"squad-sample"` (1,618 sentences and paragraphs that the package carries), `"squad-mix"` (2,000 short,
            varied texts out of SQuAD, to calibrate on), `"squad-texts"` (all its paragraphs, sentences and questions,
            to train on), a GLUE task (`"sst2"`), `"squad"`, `"squad_v2"`, a file (.parquet, .json, .jsonl, .csv,
            .txt), a folder of such files, or any dataset name of the Hub (`"owner/name"` or `"owner/name:config"`).
            Names joined with `+` give single texts of all of them in turn, so that any number of leading ones has an
            equal share of each (a name that stands twice has two shares).
        split: which split; of a folder the file that is called so, of a single file "train" or the file's own name.

    Raises:
        TCSPError: nothing was found; the message says what was looked for.
    """
    if name == SAMPLE:
        return sample_texts(load_squad_sample().calibration)
    if name == MIX:
        return mixed_texts(load_data("squad", split))
    if name == TEXTS:
        return all_texts(load_data("squad", split))
    path = Path(name)
    if "+" in name and not path.exists():
        return interleaved(name.split("+"), split)
    if path.is_file():
        if split not in ("train", path.stem):
            raise TCSPError(
                f"{name!r} is one file, so it has no split {split!r}: give a folder with {split}{path.suffix} in it."
            )
        return _read(path)
    if path.is_dir():
        return _from_folder(path, split)
    if name in GLUE_TASKS or name in SQUAD_SETS:
        return load_known(name, split)
    if "/" not in name:
        raise TCSPError(
            f"There is no data {name!r}: name a file, a folder, {SAMPLE!r}, {MIX!r}, {TEXTS!r}, one of "
            f"{', '.join([*GLUE_TASKS, *SQUAD_SETS])}, or a dataset of the Hub as owner/name."
        )
    repository, _, config = name.partition(":")
    return _from_hub(name, repository, config or None, split)


def only_split(name: str | None) -> str | None:
    """The split that a single file is; None where `name` is something else."""
    return Path(name).stem if name is not None and Path(name).is_file() else None


def load_known(name: str, split: str) -> Any:
    """A GLUE task's or SQuAD's own data, whatever files of that name may lie about: TCSP_DATA_DIR's, or the Hub's.

    Raises:
        TCSPError: it cannot be read, or there is no such split.
    """
    local = os.environ.get("TCSP_DATA_DIR")
    if local:
        return _from_folder(Path(local) / (f"glue/{name}" if name in GLUE_TASKS else name), split)
    repository, config = ("nyu-mll/glue", name) if name in GLUE_TASKS else (SQUAD_SETS[name], None)
    return _from_hub(name, repository, config, split)


def _from_hub(name: str, repository: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(repository, config, split=split)
    except Exception as error:  # the Hub client's errors are many; all mean "not readable"
        raise TCSPError(
            f"The dataset {name!r} (split {split!r}) could not be read from the Hub: {error}. A local copy can be "
            "given as a path, or through TCSP_DATA_DIR."
        ) from error


def mixed_texts(data: Any, seed: int = 0) -> list[str]:
    """60 paragraphs, one sentence each of 1,300 others, and 640 questions about yet others, of SQuAD's rows.

    What a sentence encoder meets: texts of every length, and many of them. The same for the same rows and seed.
    """
    draw = random.Random(seed)
    paragraphs: list[str] = []
    sentences: list[str] = []
    questions: list[str] = []
    seen: set[str] = set()
    for row in data.shuffle(seed=seed):
        if row["context"] in seen:
            continue
        seen.add(row["context"])
        if len(paragraphs) < _PARAGRAPHS:
            paragraphs.append(row["context"])
        elif len(sentences) < _SENTENCES:
            parts = _sentences(row["context"])
            sentences += [draw.choice(parts)] if parts else []
        elif len(questions) < _QUESTIONS:
            questions.append(row["question"])
        else:
            break
    return paragraphs + sentences + questions


def sample_texts(paragraphs: Sequence[str], seed: int = 0) -> list[str]:
    """The first paragraphs whole and every sentence of the others, shuffled by the seed: many short, varied texts
    teach more than few long ones."""
    texts = list(paragraphs[:_WHOLE])
    texts += dict.fromkeys(sentence for paragraph in paragraphs[_WHOLE:] for sentence in _sentences(paragraph))
    random.Random(seed).shuffle(texts)
    return texts


def all_texts(data: Any, seed: int = 0) -> list[str]:
    """Every paragraph, every sentence of it that is neither very short nor very long, and every question of SQuAD's
    rows, each once, shuffled by the seed."""
    paragraphs = dict.fromkeys(data["context"])
    texts = dict.fromkeys(data["question"]) | paragraphs
    for paragraph in paragraphs:
        texts |= dict.fromkeys(_sentences(paragraph))
    found = list(texts)
    random.Random(seed).shuffle(found)
    return found


def interleaved(names: Sequence[str], split: str, seed: int = 0) -> list[str]:
    """Single texts of several sources in turn, until the shortest share ends; every source is shuffled by the seed.

    Raises:
        TCSPError: a source has no text column, or cannot be found (see `load_data`).
    """
    shares: dict[str, Iterator[str]] = {}
    for name in dict.fromkeys(names):
        texts = _single_texts(load_data(name, split), name)
        random.Random(seed).shuffle(texts)
        shares[name] = iter(texts)
    found: list[str] = []
    while True:
        for name in names:
            text = next(shares[name], None)
            if text is None:
                return list(dict.fromkeys(found))
            found.append(text)


def _single_texts(data: Any, name: str) -> list[str]:
    """Every different text of a source: of all its known text columns, each alone; rows without one are left out."""
    if isinstance(data, list):
        return list(dict.fromkeys(text for text in data if text is not None))
    columns = [column for column in _TEXT_COLUMNS if column in data.column_names]
    if not columns:
        raise TCSPError(f"{name!r} has none of the text columns {', '.join(_TEXT_COLUMNS)}: it cannot be mixed in.")
    return list(dict.fromkeys(text for column in columns for text in data[column] if text is not None))


def _sentences(paragraph: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", paragraph) if 20 < len(part) < 300]


def first_rows(data: Any, count: int | None) -> Any:
    """The first rows of a dataset or a list, or all of them."""
    if isinstance(data, list):
        return data[:count]
    return data if count is None else data.select(range(min(count, len(data))))


def _from_folder(folder: Path, split: str) -> Any:
    for suffix in _READERS:
        if (folder / f"{split}{suffix}").is_file():
            return _read(folder / f"{split}{suffix}")
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _READERS) if folder.is_dir() else []
    raise TCSPError(f"{folder} has no split {split!r}; it holds: {', '.join(found) or 'no data files'}.")


def _read(path: Path) -> Any:
    from datasets import Dataset

    reader = _READERS.get(path.suffix)
    if reader is None:
        raise TCSPError(f"{path} is no data file; allowed: {', '.join(_READERS)}.")
    readers = {
        "parquet": Dataset.from_parquet,
        "json": Dataset.from_json,
        "csv": Dataset.from_csv,
        "text": Dataset.from_text,
    }
    try:
        return readers[reader](str(path))
    except Exception as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""  # what datasets says alone is general
        raise TCSPError(f"{path} cannot be read: {error}{cause}") from error
