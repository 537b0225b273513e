"""All parts of the self-test, one after the other."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .jobs import Command
from .tally import Tally


@dataclass(frozen=True)
class Sizes:
    """How many trials of each kind; 0 leaves a kind out."""

    kills: int
    faults: int
    configs: int
    files: int
    cycles: int


def run_selftest(sizes: Sizes, seed: int, command: Command, progress: bool | None = None) -> list[Tally]:
    """Run it.

    Args:
        seed: of every random choice; a failure names what reproduces it.
        command: runs one `tcsp` command line, given as its words; used in child processes.
        progress: show bars; None shows them on a terminal only.

    Returns:
        One tally for each kind of trial.

    Raises:
        TCSPError: the commands do not even work undisturbed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models; and children are forked
    try:
        return list(_parts(sizes, seed, command, progress))
    finally:
        torch.set_num_threads(threads)


def _parts(sizes: Sizes, seed: int, command: Command, progress: bool | None) -> Iterable[Tally]:
    bars = {"disable": None if progress is None else not progress, "leave": False}
    if sys.platform == "linux":
        yield from _faults(sizes, seed, command, bars)
    elif sizes.kills or sizes.faults:
        yield Tally("faults", skipped="they are made by means of Linux")
    if sizes.configs:
        from .configs import config_rounds

        yield _last(config_rounds(sizes.configs, seed), "configurations", bars)
    if sizes.files:
        from .readers import reader_rounds

        yield from _last(reader_rounds(sizes.files, seed), "files", bars)
    if sizes.cycles:
        from .cycles import cycle_rounds, thread_rounds

        yield _last(cycle_rounds(sizes.cycles), "cycles", bars)
        yield thread_rounds(sizes.cycles)


def _faults(sizes: Sizes, seed: int, command: Command, bars: dict[str, Any]) -> Iterable[Tally]:
    """Those that need children; before anything else, while this process has one thread."""
    if not (sizes.kills or sizes.faults):
        return
    from .kills import kill_rounds, make_bench
    from .limits import fault_rounds

    with make_bench(command) as bench:
        if sizes.kills:
            yield _last(kill_rounds(bench, sizes.kills, seed), "kills", bars)
        if sizes.faults:
            yield from _last(fault_rounds(bench, sizes.faults, seed), "faults", bars)


def _last(rounds: Iterable[Any], name: str, bars: dict[str, Any]) -> Any:
    """What the last round yields."""
    found = None
    for found in tqdm(rounds, desc=name, **bars):  # noqa: B007 - the last one counts
        pass
    return found
