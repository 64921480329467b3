"""Weight files: the bytes and the checksums of tensors, wherever they are."""

import zlib

import pytest
import torch

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.shards import PendingTensor
from mxcompile.tensor import pinned_copies
from mxcompile.tensor.digest import tensor_bytes

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_tensors_are_written_with_their_checksums(device, tmp_path, monkeypatch):
    monkeypatch.setattr(pinned_copies, "PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "float": torch.randn(7, 11, generator=generator),
        "transposed": torch.randn(5, 64, generator=generator).bfloat16().T,
        "bytes": torch.randint(256, (1000,), generator=generator, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    last = there.pop("bytes")
    pending = PendingTensor(last.dtype, last.shape, lambda: last)
    checksums = shards.write(tmp_path / "file.safetensors", there | {"bytes": pending})
    assert checksums.tensors == {name: zlib.crc32(tensor_bytes(tensor)) for name, tensor in tensors.items()}
    read = dict(shards.read(tmp_path / "file.safetensors", checksums))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
