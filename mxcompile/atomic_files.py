"""Write a file or a folder whole or not at all: under a temporary name beside its destination, then renamed.

A reader sees the old file or the new one, never half of one, however the writer ends. `durable` writes also survive a
power failure: the data is on the disk before the rename, and the rename before the call returns.

    .NAME.mxcompile-save/      what is being written, or what a killed writer has left
    .NAME.mxcompile-save.lock  locked by the one writer; the system releases the lock of a process that ends

Writers of one destination take turns, whether threads or processes. The next one deletes what a killed one has left.
The destination may be a symlink: what it points to is replaced. Every failure is an OSError.
"""

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

from filelock import FileLock, Timeout

from mxcompile.errors import warn

_STAGE: Final = ".mxcompile-save"
_LOCK: Final = f"{_STAGE}.lock"
_PATIENCE: Final = 10.0
_PROBE: Final = bytes(4096)


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Generator[Path]:
    """Yield a path of the same file name to write to; it replaces `path` when the block ends without an error.

    Missing parent folders are made.
    """
    path = real_path(path)
    _check_regular(path)
    with _staging(path) as stage:
        staged = stage / path.name
        yield staged
        if durable:
            sync(staged)
        staged.replace(path)
        if durable:
            sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield a folder to write to; it becomes `path`, which must be free or empty, when the block ends without an error.

    Durable. Missing parent folders are made.
    """
    path = real_path(path)
    with _staging(path) as stage:
        staged = stage / path.name
        staged.mkdir()
        yield staged
        for written in staged.rglob("*"):
            sync(written)
        sync(staged)
        staged.replace(path)
        sync(path.parent)


@contextmanager
def folder_lock(folder: Path, *, wait: bool = True) -> Generator[None]:
    """Make the folder if it is missing, and let one thread or process at a time into the block.

    wait: False raises BlockingIOError if there is another one.
    """
    with _locked(folder / _LOCK, folder, wait=wait):
        yield


def contents(folder: Path) -> list[Path]:
    """What is in a folder, except locks and what killed writers have left."""
    return [path for path in folder.iterdir() if not path.name.endswith((_STAGE, _LOCK))]


def check_writable(path: Path, *, is_folder: bool) -> None:
    """Raise OSError if nothing can be written to a file, or in a folder, of that path; nothing is left on the disk.

    Missing folders count as writable if the nearest existing one is.
    """
    path = real_path(path)
    nearest = path
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if nearest == path and not is_folder:
        _check_regular(path)
        nearest = path.parent
    if not nearest.is_dir():
        raise OSError(errno.ENOTDIR, "it is a file, not a folder", str(nearest))
    try:
        with TemporaryFile(dir=nearest) as probe:
            probe.write(_PROBE)
            probe.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(nearest)) from error


def real_path(path: Path) -> Path:
    """The absolute path without symlinks; it need not exist."""
    return Path(os.path.realpath(path))


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


@contextmanager
def _staging(path: Path) -> Generator[Path]:
    """An empty folder beside `path`, for one writer at a time; it is deleted afterwards."""
    stage = path.with_name(f".{path.name}{_STAGE}")
    with _locked(path.with_name(f".{path.name}{_LOCK}"), path):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _locked(lock_file: Path, destination: Path, *, wait: bool = True) -> Generator[None]:
    """Hold a lock, in a folder that is made if missing. The lock file exists only while it is held or waited for."""
    lock = FileLock(lock_file)
    while not lock.is_locked:
        try:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_PATIENCE if wait else 0)
        except FileNotFoundError:  # a writer that failed has deleted the folder that it had made, or
            check_writable(lock_file.parent, is_folder=True)
        except Timeout as error:  # there is another writer, or
            check_writable(lock_file.parent, is_folder=True)
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another writer has locked it", str(destination)) from error
            warn(f"waiting for another writer of {destination}")
    try:
        yield
    finally:
        with suppress(OSError):  # left over it does no harm; Windows cannot delete an open file, filelock does it there
            lock_file.unlink()  # before the release: the next holder then makes a new one
        lock.release()


def _check_regular(path: Path) -> None:
    """Raise OSError for what a file must not replace: a folder, a device, a pipe."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it is not a regular file", str(path))
