"""The memory that a bar shows: what tensors take is in it, what mapped files take is not."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxcompile.cli import memory_in_use as module
from mxcompile.cli.memory_in_use import host_bytes, memory_in_use, peak_bytes

SIZE = 256 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_tensors_count_and_mapped_files_do_not(tmp_path):
    before = host_bytes()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    assert SIZE * 0.9 < host_bytes() - before < SIZE * 1.5
    save_file({"tensor": tensor}, tmp_path / "mapped.safetensors")
    del tensor
    before = host_bytes()
    mapped = load_file(tmp_path / "mapped.safetensors")["tensor"]
    assert mapped.sum() == SIZE
    assert host_bytes() - before < SIZE * 0.5


@linux
def test_the_peak_of_a_block_is_its_own():
    """What was larger before the block does not count, where the system lets the peak be reset."""
    larger = torch.ones(4 * SIZE, dtype=torch.uint8)
    del larger
    before = host_bytes()
    with peak_bytes() as peak:
        tensor = torch.ones(SIZE, dtype=torch.uint8)
        del tensor
    assert peak() is None or SIZE * 0.9 < peak() - before < SIZE * 3


@pytest.mark.parametrize(
    ("host", "gpus", "shown"),
    [
        (1_200_000_000, [], "1.2 GB"),
        (None, [], ""),
        (1_200_000_000, [3_000_000_000, 400_000_000], "1.2 GB, GPU 3.4 GB"),
        (None, [3_400_000_000], "GPU 3.4 GB"),
    ],
)
def test_the_text(monkeypatch, host, gpus, shown):
    monkeypatch.setattr(module, "host_bytes", lambda: host)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: gpus[index])
    assert memory_in_use() == shown
