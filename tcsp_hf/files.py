"""Folders and files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TCSPError


def check_output_folder(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse, before any long work, a place that `new_folder` could not write.

    Raises:
        TCSPError: `path` is a file, a folder that is not empty (and `overwrite` is False), or lies below something
            that is not a writable folder.
    """
    folder = Path(path)
    if folder.is_symlink() or folder.is_file():
        raise TCSPError(f"{folder} is not a folder: name a new or an empty folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise TCSPError(f"The folder {folder} is not empty: name another one, or pass overwrite=True (--overwrite).")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise TCSPError(f"{folder} cannot be written: {parent} is not a writable folder.")
    return folder


@contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends without an exception.

    An existing non-empty `path` is refused unless `overwrite`; it is then replaced as a whole. After an exception
    (or a kill) `path` is as it was.

    Raises:
        TCSPError: see `check_output_folder`.
    """
    target = check_output_folder(path, overwrite).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        os.chmod(staging, 0o777 & ~_umask())  # mkdtemp's folders are private to the user
        yield staging
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, old / "old")
            os.replace(staging, target)
            shutil.rmtree(old)
        else:
            os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all; an existing one is replaced."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's files are private to the user
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
