"""A dense model, its statistics and its outputs on a task: what every compressed model is compared with."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration, calibrate
from ..calibration.divergence import model_inputs
from ..compression.streams import padded_batches
from ..data.digest import digest_of_rows
from ..data.sources import load_data
from ..loading import load_model, load_tokenizer
from .flops import count_flops
from .latency import wait_for
from .load_task import load_task
from .scoring import Score, Task


@dataclass
class Comparison:
    """The same model, calibration texts and task for every row of a table.

    Statistics and dense outputs are made when first asked for.

    Attributes:
        dense, tokenizer, task: what is compressed, and what it is scored on.
        data: the training texts that calibration draws from.
        sequences, seed: how many of them, chosen by what.
        progress: show bars; None shows them on a terminal only.
        cache: folder to keep the statistics in (the token sample of the texts included); None keeps nothing.
    """

    dense: PreTrainedModel
    tokenizer: Any
    task: Task[Any]
    data: Any
    sequences: int
    seed: int
    progress: bool | None
    cache: Path | None = None
    calibration_seconds: float | None = field(default=None, init=False)

    @classmethod
    def load(
        cls,
        model: str,
        task: str,
        sequences: int,
        seed: int,
        progress: bool | None,
        *,
        split: str | None = None,
        items: int | None = None,
        calibration: str | None = None,
        device: str = "cpu",
    ) -> "Comparison":
        """Load everything by name; `calibration` names other data to calibrate on than the task's own,
        `items` limits the rows that are scored.

        Raises:
            TCSPError: a model or data that cannot be loaded, or that do not fit together.
        """
        dense = load_model(model, device=device)
        found = load_task(dense, task, split, items)
        named = task if calibration is None else calibration
        data = load_data(named, "train")
        found.check_calibration(data, named)
        return cls(dense, load_tokenizer(model), found, data, sequences, seed, progress)

    @cached_property
    def stats(self) -> Calibration:
        if self.cache is not None and self.cache.is_dir():
            return Calibration.load(self.cache)
        texts = self.task.calibration_texts(self.data, self.sequences, self.seed)
        started = time.perf_counter()
        stats = calibrate(
            self.dense,
            texts,
            tokenizer=self.tokenizer,
            max_length=self.task.max_length,
            seed=self.seed,
            progress=self.progress,
        )
        wait_for(self.dense.device)
        self.calibration_seconds = time.perf_counter() - started
        if self.cache is not None:
            stats.save(self.cache)
        return stats

    @property
    def digest(self) -> str:
        """Of the texts that are scored, and of those to calibrate on."""
        chosen = self.task.calibration_texts(self.data, self.sequences, self.seed)
        return f"{digest_of_rows(list(self.task.texts()))} {digest_of_rows(chosen)}"

    @cached_property
    def forward_seconds(self) -> float:
        """A plain forward pass of the dense model over the sample that the statistics carry: what a refit reads."""
        device = self.dense.device
        batches = [model_inputs(self.dense, batch) for batch in padded_batches(self.stats.sample.sequences(), device)]
        with torch.inference_mode():
            self.dense(**batches[0])  # a process's first pass loads more than weights
            wait_for(device)
            started = time.perf_counter()
            for batch in batches:
                self.dense(**batch)
        wait_for(self.dense.device)
        return time.perf_counter() - started

    @cached_property
    def reference(self) -> Any:
        """The dense model's outputs on the task."""
        return self.task.outputs(self.dense, self.tokenizer, self.progress, "dense")

    @cached_property
    def mean_length(self) -> int:
        """Mean tokens of the task's texts."""
        return self.task.mean_length(self.tokenizer)

    @cached_property
    def target_length(self) -> int | None:
        """Mean tokens of what a decoder writes; None where none does."""
        return self.task.target_length(self.tokenizer)

    def flops(self, model: PreTrainedModel) -> int:
        """Operations of one forward pass of the dense or a compressed model over a text and a target of mean length."""
        return count_flops(model, self.mean_length, self.target_length)

    @property
    def dense_score(self) -> Score:
        return self.task.score(self.reference, self.reference)

    def score(self, small: PreTrainedModel) -> Score:
        """Score a compressed model."""
        return self.task.score(self.reference, self.task.outputs(small, self.tokenizer, self.progress, "compressed"))

    @property
    def note(self) -> str:
        """What a table says about its calibration."""
        seconds = "" if self.calibration_seconds is None else f"calibrated in {self.calibration_seconds:.0f} s; "
        return (
            f"{self.stats.sequences:,} calibration texts, {self.stats.tokens:,} tokens, no labels, seed {self.seed}, "
            f"{seconds}float32 on {torch.get_num_threads()} threads"
        )
