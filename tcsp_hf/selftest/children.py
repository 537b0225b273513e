"""Child processes forked from a warm parent: a round takes as long as its work, not as long as the imports."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import transformers
from tqdm import tqdm

from ..errors import ends_a_command

RIGHT, REFUSED, WRONG, HUNG = 0, 3, 4, 5
"""Exit codes: it worked; it ended in one clear error; it ended otherwise; it did not end."""
_LONGEST = 300.0


def hide_bars() -> None:
    """No progress bars in the parent: they start a thread, and a process with threads must not fork."""
    tqdm.monitor_interval = 0
    transformers.utils.logging.disable_progress_bar()


def start(action: Callable[[], None], log: Path) -> int:
    """Run `action` in a child; its output goes to the file `log`. Returns the process id.

    The caller has one thread (`torch.set_num_threads(1)`), as forking needs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = WRONG
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        code = _outcome(action)
    finally:
        os._exit(code)  # no clean-up of what belongs to the parent


def _outcome(action: Callable[[], None]) -> int:
    try:
        action()
        code = RIGHT
    except BaseException as error:
        code = REFUSED if ends_a_command(error) else WRONG
        try:
            traceback.print_exc()
        except (OSError, MemoryError):
            return code  # the disk or the memory is what ran out
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return code
    return code


def finish(child: int) -> int:
    """Wait for a child; its exit code, minus the signal that ended it, or `HUNG` after five minutes."""
    code = finish_within(child, _LONGEST)
    if code is None:
        kill(child)
        return HUNG
    return code


def kill(child: int) -> int:
    """SIGKILL; the exit code, which shows whether the child was faster."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish_within(child: int, seconds: float, begun: Callable[[], bool] | None = None) -> int | None:
    """Wait at most so many seconds, counted from the moment when `begun()` first holds; None when it still runs."""
    started = time.monotonic()
    counting = begun is None
    while True:
        if not counting and begun is not None and begun():
            counting, started = True, time.monotonic()
        if counting and time.monotonic() - started >= seconds:
            return None
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)


def last_words(log: Path) -> str:
    """The last line that a child wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:300] if lines else "(nothing)"
