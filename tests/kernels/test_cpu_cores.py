"""Where other processes want the cores, torch's parallel regions have one thread; else as many as before."""

import subprocess
import sys

import pytest
import torch
from cpu_kernels import needs_compiler

from mxcompile.kernels.cpu import cores


@pytest.fixture(autouse=True)
def asked_again(monkeypatch):
    monkeypatch.setattr(cores, "_last", [(0.0, False)])


def test_the_system_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1})
    for count, expected in ((4, False), (5, True)):
        cores._LOAD.write_text(f"0.00 0.00 0.00 {count}/345 1234\n")
        monkeypatch.setattr(cores, "_last", [(0.0, False)])
        assert cores.others_want_cores() is expected
    cores._LOAD.write_text("0.00 0.00 0.00 1/345 1234\n")
    assert cores.others_want_cores()  # it was asked a moment ago


def test_a_system_that_does_not_say_is_not_busy(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "_LOAD", tmp_path / "nothing")
    assert not cores.others_want_cores()


@needs_compiler
@pytest.mark.parametrize("busy", [False, True])
def test_threads_of_a_region(busy):
    """In a process of its own: whoever was once busy stays alone for a while. Results are the same."""
    code = f"""
import ctypes, torch
from mxcompile.kernels.cpu import cores
torch.set_num_threads(2)
cores.others_want_cores = lambda: {busy}
x = torch.ones(1 << 20)
torch.sum(x)  # loads and starts OpenMP
levels = cores.recording_library().mx_most_levels
before = levels()
with cores.alone_if_busy():
    inside, total = levels(), x.sum().item()
print(before == levels(), inside == (0 if {busy} else before), total == 1 << 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3


def test_an_exception_passes_through(monkeypatch):
    monkeypatch.setattr(cores, "others_want_cores", lambda: False)
    with pytest.raises(ValueError, match="mine"), cores.alone_if_busy():
        raise ValueError("mine")


def test_without_a_compiler_nothing_changes(monkeypatch):
    def fail():
        raise cores.BuildError("no compiler")

    monkeypatch.setattr(cores, "recording_library", fail)
    with cores.alone_if_busy():
        assert torch.ones(2).sum() == 2
