"""Write a file or a folder whole or not at all: under a temporary name beside its destination, then renamed.

A reader sees the old file or the new one, never half of one, however the writer ends. `durable` writes also survive a
power failure: the data is on the disk before the rename, and the rename before the call returns.
"""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

_SUFFIX: Final = ".mxcompile-save"


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Generator[Path]:
    """Yield a path of the same file name to write to; it replaces `path` when the block ends without an error.

    Several processes may write the same file at once: the last one to finish wins. Missing parent folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX) as folder:
        staged = Path(folder) / path.name
        yield staged
        if durable:
            sync(staged)
        staged.replace(path)
        if durable:
            sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield a folder to write to; it becomes `path`, which must be free or empty, when the block ends without an error.

    Durable. What a killed writer of the same folder has left behind is deleted first.
    """
    staged = path.parent / f".{path.name}{_SUFFIX}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        for written in staged.rglob("*"):
            sync(written)
        sync(staged)
        staged.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def discard_unfinished(folder: Path) -> None:
    """Delete what killed calls of `atomic_file` have left in a folder that nobody else is writing to."""
    for unfinished in folder.glob(f".*{_SUFFIX}"):
        shutil.rmtree(unfinished)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file under its own name and wait until it is on the disk."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot fsync a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
