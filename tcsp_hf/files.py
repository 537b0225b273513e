"""Folders and files that appear whole or not at all."""

import glob
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import TCSPError

if sys.platform != "win32":
    import fcntl

_STAGING, _OLD = ".partial", ".old"


def check_output_folder(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse, before any long work, a place that `new_folder` could not write.

    Where a run was killed in the very moment of replacing `path`, the old content is put back first.

    Raises:
        TCSPError: `path` is a file, a folder that is not empty (and `overwrite` is False), or lies below something
            that is not a writable folder; or it cannot be replaced: the process works in it, or it is a mount point.
    """
    folder = Path(os.path.expanduser(path))
    _put_back(folder)
    if folder.is_symlink() or folder.is_file():
        raise TCSPError(f"{folder} is not a folder: name a new or an empty folder.")
    if folder.is_dir() and _holds_current(folder):
        raise TCSPError(f"{folder} holds the current directory, so it cannot be replaced: name a folder below it.")
    if os.path.ismount(folder):
        raise TCSPError(f"{folder} is a mount point, so it cannot be replaced: name a folder below it.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise TCSPError(f"The folder {folder} is not empty: name another one, or pass overwrite=True (--overwrite).")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise TCSPError(f"{folder} cannot be written: {parent} is not a writable folder.")
    return folder


def _holds_current(folder: Path) -> bool:
    """Whether it is the current directory or above it."""
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:  # it is gone
        return False
    return folder.resolve() in (here, *here.parents)


def check_output_file(path: Path, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse, before any long work, a file that is there already or that cannot be written.

    Raises:
        TCSPError: so it is; or the name ends with none of the suffixes.
    """
    if path.exists():
        raise TCSPError(f"{option}: {path} exists: name another file.")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise TCSPError(f"{option}: {path} cannot be written: {parent} is not a writable folder.")
    if suffixes and path.suffix not in suffixes:
        raise TCSPError(f"{option} is {path}; its name must end with one of {', '.join(suffixes)}.")


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends without an exception.

    An existing non-empty `path` is refused unless `overwrite`, at the end as well; it is then replaced as a whole.
    After an exception (or a kill) `path` is as it was. What runs that were killed left beside it is removed.

    Raises:
        TCSPError: see `check_output_folder`; or `path` cannot be replaced at the end: the message says where the result
            is.
    """
    target = check_output_folder(path, overwrite).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    staging, lock = _make_staging(target)
    try:
        os.chmod(staging, 0o777 & ~_umask())  # mkdtemp's folders are private to the user
        yield staging
        if not overwrite and target.is_dir() and any(target.iterdir()):
            aside = _keep_aside(staging, target)
            raise TCSPError(f"Something else was written to {target} meanwhile: the result is in {aside}.")
        try:
            _replace(target, staging)
        except OSError as error:
            aside = _keep_aside(staging, target)
            raise TCSPError(f"{target} cannot be replaced ({error.strerror}): the result is in {aside}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _release(lock)


def _replace(target: Path, staging: Path) -> None:
    """Put `staging` in the place of `target`, which is as it was after an OSError."""
    if not target.exists():
        os.replace(staging, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_OLD, dir=target.parent))
    try:
        os.replace(target, old / "old")
        os.replace(staging, target)
    except OSError:
        with suppress(OSError):
            if not target.exists():
                os.replace(old / "old", target)
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _keep_aside(staging: Path, target: Path) -> Path:
    """The result under another name beside `target`."""
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    os.replace(staging, aside)
    return aside


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all; an existing one is replaced."""
    _sweep(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_STAGING, dir=path.parent)
    lock = _lock(Path(name))
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's files are private to the user
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
        _release(lock)


def json_text(value: Any) -> str:
    """JSON that any program reads: a number that is none (NaN, infinity) is null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What a killed run leaves -------------------------------------------------------------------------------------------


def set_aside(path: Path) -> list[Path]:
    """Where a run that is replacing `path`, or was killed while it did, keeps the old content."""
    return [found / "old" for found in _beside(path, _OLD) if (found / "old").is_dir()]


def _beside(path: Path, suffix: str) -> list[Path]:
    """`.NAME.RANDOM.suffix`, as this module names them; RANDOM holds no dot, so those of NAME.txt are not NAME's."""
    start = f".{path.name}."
    found = path.parent.glob(f"{glob.escape(start)}*{suffix}")
    return sorted(one for one in found if "." not in one.name.removeprefix(start).removesuffix(suffix))


def _put_back(target: Path) -> None:
    """Undo the first of two renames, where a run was killed between them."""
    if target.exists() or target.is_symlink() or not target.parent.is_dir():
        return
    running = [found for found in _beside(target, _STAGING) if _is_held(found)]
    for old in [] if running else set_aside(target):
        os.replace(old, target)
        old.parent.rmdir()
        return


def _sweep(target: Path) -> None:
    """Remove the staging folders and files of runs that are no longer there."""
    staging = _beside(target, _STAGING)
    if any(_is_held(found) for found in staging):
        return  # another run works on the same target: all that is hidden may be its own
    for found in [*staging, *(_beside(target, _OLD) if target.exists() else [])]:
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            with suppress(OSError):
                found.unlink()


def _make_staging(target: Path) -> tuple[Path, int | None]:
    """A folder that this process holds a lock on."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGING, dir=target.parent))
        lock = _lock(staging)
        if staging.is_dir():  # another run may have swept it away before the lock was there
            return staging, lock
        _release(lock)


def _lock(path: Path) -> int | None:
    """Hold `path` until `_release`, or until this process ends in whatever way; None where it cannot be held."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _is_held(path: Path) -> bool:
    """Whether a living process may be writing there."""
    lock = _lock(path)
    _release(lock)
    return lock is None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
