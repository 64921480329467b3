"""atomic_file and atomic_folder: the destination holds the old content or all of the new, and nothing else is left."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mxcompile.checkpoint.atomic_files import atomic_file, atomic_folder, discard_unfinished

KILLED = """
import os, signal, sys
from pathlib import Path
from mxcompile.checkpoint.atomic_files import atomic_file, atomic_folder

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


def test_several_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "report.html"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the one that ended last
    assert names(tmp_path) == ["report.html"]


def test_an_error_leaves_no_folder(tmp_path):
    with suppress(ZeroDivisionError), atomic_folder(tmp_path / "model") as staged:
        (staged / "part").write_text("half")
        raise ZeroDivisionError
    assert not names(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_writer_of_a_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    kill_while_writing(path, "file")
    assert path.read_text() == "old"
    discard_unfinished(tmp_path)
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
