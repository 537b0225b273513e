"""How much faster a calibration is on several processes, each with one thread, and whether they agree to the bit."""

import hashlib
import os
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ..calibration import Calibration, calibrate_on_ranks
from ..compression.subspace import spectrum
from ..errors import TCSPError
from .calibration_cost import EPSILON, random_classifier, random_rows


@dataclass(frozen=True)
class RanksResult:
    """One shape, in rounds that take turns.

    Attributes:
        one, many: seconds of one process and of `ranks` over all the tokens.
        agree: whether all processes held the same projections, to the last bit.
        off: largest difference of the projections (k × D entries of unit rows) to one process's, over all sites.
    """

    hidden_size: int
    layers: int
    tokens: int
    ranks: int
    one: float
    many: float
    agree: bool
    off: float

    @property
    def gain(self) -> float:
        """Tokens per second, over one process's."""
        return self.one / self.many


def measure_ranks(hidden_size: int, layers: int, tokens: int, batch_size: int, ranks: int, rounds: int) -> RanksResult:
    """Calibrate a random classifier on one process and on several, in turns.

    Raises:
        TCSPError: a process failed.
    """
    seconds: dict[int, list[float]] = {1: [], ranks: []}
    found: dict[int, list[torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for size in (1, ranks):
                path = Path(folder) / f"{turn}-{size}"
                path.mkdir()
                job = (size, _free_port(), hidden_size, layers, tokens, batch_size, str(path))
                try:
                    spawn(_rank, job, nprocs=size)
                except Exception as error:
                    raise TCSPError(f"A calibration on {size} processes failed: {error}") from error
                results = [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(size)]
                seconds[size].append(max(result["seconds"] for result in results))
                found[size] = [result["projections"] for result in results]
    first, *others = found[ranks]
    return RanksResult(
        hidden_size,
        layers,
        tokens,
        ranks,
        statistics.median(seconds[1]),
        statistics.median(seconds[ranks]),
        all(_digest(first) == _digest(other) for other in others),
        float((first - found[1][0]).abs().max()),
    )


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _rank(
    rank: int, size: int, port: int, hidden_size: int, layers: int, tokens: int, batch_size: int, folder: str
) -> None:
    """One process: load, warm up, wait for the others, calibrate, project."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.manual_seed(0)
    model = random_classifier(hidden_size, layers)
    rows = list(random_rows(tokens, model.config.vocab_size))

    def run(some: list[dict[str, list[int]]]) -> Calibration:
        return calibrate_on_ranks(model, some, batch_size=batch_size, sample_tokens=0, progress=False)

    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        run(rows[: 2 * size * batch_size])
        if size > 1:
            dist.barrier()
        started = time.perf_counter()
        stats = run(rows)
        seconds = time.perf_counter() - started
    finally:
        if size > 1:
            dist.destroy_process_group()
    projections = torch.stack([_projection(stats, name) for name in (next(iter(stats.sites)), list(stats.sites)[-1])])
    torch.save({"seconds": seconds, "projections": projections}, Path(folder) / f"{rank}.pt")


def _projection(stats: Calibration, name: str) -> torch.Tensor:
    """The projector (D, D) on half the width."""
    site = stats.sites[name]
    basis = spectrum("balanced", site.second_moment, site.fisher, EPSILON).cut(stats.hidden_size // 2)
    return basis.decoder @ basis.encoder.T
