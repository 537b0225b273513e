"""Altered statistics and checkpoint files: each is read rightly or refused by one clear error."""

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..calibration import Calibration, calibrate
from ..compression import compress
from ..errors import TCSPError
from ..publish.checkpoint import read_checkpoint
from .tally import Tally
from .tiny import make_bert, make_rows

_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 1 << 40, 10**30, 1.5, "", "zz", "../../etc/passwd", "x" * 500),
    *([], [1], [-1, 4], [1 << 62, 1 << 62], {}, {"a": 1}, "F64", "I8", "BF16", "BOOL"),
)


def reader_rounds(rounds: int, seed: int) -> Iterator[list[Tally]]:
    """Read `rounds` altered folders, half of them statistics; the tallies so far, after every hundred."""
    statistics, checkpoints = Tally("statistics files"), Tally("checkpoint files")
    draw = random.Random(seed)
    with TemporaryDirectory(prefix="tcsp-selftest-") as name:
        folder = Path(name)
        _originals(folder)
        tensors = Calibration.load(folder / "stats")
        for i in range(rounds):
            own = random.Random(draw.getrandbits(64))
            where = f"seed {seed}, file {i}"
            if i % 2:
                _one(folder, "small", ("config.json", "model.safetensors"), own, checkpoints, where, _read_checkpoint)
            else:
                names = ("calibration.json", "calibration.safetensors")
                _one(folder, "stats", names, own, statistics, where, lambda path: _read_statistics(path, tensors))
            if i % 100 == 99 or i + 1 == rounds:
                yield [statistics, checkpoints]


def _originals(folder: Path) -> None:
    dense = make_bert(size=8)
    stats = calibrate(dense, make_rows(30), batch_size=30, progress=False, sample_tokens=100)
    stats.save(folder / "stats")
    compress(dense, stats, hidden_size=4, multiple_of=1, refit=False).save_pretrained(folder / "small")


def _one(
    folder: Path,
    kind: str,
    names: tuple[str, str],
    draw: random.Random,
    tally: Tally,
    where: str,
    read: Callable[[Path], None],
) -> None:
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / kind, work)
    done = _alter_json(work / names[0], draw) if draw.random() < 0.35 else _alter_tensors(work / names[1], draw)
    if kind == "stats" and draw.random() < 0.7:
        _sign(work, draw)
    try:
        read(work)
    except TCSPError as error:
        if str(error).strip():
            tally.refused += 1
        else:
            tally.fail(f"{where} ({done}): an error without a message")
    except Exception as error:
        tally.fail(f"{where} ({done}): {type(error).__name__}: {error}"[:400])
    else:
        tally.right += 1


def _alter_json(path: Path, draw: random.Random) -> str:
    if draw.random() < 0.3:
        return _alter_bytes(path, draw, path.stat().st_size)
    fields = json.loads(path.read_text(encoding="utf-8"))
    done = _alter_value(fields, draw)
    path.write_text(json.dumps(fields), encoding="utf-8")
    return done


def _alter_value(fields: Any, draw: random.Random) -> str:
    """Put another value somewhere into nested dictionaries and lists, or take one out."""
    place, key = fields, draw.choice(sorted(fields))
    while isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
        place = place[key]
        key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
    if isinstance(place, dict) and draw.random() < 0.15:
        del place[key]
        return f"without {key}"
    if isinstance(place, dict) and draw.random() < 0.15:
        place[draw.choice(["../x", "", "sample.keys", "layer.0.attention.moment_sum"])] = place.pop(key)
        return f"{key} renamed"
    place[key] = draw.choice(_VALUES)
    return f"{key} = {place[key]!r}"[:80]


def _alter_bytes(path: Path, draw: random.Random, first: int) -> str:
    """Truncate the file, change some of its first bytes, or add some."""
    content = bytearray(path.read_bytes())
    action = draw.randrange(3)
    if action == 0:
        cut = draw.randrange(len(content))
        path.write_bytes(content[:cut])
        return f"cut to {cut} bytes"
    if action == 1:
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(max(1, min(first, len(content))))] = draw.randrange(256)
        path.write_bytes(content)
        return "bytes changed"
    path.write_bytes(content + draw.randbytes(draw.randint(1, 64)))
    return "bytes added"


def _alter_tensors(path: Path, draw: random.Random) -> str:
    """Alter the header of a safetensors file, or its bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if draw.random() < 0.4:
        return _alter_bytes(path, draw, 8 + length)
    header = json.loads(content[8 : 8 + length])
    done = _alter_value(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return done


def _sign(work: Path, draw: random.Random) -> None:
    """Record the altered file's checksum, so that what lies behind it is tested too; at times alter the values."""
    path, summary = work / "calibration.safetensors", work / "calibration.json"
    content = bytearray(path.read_bytes())
    if content and draw.random() < 0.3:
        for _ in range(draw.randint(1, 16)):
            content[draw.randrange(len(content))] = draw.choice((0, 127, 128, 255))
        path.write_bytes(content)
    try:
        fields = json.loads(summary.read_text(encoding="utf-8"))
        fields["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    except (ValueError, TypeError):
        return
    summary.write_text(json.dumps(fields), encoding="utf-8")


def _read_statistics(path: Path, original: Calibration) -> None:
    """Read, and use every number once.

    Raises:
        TCSPError: it was refused.
        AssertionError: something was accepted that no calibration could have written.
    """
    found = Calibration.load(path)
    for name, site in found.sites.items():
        for tensor in (site.second_moment, None if site.fisher_sum is None else site.fisher, site.query_fisher_sum):
            if tensor is not None and not (tensor.dtype == torch.float64 and bool(torch.isfinite(tensor).all())):
                raise AssertionError(f"{name} was read with {tensor.dtype} or a number that is not finite")
        if not 0.0 <= site.coherence <= 1.0:
            raise AssertionError(f"{name} has the coherence {site.coherence}")
    for row in found.sample.sequences():
        if not row["input_ids"] or min(row["input_ids"]) < 0:
            raise AssertionError("the sample holds a sequence without tokens, or a negative one")
    if list(found.sites) == list(original.sites) and found.hidden_size == original.hidden_size:
        Calibration.merge([found, found])


def _read_checkpoint(path: Path) -> None:
    read_checkpoint(path)
