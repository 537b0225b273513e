"""Calibrations that are interrupted and go on, and calibrations on two processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Case, dense_and_statistics, find, make_dense, make_rows
from datasets import Dataset
from processes import command_on_two_ranks, environment, on_two_ranks
from torch.utils.data import DataLoader

from tcsp_hf import Calibration, TCSPError, calibrate
from tcsp_hf.calibration import calibrate_on_ranks
from tcsp_hf.calibration.ranks import Share

BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")
ROOT = Path(__file__).parents[1]


class Killed(Exception):
    pass


def cut_off(rows: list[Any], after: int) -> Iterator[Any]:
    """The rows, and a death on the way."""
    yield from rows[:after]
    raise Killed


def assert_bit_equal(one: Calibration, other: Calibration) -> None:
    assert one.summary() == other.summary()
    assert one.sample.sequences() == other.sample.sequences()
    assert list(one.sites) == list(other.sites)
    for name, site in one.sites.items():
        for kind, value in vars(site).items():
            expected = getattr(other.sites[name], kind)
            same = torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected
            assert same, (name, kind)


def run(case: Case, data: Any, folder: Path | None, dtype: torch.dtype = torch.float32, **fields: Any) -> Calibration:
    model, _ = dense_and_statistics(case, dtype)
    told = {"batch_size": 2, "sample_tokens": 60, "checkpoint_every": 2, "progress": False, **fields}
    return calibrate(model, data, checkpoint=folder, **told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_resumed_statistics_are_bit_equal(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Killed on the way, killed again, finished, and read once more without a batch left."""
    batches = list(DataLoader([{"input_ids": torch.arange(2, 2 + 8) + i} for i in range(22)], batch_size=2))
    for batch in batches:
        batch["input_ids"][1, 5:] = 0
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
        if case is T5:
            batch["labels"] = batch["input_ids"][:, :4]
    whole = run(case, batches, None, dtype)
    for after in (5, 9):
        with pytest.raises(Killed):
            run(case, cut_off(batches, after), tmp_path, dtype)
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    for _ in range(2):
        assert_bit_equal(run(case, batches, tmp_path, dtype), whole)
    assert kept.stat().st_mtime_ns > written


def test_a_stream_goes_on_too(tmp_path: Path) -> None:
    """The sorting window is 64 batches: the death comes after the first one."""
    rows = make_rows(BERT, 300)
    whole = run(BERT, Dataset.from_list(rows).to_iterable_dataset(num_shards=2), None)
    with pytest.raises(Killed):
        run(BERT, cut_off(rows, 200), tmp_path)
    assert_bit_equal(run(BERT, Dataset.from_list(rows).to_iterable_dataset(num_shards=2), tmp_path), whole)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 4}, "with seed 0, and this one has 4"),
        ({"batch_size": 5}, "with batch_size 2, and this one has 5"),
        ({"fisher": False}, "with objective 'classification', and this one has 'none'"),
        ({"max_length": 39}, "with max_length 40, and this one has 39"),
        ({"sample_tokens": 9}, "with sample_tokens 60, and this one has 9"),
        ({"dtype": torch.float64}, "with dtype 'torch.float32', and this one has 'torch.float64'"),
        ({"data": make_rows(BERT, 20, seed=1)}, "is of other data"),
        ({"data": make_rows(BERT, 20)[::-1][:3]}, "is of other data: it has seen 10 batches, and these are 2"),
    ],
    ids=str,
)
def test_another_calibration_is_refused(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    rows = make_rows(BERT, 20)
    run(BERT, rows, tmp_path)
    before = next(tmp_path.iterdir()).read_bytes()
    with pytest.raises(TCSPError, match=named):
        run(BERT, **{"data": rows, "folder": tmp_path, **changed})
    assert next(tmp_path.iterdir()).read_bytes() == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    run(BERT, make_rows(BERT, 8), tmp_path)
    with pytest.raises(TCSPError, match="with model_fingerprint"):
        calibrate(make_dense(BERT, torch.float32, seed=1), make_rows(BERT, 8), checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100])
def test_a_damaged_checkpoint(content: bytes, tmp_path: Path) -> None:
    run(BERT, make_rows(BERT, 8), tmp_path)
    next(tmp_path.iterdir()).write_bytes(content)
    with pytest.raises(TCSPError, match=r"is damaged .*: remove it to start anew"):
        run(BERT, make_rows(BERT, 8), tmp_path)


