"""atomic_file and atomic_folder: the destination holds the old content or all of the new, and nothing else is left."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from mxcompile import atomic_files
from mxcompile.atomic_files import atomic_file, atomic_folder, check_writable, contents, folder_lock

KILLED = """
import os, signal, sys
from pathlib import Path
from mxcompile import atomic_files
from mxcompile.atomic_files import atomic_file, atomic_folder, check_writable, contents, folder_lock

path = Path(sys.argv[1])
with (atomic_file if sys.argv[2] == "file" else atomic_folder)(path) as staged:
    target = staged if sys.argv[2] == "file" else staged / "part"
    target.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def kill_while_writing(path: Path, kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, path, kind], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_when_the_new_one_is_whole(durable, tmp_path):
    path = tmp_path / "new" / "report.html"
    for text in ("old", "new"):
        with atomic_file(path, durable=durable) as staged:
            assert staged.name == path.name
            staged.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert names(path.parent) == ["report.html"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with suppress(ZeroDivisionError), atomic_file(path) as staged:
        staged.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.html"]


@pytest.mark.parametrize("target", [atomic_file, atomic_folder, folder_lock])
def test_writers_of_one_place_take_turns(target, tmp_path):
    """Threads, and so processes: each opens the lock's file for itself."""
    writing, most = 0, 0

    def write(n):
        nonlocal writing, most
        with suppress(OSError), target(tmp_path / "place"):  # all folders but the first find the place taken
            writing += 1
            most = max(most, writing)
            (tmp_path / f"{n}").write_text("")
            writing -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(16)))
    assert most == 1
    assert not list(tmp_path.rglob(".*"))


def test_a_writer_that_waits_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_files, "_PATIENCE", 0.01)
    with ThreadPoolExecutor(1) as pool, folder_lock(tmp_path):
        with pytest.raises(BlockingIOError, match="another writer has locked it"):
            pool.submit(lambda: ExitStack().enter_context(folder_lock(tmp_path, wait=False))).result()
        monkeypatch.setattr(atomic_files, "warn", lambda message: (_ for _ in ()).throw(InterruptedError(message)))
        with pytest.raises(InterruptedError, match=f"waiting for another writer of {tmp_path}"):
            pool.submit(lambda: ExitStack().enter_context(folder_lock(tmp_path))).result()
    assert not names(tmp_path)


@pytest.mark.parametrize("target", [atomic_file, atomic_folder])
def test_a_link_stays_a_link(target, tmp_path):
    for name in ("there", "missing"):
        real, link = tmp_path / name, tmp_path / f"link to {name}"
        link.symlink_to(real)
        if name == "there":
            real.mkdir() if target is atomic_folder else real.write_text("old")
        with target(link) as staged:
            (staged if target is atomic_file else staged / "part").write_text("new")
        assert link.is_symlink()
        assert (real if target is atomic_file else real / "part").read_text() == "new"


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, error in (("folder", "it is a folder, not a file"), ("pipe", "it is not a regular file")):
        with pytest.raises(OSError, match=error), atomic_file(tmp_path / name):
            pass
        with pytest.raises(OSError, match=error):
            check_writable(tmp_path / name, is_folder=False)
    assert sorted(names(tmp_path)) == ["folder", "pipe"]


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_place_that_cannot_be_written_is_known_before(is_folder, tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "place", is_folder=is_folder)
    check_writable(tmp_path if is_folder else tmp_path / "file", is_folder=is_folder)
    with pytest.raises(NotADirectoryError, match=r"it is a file, not a folder: '.*/file'"):
        check_writable(tmp_path / "file" / "place", is_folder=is_folder)
    with pytest.raises(OSError, match="/proc"):
        check_writable(Path("/proc/place"), is_folder=is_folder)
    assert names(tmp_path) == ["file"]


def test_an_error_leaves_no_folder(tmp_path):
    with suppress(ZeroDivisionError), atomic_folder(tmp_path / "model") as staged:
        (staged / "part").write_text("half")
        raise ZeroDivisionError
    assert not names(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_writer_of_a_file_leaves_the_old_one_and_blocks_nobody(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    kill_while_writing(path, "file")
    assert path.read_text() == "old"
    assert contents(tmp_path) == [path]
    with atomic_file(path) as staged:  # the lock of a killed process is free
        staged.write_text("new")
    assert names(tmp_path) == ["report.html"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_the_next_writer_of_a_folder_clears_up_after_a_killed_one(tmp_path):
    path = tmp_path / "model"
    kill_while_writing(path, "folder")
    assert not path.exists()
    with atomic_folder(path) as staged:
        (staged / "whole").write_text("all of it")
    assert names(tmp_path) == ["model"]
    assert names(path) == ["whole"]
