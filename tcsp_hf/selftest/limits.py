"""Commands that run into a full disk, too little memory, or a folder without the right to write."""

import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from .children import REFUSED, RIGHT, finish, last_words
from .jobs import JOBS, Job, digest, lay_out
from .kills import Bench
from .tally import Tally

_NOBODY = 65534
_MORE_MEMORY = 64 << 20


def fault_rounds(bench: Bench, rounds: int, seed: int) -> Iterator[list[Tally]]:
    """Every fault `rounds` times over the jobs in turn; the tallies so far, after every round."""
    draw = random.Random(seed)
    faults: list[tuple[Tally, Callable[[Job], Callable[[], None]]]] = [
        (Tally("disk full at a random file size"), lambda job: _small_disk(bench, job, draw)),
        (Tally("memory limit"), lambda job: _little_memory(draw)),
        (Tally("folder without the right to write"), lambda job: _no_rights),
    ]
    tallies = [tally for tally, _ in faults]
    for i in range(rounds):
        job = JOBS[i % len(JOBS)]
        for tally, fault in faults:
            _one(bench, job, fault(job), tally, f"{job.name} (seed {seed}, round {i})", hurt=tally is tallies[2])
        yield tallies


def _one(bench: Bench, job: Job, fault: Callable[[], None], tally: Tally, name: str, hurt: bool) -> None:
    before = lay_out(bench.work, bench.inputs, job)
    if hurt:
        _forbid(bench.work)
    try:
        code = finish(bench.run(job, fault))
    finally:
        bench.work.chmod(0o755)
    said = last_words(bench.log)
    wrong = bench.found_wrong(job, before)
    complete = digest(bench.work / "out") == bench.ends[job.name]
    if wrong is None and code == RIGHT and not complete:
        wrong = "it ended well without its result"
    if wrong is None and code not in (RIGHT, REFUSED):
        wrong = f"it ended with {code}: {said}"
    wrong = wrong or bench.recovers(job)
    if wrong is not None:
        tally.fail(f"{name}: {wrong}")
    elif code == RIGHT:
        tally.right += 1
    else:
        tally.refused += 1


def _small_disk(bench: Bench, job: Job, draw: random.Random) -> Callable[[], None]:
    """Writing beyond a size fails, somewhere between nothing and the largest file that the job writes."""
    largest = max(path.stat().st_size for path in bench.inputs.rglob("*") if path.is_file())
    size = draw.randrange(1, largest)

    def fault() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write instead of a death
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return fault


def _little_memory(draw: random.Random) -> Callable[[], None]:
    """At most a little more address space than the process has already."""
    more = draw.randrange(0, _MORE_MEMORY)

    def fault() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return fault


def _no_rights() -> None:
    """Root may write everywhere: go on as a user who may not."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def _forbid(folder: Path) -> None:
    folder.chmod(0o555)
