"""A small sample of SQuAD v1.1 that travels with the package: the demo and the tests need no network.

The text is CC BY-SA 4.0, not Apache-2.0: see NOTICE.md in this folder.
"""

import gzip
import json
from dataclasses import dataclass
from importlib.resources import files

SAMPLE_FILE = "squad_sample.json.gz"


@dataclass(frozen=True)
class SquadSample:
    """English Wikipedia paragraphs to calibrate on, and others to search with questions.

    Calibration comes from SQuAD's train split and the rest from its validation split: no article is in both.
    Any first part of `calibration` or of `paragraphs` is itself spread evenly over the articles.
    """

    calibration: list[str]
    """Paragraphs for calibration, 400 of them, from 400 articles."""
    calibration_titles: list[str]
    """The article each calibration paragraph is from, as SQuAD writes it (`Super_Bowl_50`)."""
    paragraphs: list[str]
    """Paragraphs to search, 600 of them, from 48 articles."""
    paragraph_titles: list[str]
    """The article each of `paragraphs` is from."""
    questions: list[str]
    """Questions, 1,000 of them, at most two about one paragraph."""
    answers_in: list[int]
    """For each question the index in `paragraphs` of the one it was asked about."""


def load_squad_sample() -> SquadSample:
    """Read the sample that is installed with the package. No network, a few milliseconds."""
    packed = files(__package__).joinpath(SAMPLE_FILE).read_bytes()
    return SquadSample(**json.loads(gzip.decompress(packed)))
