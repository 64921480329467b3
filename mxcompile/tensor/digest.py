"""SHA-256 of a tensor's values: equal digests mean equal bytes, whatever the device or strides."""

import hashlib

import torch
from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """64 hexadecimal digits. Neither dtype nor shape enters."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order; no copy is made of a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore - numpy's stubs of 3.11