def test_places_that_cannot_hold_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TCSPError, match="cannot be written"):
        run(BERT, make_rows(BERT, 8), tmp_path / "file")
    with pytest.raises(TCSPError, match="checkpoint_every is 0; it must be a positive integer"):
        run(BERT, make_rows(BERT, 8), tmp_path / "folder", checkpoint_every=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "calibration-of-2-rank-1.safetensors").write_bytes(b"")
    with pytest.raises(TCSPError, match="of another number of processes"):
        run(BERT, make_rows(BERT, 8), tmp_path / "other")


# Other processes ----------------------------------------------------------------------------------------------------


_SLOWLY = """
import sys, time, torch
torch.set_num_threads(1)
from common import find, make_dense, make_rows
from tcsp_hf import calibrate
case = find("bert-ForSequenceClassification")
def rows():
    for i, row in enumerate(make_rows(case, 400)):
        time.sleep(0.01)
        yield row
calibrate(make_dense(case, torch.float32), rows(), batch_size=1, checkpoint=sys.argv[1], checkpoint_every=3)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _SLOWLY, str(tmp_path)], env=environment())
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("calibration-*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    model, rows = make_dense(BERT, torch.float32), make_rows(BERT, 400)
    resumed = calibrate(model, rows, batch_size=1, checkpoint=tmp_path, checkpoint_every=3, progress=False)
    assert_bit_equal(resumed, calibrate(model, rows, batch_size=1, progress=False))
    assert not list(tmp_path.glob("*.partial"))


def test_shares() -> None:
    """Every item of the first `limit` goes to one process."""
    for count, size, limit in ((10, 3, None), (10, 3, 7), (2, 3, None), (5, 2, 9)):
        shares = [Share(list(range(count)), rank, size, limit) for rank in range(size)]
        assert [len(share) for share in shares] == [len(list(share)) for share in shares]
        assert sorted(item for share in shares for item in share) == list(range(min(count, limit or count)))


def test_one_process_needs_no_launcher() -> None:
    model, rows = make_dense(BERT), make_rows(BERT, 8)
    assert_bit_equal(calibrate_on_ranks(model, rows, progress=False), calibrate(model, rows, progress=False))


_RANK = """
import sys, torch
torch.set_num_threads(1)
from common import find, make_dense, make_rows
from tcsp_hf.calibration import calibrate_on_ranks
from tcsp_hf.calibration.ranks import launched
from tcsp_hf.ranks import rank_and_size
case = find("bert-ForSequenceClassification")
with launched():
    rank = rank_and_size()[0]
    stats = calibrate_on_ranks(make_dense(case), make_rows(case, 21), batch_size=4, max_sequences=17, progress=False)
    stats.save(f"{sys.argv[1]}/{rank}")
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_statistics(tmp_path: Path) -> None:
    """Bit-equal on both, and as one process would have them, but for the order of the sums."""
    (tmp_path / "rank.py").write_text(_RANK)
    done = on_two_ranks(str(tmp_path / "rank.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = Calibration.load(tmp_path / "0"), Calibration.load(tmp_path / "1")
    assert_bit_equal(first, second)
    alone = calibrate(make_dense(BERT), make_rows(BERT, 21), batch_size=4, max_sequences=17, progress=False)
    assert first.summary() == alone.summary()
    for name, site in alone.sites.items():
        torch.testing.assert_close(first.sites[name].moment_sum, site.moment_sum, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(first.sites[name].fisher_sum, site.fisher_sum, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_command_on_two_processes(tmp_path: Path, tokenizer: Any) -> None:
    make_dense(BERT, torch.float32).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("".join(f"w{i} w{i + 1} w{2 * i}\n" for i in range(25)))
    told = [str(tmp_path / "dense"), "--data", str(tmp_path / "texts.txt"), "-o", str(tmp_path / "stats")]
    told += ["--batch-size", "4", "--checkpoint", str(tmp_path / "going")]
    done = command_on_two_ranks("tcsp_hf", "calibrate", *told)
    assert done.returncode == 0, done.stderr
    assert Calibration.load(tmp_path / "stats").sequences == 25
    assert not (tmp_path / "going").exists()
