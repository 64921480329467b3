"""Safetensors files: written tensor by tensor with a checksum of each, memory-mapped and checked when read.

Saving in another layout needs host memory for one tensor at a time, from a GPU for two small buffers. Reading is lazy:
a page is read when it is first touched. Checking a tensor touches all of its pages once, at several GB/s.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxcompile.errors import CheckpointError
from mxcompile.tensor.digest import tensor_bytes
from mxcompile.tensor.dtypes import SAFETENSORS_NAMES
from mxcompile.tensor.pinned_copies import PinnedCopies

_ADVICE: Final = "copy the checkpoint again, or save it again"
_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class ShardChecksums:
    """Size and CRC-32s of a file. header: of all bytes before the tensors. tensors: of the bytes of each tensor."""

    bytes: int
    header: int
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class PendingTensor:
    """A tensor that is made when it is written.

    make: returns one of that dtype and shape. owner: the name of the module's tensor that it is a part of.
    """

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]
    owner: str = ""

    def element_size(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.dtype.itemsize * self.shape.numel()


Stored = TypeVar("Stored", bound=Tensor | PendingTensor)


def split(tensors: Mapping[str, Stored], largest: int) -> list[dict[str, Stored]]:
    """Consecutive groups of at most `largest` bytes; a larger tensor is a group of its own."""
    groups: list[dict[str, Stored]] = [{}]
    room = largest
    for name, tensor in tensors.items():
        if tensor.nbytes > room and groups[-1]:
            groups.append({})
            room = largest
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return groups


def in_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors in the order in which `write` writes them, which keeps each aligned without gaps."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def write(path: Path, tensors: Mapping[str, Stored]) -> ShardChecksums:
    """Write a file and wait until it is on the disk."""
    ordered = in_order(tensors)
    header = _header(ordered)
    checksums: dict[str, int] = {}
    with path.open("wb") as file, ThreadPoolExecutor(1) as thread:
        file.write(header)
        copies = dict[torch.device, PinnedCopies]()
        for name, tensor in ordered.items():
            checksum = 0
            for piece in _pieces(tensor.make() if isinstance(tensor, PendingTensor) else tensor, copies):
                following = thread.submit(zlib.crc32, piece, checksum)
                file.write(piece)
                checksum = following.result()
            checksums[name] = checksum
        file.flush()
        os.fsync(file.fileno())
    return ShardChecksums(path.stat().st_size, zlib.crc32(header), checksums)


def _pieces(tensor: Tensor, copies: dict[torch.device, PinnedCopies]) -> Iterable[memoryview]:
    """The bytes of a tensor in row-major order; those of one on a GPU come in pieces."""
    if not tensor.is_cuda:
        return [tensor_bytes(tensor)]
    return copies.setdefault(tensor.device, PinnedCopies(tensor.device)).pieces(tensor.detach())


def read(path: Path, shard: ShardChecksums, *, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, memory-mapped. verify: False checks only the file's size and its list of tensors.

    Raises CheckpointError if the file has changed since it was written.
    """
    try:
        _check_file(path, shard)
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(shard.tensors):
                raise CheckpointError(f"{path} does not hold the tensors that the index lists")
            for name, checksum in shard.tensors.items():
                tensor = file.get_tensor(name)
                if verify and zlib.crc32(tensor_bytes(tensor)) != checksum:
                    raise _damaged(path, name)
                yield name, tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {_ADVICE}") from error


def read_tensor(path: Path, shard: ShardChecksums, name: str, *, verify: bool = True) -> Tensor:
    """One tensor of a file, memory-mapped. Raises CheckpointError if the file or its bytes have changed."""
    try:
        _check_file(path, shard)
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {_ADVICE}") from error
    if verify and zlib.crc32(tensor_bytes(tensor)) != shard.tensors[name]:
        raise _damaged(path, name)
    return tensor


def check_tensors(folder: Path, files: Mapping[str, ShardChecksums]) -> None:
    """Raise CheckpointError if a byte of a tensor in these files has changed. Runs on all cores."""

    def check(file: str, name: str) -> None:
        read_tensor(folder / file, files[file], name)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for done in [threads.submit(check, file, name) for file, shard in files.items() for name in shard.tensors]:
            done.result()


def is_unchanged(path: Path, shard: ShardChecksums) -> bool:
    """Whether a file of that size and list of tensors is there; the tensors' values are not checked."""
    try:
        _check_file(path, shard)
    except CheckpointError:
        return False
    return True


def check_dtypes(tensors: Iterable[tuple[str, Tensor | PendingTensor]]) -> None:
    """Raise CheckpointError for a dtype that safetensors cannot store."""
    for name, tensor in tensors:
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which safetensors cannot store: cast it")


def _header(tensors: Mapping[str, Tensor | PendingTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _check_file(path: Path, shard: ShardChecksums) -> None:
    """Raise CheckpointError if a file's size or list of tensors has changed since it was written."""
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        what = "is missing" if size is None else f"has {size} bytes, {shard.bytes} were written"
        raise CheckpointError(f"{path} {what}: {_ADVICE}")
    if zlib.crc32(_read_header(path, shard.bytes)) != shard.header:
        raise _damaged(path, "its list of tensors")


def _read_header(path: Path, largest: int) -> bytes:
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        return length + file.read(min(int.from_bytes(length, "little"), largest))


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({what} has changed since it was written): {_ADVICE}")
