"""Draw the SQuAD sample of this folder again: `python -m tcsp_hf.data.make_squad_sample`.

The draw goes by a hash of the seed and the text, not by row order or row ids, so that every copy of SQuAD
v1.1 with the same text gives the same sample.
"""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from datasets import load_dataset

from tcsp_hf.data import SAMPLE_FILE, SquadSample
from tcsp_hf.errors import TCSPError

SEED = 0
HUB_NAME = "rajpurkar/squad"
SAMPLE_PATH = Path(__file__).with_name(SAMPLE_FILE)


def read_split(split: str, folder: Path | None) -> Iterator[tuple[str, str, str]]:
    """Yield (title, paragraph, question) for each row of a split, without the space around them.

    `folder` holds `{split}.parquet`, itself or in a folder `squad` inside it; None reads the Hub's copy.
    """
    if folder is None:
        rows = load_dataset(HUB_NAME, split=split, streaming=True)
    else:
        places = [folder / f"{split}.parquet", folder / "squad" / f"{split}.parquet"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise TCSPError(f"no SQuAD {split} split: looked for {' and '.join(map(str, places))}")
        rows = load_dataset("parquet", data_files=str(found), split="train", streaming=True)
    for row in rows:
        yield row["title"].strip(), row["context"].strip(), row["question"].strip()


def draw_evenly(
    pairs: Iterable[tuple[str, str]], count: int, seed: int, at_most: int | None = None
) -> list[tuple[str, str]]:
    """Draw `count` distinct pairs (group, text), taking one from each group in turn until there are enough.

    Groups differ by at most one in what is taken from them, unless a group runs out or has given `at_most`.
    The result depends on the seed and the set of pairs alone, not on their order.
    Raises TCSPError when there are not enough pairs.
    """

    def rank(*texts: str) -> bytes:
        return hashlib.sha256("\0".join([str(seed), *texts]).encode()).digest()

    given: Counter[str] = Counter()
    turns: list[tuple[int, bytes, tuple[str, str]]] = []
    for pair in sorted(set(pairs), key=lambda pair: rank(*pair)):
        group = pair[0]
        if at_most is None or given[group] < at_most:
            turns.append((given[group], rank(group), pair))
            given[group] += 1
    if len(turns) < count:
        raise TCSPError(f"asked for {count} texts where {len(turns)} can be drawn")
    return [pair for _, _, pair in sorted(turns)[:count]]


def draw_squad_sample(
    folder: Path | None = None,
    *,
    calibration: int = 400,
    paragraphs: int = 600,
    questions: int = 1000,
    seed: int = SEED,
) -> SquadSample:
    """Draw the sample from the parquet files in `folder`, or from the Hub's copy of SQuAD v1.1.

    Counts: calibration paragraphs (train split), paragraphs and questions (validation split, at most two
    questions per paragraph). Articles of the validation split are left out of calibration, and questions
    asked about several paragraphs are not drawn, since they have no one right answer.
    Raises TCSPError when the files are absent or too small.
    """
    validation = list(read_split("validation", folder))
    test_articles = {title for title, _, _ in validation}
    train = ((title, text) for title, text, _ in read_split("train", folder) if title not in test_articles)
    to_calibrate = draw_evenly(train, calibration, seed)
    to_search = draw_evenly(((title, text) for title, text, _ in validation), paragraphs, seed)

    index = {text: i for i, (_, text) in enumerate(to_search)}
    asked_about: dict[str, set[str]] = {}
    for _, text, question in validation:
        asked_about.setdefault(question, set()).add(text)
    about_one = (
        (text, question) for _, text, question in validation if text in index and len(asked_about[question]) == 1
    )
    asked = draw_evenly(about_one, questions, seed, at_most=2)
    return SquadSample(
        calibration=[text for _, text in to_calibrate],
        calibration_titles=[title for title, _ in to_calibrate],
        paragraphs=[text for _, text in to_search],
        paragraph_titles=[title for title, _ in to_search],
        questions=[question for _, question in asked],
        answers_in=[index[text] for text, _ in asked],
    )


def write_squad_sample(sample: SquadSample, path: Path) -> None:
    """Write the sample as gzipped JSON; the same sample gives the same bytes (with the same zlib)."""
    content = json.dumps(asdict(sample), ensure_ascii=False, indent=0)
    path.write_bytes(gzip.compress(content.encode("utf-8"), compresslevel=9, mtime=0))


def main(
    source: Annotated[
        Path | None,
        typer.Option(envvar="TCSP_DATA_DIR", help="Folder with the two parquet files. Default: the Hub's copy."),
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = SAMPLE_PATH,
) -> None:
    """Draw the packaged SQuAD sample again."""
    sample = draw_squad_sample(source)
    write_squad_sample(sample, output)
    calibration, searched = (len(set(t)) for t in (sample.calibration_titles, sample.paragraph_titles))
    print(
        f"{output}: {len(sample.calibration)} calibration paragraphs from {calibration} articles, "
        f"{len(sample.paragraphs)} paragraphs from {searched} articles, "
        f"{len(sample.questions)} questions, {output.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    typer.run(main)
