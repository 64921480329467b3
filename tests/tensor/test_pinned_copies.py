"""PinnedCopies: the same bytes to and from a device, in pieces, through two buffers."""

import pytest
import torch

from mxcompile.tensor.digest import tensor_bytes
from mxcompile.tensor.pinned_copies import PinnedCopies

CPU = torch.device("cpu")
CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 1000])
def test_the_same_values_in_both_directions(device, dtype, count):
    copies, value = PinnedCopies(device, piece=64), values(count, dtype=dtype)
    there = copies.to_device(value)
    assert there.device.type == device.type
    assert there.dtype == dtype
    assert torch.equal(there.cpu(), value)
    assert b"".join(map(bytes, copies.pieces(there))) == bytes(tensor_bytes(value))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_copy_is_of_the_values_at_the_call(device):
    copies, value = PinnedCopies(device, piece=64), values(1000)
    there = [copies.to_device(value) for _ in range(3)]
    value.zero_()
    assert all(torch.equal(copy.cpu(), values(1000)) for copy in there)
    assert there[0].data_ptr() != there[1].data_ptr()


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_bytes_are_in_row_major_order(device):
    copies, value = PinnedCopies(device, piece=64), values(12, 20)
    pieces = [bytes(piece) for piece in copies.pieces(value.to(device).T)]
    assert b"".join(pieces) == bytes(tensor_bytes(value.T))
    assert {len(piece) for piece in pieces} == {64}


def test_two_buffers_serve_all_copies():
    copies = PinnedCopies(CPU, piece=64)
    assert not copies._buffers
    copies.to_device(values(1000))
    buffers = copies._buffers
    list(copies.pieces(values(1000)))
    assert copies._buffers is buffers
    assert [len(buffer.bytes) for buffer in buffers] == [64, 64]
