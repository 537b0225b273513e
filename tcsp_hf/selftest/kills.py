"""Commands killed (SIGKILL) at random moments: nothing partial is left behind, and the next run works."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import TCSPError
from ..loading import load_model
from .children import REFUSED, RIGHT, finish, finish_within, hide_bars, kill, last_words, start
from .jobs import JOBS, Command, Digest, Job, digest, lay_out, lost, not_whole, prepare
from .tally import Tally


class Bench:
    """Folders, and what every job gives when nothing disturbs it.

    Attributes:
        ends: by job, what it writes.
        seconds: by job, how long it takes, and how long from its first trace on the disk to its end.
    """

    def __init__(self, folder: Path, command: Command) -> None:
        self.inputs, self.work, self.log = folder / "inputs", folder / "work", folder / "log.txt"
        self.inputs.mkdir()
        self._command = command
        self._must(finish(start(self._prepare, self.log)))
        for name in (folder / "modules.txt").read_text(encoding="utf-8").split():
            with suppress(Exception):  # a module that only makes sense where it was imported
                import_module(name)
        hide_bars()
        for name in ("bert", "t5", "small", "small-t5"):
            load_model(str(self.inputs / name))  # transformers prepares tables at the first one of each class
        self.before = digest(self.inputs)
        self.ends: dict[str, Digest] = {}
        self.seconds: dict[str, tuple[float, float]] = {}
        for job in JOBS:
            lay_out(self.work, self.inputs, job)
            changed, begun = self.changed(), time.monotonic()
            child = self.run(job)
            code = finish_within(child, 0.0, changed)  # None: it has begun to write
            writing = time.monotonic()
            self._must(finish(child) if code is None else code)
            self.seconds[job.name] = (time.monotonic() - begun, time.monotonic() - writing)
            self._must(finish(self.check(job)))
            self.ends[job.name] = digest(self.work / "out")

    def _prepare(self) -> None:
        """Inputs, and the names of all modules that the jobs import: the parent imports them once for all children."""
        prepare(self.inputs, self._command)
        for job in JOBS:
            lay_out(self.work, self.inputs, job)
            self._command(job.words(self.inputs, self.work))
            job.check(self.work / "out")
        text = "\n".join(sys.modules)
        (self.log.parent / "modules.txt").write_text(text, encoding="utf-8")

    def _must(self, code: int) -> None:
        if code != RIGHT:
            raise TCSPError(f"The self-test cannot begin, a command fails undisturbed: {last_words(self.log)}")

    def run(self, job: Job, fault: Callable[[], None] | None = None) -> int:
        """Start the job, after `fault` in the same process; its process id."""

        def act() -> None:
            if fault is not None:
                fault()
            self._command(job.words(self.inputs, self.work))

        return start(act, self.log)

    def check(self, job: Job) -> int:
        """Start a child that loads the job's output."""
        return start(lambda: _discard(job.check(self.work / "out")), self.log)

    def changed(self) -> "Changed":
        return Changed(self.work)

    def found_wrong(self, job: Job, start_digest: Digest) -> str | None:
        """What a disturbed job left that it must not leave."""
        missing = lost(self.work, self.inputs, self.before)
        if missing is not None:
            return f"{missing} of the user's was changed"
        return not_whole(self.work, job, start_digest, self.ends[job.name])

    def recovers(self, job: Job) -> str | None:
        """Run the job again, undisturbed: why its result is not the right one, or None."""
        code = finish(self.run(job))
        complete = digest(self.work / "out") == self.ends[job.name]
        if code == REFUSED and complete:
            code = RIGHT  # it was finished before: refused, as a folder that is not empty is
        if code != RIGHT:
            return f"the next run failed: {last_words(self.log)}"
        if not complete:
            return "the next run gave another result"
        if lost(self.work, self.inputs, self.before) is not None:
            return "the next run changed a file of the user's"
        hidden = [path.name for path in self.work.iterdir() if path.name.startswith(".")]
        return f"the next run left {hidden}" if hidden else None


class Changed:
    """Whether anything in a folder, or in `out` below, is new since this was made."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._names = self._look()

    def _look(self) -> set[str]:
        found = set(os.listdir(self._work))
        out = self._work / "out"
        return found | {f"out/{name}" for name in (os.listdir(out) if out.is_dir() else ())}

    def __call__(self) -> bool:
        return self._look() != self._names


def _discard(_: object) -> None:
    return None


@contextmanager
def make_bench(command: Command) -> Iterator[Bench]:
    """A `Bench` in a temporary folder."""
    with TemporaryDirectory(prefix="tcsp-selftest-") as folder:
        os.chmod(folder, 0o755)  # a child without rights reads it too
        yield Bench(Path(folder), command)


def kill_rounds(bench: Bench, rounds: int, seed: int) -> Iterator[Tally]:
    """Kill the jobs in turn until `rounds` kills have hit; one tally, yielded after every kill.

    Every other kill falls into the time in which the job writes.
    """
    tally = Tally("SIGKILL at a random moment", facts={"kills by command": {job.name: 0 for job in JOBS}})
    draw = random.Random(seed)
    attempt = 0
    while tally.tried < rounds:
        job = JOBS[attempt % len(JOBS)]
        attempt += 1
        whole, writing = bench.seconds[job.name]
        start_digest = lay_out(bench.work, bench.inputs, job)
        late = draw.random() < 0.5
        seconds = draw.uniform(0.0, writing if late else whole)
        child = bench.run(job)
        code = finish_within(child, seconds, bench.changed() if late else None)
        if code is None:
            code = kill(child)
        if code != -signal.SIGKILL:
            continue  # it was faster
        tally.facts["kills by command"][job.name] += 1
        wrong = bench.found_wrong(job, start_digest) or bench.recovers(job)
        if wrong is None:
            tally.right += 1
        else:
            after = f"{seconds:.4f} s after it {'began to write' if late else 'started'}"
            tally.fail(f"{job.name} killed {after} (seed {seed}, attempt {attempt}): {wrong}")
        yield tally
