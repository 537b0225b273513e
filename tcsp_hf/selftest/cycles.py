"""Long use: load, compress, save again and again without growth; several threads on one model."""

import gc
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from ..calibration import Calibration, calibrate
from ..compression import compress
from .tally import Tally
from .tiny import make_bert, make_rows

_THREADS = 8
_GROWTH = 32 << 20
"""Bytes of resident memory that the second half of the cycles may add: allocators breathe, a leak adds more."""


def cycle_rounds(rounds: int) -> Iterator[Tally]:
    """`rounds` cycles; the tally so far, after every one. Memory and open files: half-way against the end."""
    tally = Tally("load, compress, save and load again")
    process = psutil.Process()
    with TemporaryDirectory(prefix="tcsp-selftest-") as name:
        folder = Path(name)
        make_bert().save_pretrained(folder / "dense")
        calibrate(make_bert(), make_rows(60), progress=False).save(folder / "stats")
        ids = torch.tensor([row["input_ids"][:3] for row in make_rows(20) if len(row["input_ids"]) >= 3])
        expected: torch.Tensor | None = None
        half, files = 0, 0
        for i in range(rounds):
            dense = BertForSequenceClassification.from_pretrained(folder / "dense")
            small = compress(dense, Calibration.load(folder / "stats"), hidden_size=8, refit=False)
            shutil.rmtree(folder / "small", ignore_errors=True)
            small.save_pretrained(folder / "small")
            found = _logits(AutoModelForSequenceClassification.from_pretrained(folder / "small"), ids)
            expected = found if expected is None else expected
            if torch.equal(found, expected):
                tally.right += 1
            else:
                tally.fail(f"cycle {i} gave other outputs than the first")
            if i == rounds // 2:
                gc.collect()
                half, files = process.memory_info().rss, len(os.listdir("/proc/self/fd"))
            yield tally
        gc.collect()
        growth, opened = process.memory_info().rss - half, len(os.listdir("/proc/self/fd")) - files
        tally.facts = {"bytes grown in the second half": growth, "files left open": opened}
        if growth > _GROWTH or opened > 0:
            tally.fail(f"the second half of {rounds} cycles took {growth:,} bytes and left {opened} files open")
        yield tally


def thread_rounds(rounds: int) -> Tally:
    """Eight threads call one model at once, `rounds` times each; all outputs equal those of one thread."""
    tally = Tally(f"calls of one model by {_THREADS} threads")
    dense = make_bert()
    small = compress(dense, calibrate(dense, make_rows(60), progress=False), hidden_size=8, refit=False).eval()
    inputs = [torch.randint(6, 60, (2, 3 + i % 5), generator=torch.Generator().manual_seed(i)) for i in range(rounds)]
    expected = [_logits(small, ids) for ids in inputs]
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(_logits, small, ids) for _ in range(_THREADS) for ids in inputs]
        for i, job in enumerate(jobs):
            difference = float((job.result() - expected[i % rounds]).abs().max())
            if difference <= 1e-6:
                tally.right += 1
            else:
                tally.fail(f"call {i} differs by {difference:.1e}")
    return tally


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found
