"""Tensors whose values lie in files: only those in use occupy memory.

    kept = mapped.keep(tensor)     the same values in a file of the folder, mapped into memory
    mapped.use(kept)               the values on the device that computes; those used longest ago are released

A mapped tensor is an ordinary CPU tensor. Reading it brings its pages into memory, where they are the system's cache of
the file; releasing it gives them up (`madvise`), and the next use reads the file again. On a GPU a use is a copy there,
which is kept until it is released; of a tensor that came from there, the tensor itself. Files have no name while they
are in use: their room is free once their tensors are gone, also if the process is killed.
"""

import ctypes
import mmap
import os
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from mxcompile.errors import InputError
from mxcompile.tensor.digest import tensor_bytes
from mxcompile.tensor.pinned_copies import PinnedCopies
from mxcompile.tensor.weight import MXWeight

IN_USE: Final = 1 << 30
"""Bytes of mapped tensors that may stay in memory, or on the GPU, after their use."""
STATES: Final = 1 << 30
"""Bytes of calibration states that may stay in memory."""
SMALLEST: Final = 1 << 18
"""Bytes below which a tensor stays in memory."""

_MAP_FIXED: Final = 0x10  # of Linux
_PAUSE: Final = 30  # times as long as giving memory back took

_View = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Use:
    """A mapped tensor in use. copy: on the device, None where the device is the CPU."""

    mapping: ref[mmap.mmap]
    bytes: int
    copy: Tensor | None


class MappedTensors:
    """folder: for the files; made if missing. device: where tensors are used. in_use, states, smallest: see above.

    states is for those who hold states of calibration batches: they keep the others in files.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        in_use: int = IN_USE,
        states: int = STATES,
        smallest: int = SMALLEST,
    ) -> None:
        self.folder, self.device, self.states = folder, device, states
        self._in_use, self._smallest = in_use, smallest
        self._copies, self._pinned = device.type != "cpu", PinnedCopies(device)
        self._trims_next = 0.0
        self._mappings: WeakValueDictionary[_View, mmap.mmap] = WeakValueDictionary()
        self._used: OrderedDict[_View, _Use] = OrderedDict()  # those used longest ago first

    def keep(self, value: Tensor, *, in_use: bool = True) -> Tensor:
        """The tensor with its values in a file; a small one on the device, one that is mapped already as it is.

        A parameter stays one, the component tensors of an MXWeight are mapped one by one. in_use: on a GPU, the tensor
        is also the copy in use, and must not be written to; False: its memory there is free once the caller drops it.
        Raises InputError if the file cannot be written; nothing is left of it.
        """
        if isinstance(value, MXWeight):
            return _with_parts(value, [self.keep(part, in_use=in_use) for part in value.parts])
        plain = value.detach()
        if self.holds(plain):
            return value
        if not self.is_large(plain.dtype, plain.shape):
            kept = plain.to(self.device)
        else:
            kept = self._written(plain)
            if in_use and self._copies and self._is_here(plain):
                self._put_in_use(kept, _of_its_own(plain))
        if kept is plain:
            return value
        return nn.Parameter(kept, requires_grad=False) if isinstance(value, nn.Parameter) else kept

    def is_large(self, dtype: torch.dtype, shape: torch.Size) -> bool:
        """Whether a tensor of that kind is kept in a file."""
        return dtype.itemsize * shape.numel() >= self._smallest

    def map_file(self, path: Path, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """The tensor whose values lie in a file from that byte on, in row-major order. The file is never written to."""
        with path.open("rb") as file:
            return self._mapped(file.fileno(), offset, dtype, shape)

    def holds(self, value: Tensor) -> bool:
        """Whether the tensor's values lie in a file."""
        return value.device.type == "cpu" and _view(value) in self._mappings

    def use(self, value: Tensor) -> Tensor:
        """The values of a tensor that the program holds, on the device. The result is for reading."""
        if isinstance(value, MXWeight):
            return _with_parts(value, [self.use(part) for part in value.parts])
        if not self.holds(value):
            return value
        view = _view(value)
        earlier = self._used.pop(view, None)
        if earlier is not None and earlier.mapping() is self._mappings[view]:  # else of a tensor that is gone
            self._used[view] = earlier
            return value if earlier.copy is None else earlier.copy
        if not self._copies:
            self._put_in_use(value, None)
            return value
        self._make_room(value.nbytes)
        copy = self._pinned.to_device(value.detach())
        _release_pages(self._mappings[view])
        self._put_in_use(value, copy)
        return copy

    def fetch(self, value: Tensor) -> Tensor:
        """`use` of a tensor that may lie in memory: the result is on the device, and so are all parts of an MXWeight,
        of which small ones lie in memory while others are mapped."""
        if isinstance(value, MXWeight):
            return _with_parts(value, [self.fetch(part) for part in value.parts])
        return self.use(value).to(self.device)

    def give_up(self, value: Tensor) -> None:
        """Give up the memory of a tensor whose mapped values were read without `use`, until they are read again."""
        for part in value.parts if isinstance(value, MXWeight) else (value.detach(),):
            if self.holds(part):
                _release_pages(self._mappings[_view(part)])

    def release(self) -> None:
        """Give up the memory of all mapped tensors until their next use."""
        while self._used:
            self._release_oldest()

    def return_freed(self) -> None:
        """Give memory that tensors no longer need back to the system: glibc keeps it, in pieces, for later ones.

        On a GPU not so often that it would take more than a few percent of the time: batches are fast there.
        """
        began = time.monotonic()
        if (trim := _malloc_trim()) is not None and (not self._copies or began >= self._trims_next):
            trim(0)
            ended = time.monotonic()
            self._trims_next = ended + _PAUSE * (ended - began)

    def _put_in_use(self, value: Tensor, copy: Tensor | None) -> None:
        """Count a mapped tensor as the last one used, and release others down to the limit."""
        self._make_room(value.nbytes)
        self._used[_view(value)] = _Use(ref(self._mappings[_view(value)]), value.nbytes, copy)

    def _make_room(self, size: int) -> None:
        """Release tensors, those used longest ago first, until so many bytes more are within the limit."""
        for view in [view for view, use in self._used.items() if use.mapping() is None]:
            del self._used[view]
        total = sum(use.bytes for use in self._used.values()) + size
        while self._used and total > self._in_use:
            total -= self._release_oldest()

    def _release_oldest(self) -> int:
        """Release the tensor used longest ago; returns its bytes."""
        _, oldest = self._used.popitem(last=False)
        if (mapping := oldest.mapping()) is not None:
            _release_pages(mapping)
        return oldest.bytes

    def _is_here(self, value: Tensor) -> bool:
        """Whether a tensor is where tensors are used."""
        return value.device.type == self.device.type and self.device.index in (None, value.device.index)

    def _written(self, value: Tensor) -> Tensor:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder, prefix="mxcompile-", buffering=0) as file:
                for piece in (tensor_bytes(value),) if value.device.type == "cpu" else self._pinned.pieces(value):
                    _write_all(file.fileno(), piece)
                return self._mapped(file.fileno(), 0, value.dtype, value.shape)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot hold the {value.nbytes / 1e6:.0f} MB of a tensor ({error}): make room there, or "
                "name a folder with more"
            ) from error

    def _mapped(self, file: int, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        size = dtype.itemsize * shape.numel()
        # a private mapping: what a graph writes into a state that it reads stays in memory
        mapping = _map_pages(file, offset - start + size, start)
        tensor = torch.frombuffer(mapping, dtype=dtype, count=shape.numel(), offset=offset - start).view(shape)
        self._mappings[_view(tensor)] = mapping
        return tensor


def _view(value: Tensor) -> _View:
    """Where a tensor's values lie, and how: another view of the same memory is another tensor."""
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _with_parts(weight: MXWeight, parts: list[Tensor]) -> MXWeight:
    """The weight with these component tensors; itself if they are its own."""
    if all(one is other for one, other in zip(parts, weight.parts, strict=True)):
        return weight
    return MXWeight(parts[0], parts[1], weight.layout_, weight.dtype, *parts[2:])


def _of_its_own(value: Tensor) -> Tensor:
    """The tensor, or a copy of it, in row-major order and in memory that holds nothing else."""
    alone = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if alone and not value.is_inference() else value.clone(memory_format=torch.contiguous_format)


@cache
def _malloc_trim() -> Any:
    """The function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _map_pages(file: int, size: int, offset: int) -> mmap.mmap:
    """A private mapping of a file from that byte on.

    `mmap` keeps the file open, and a large model has more tensors than a process may have open files: on Linux the
    file's pages are put in the place of a mapping without a file.
    """
    if (place := _placing()) is None:
        return mmap.mmap(file, size, access=mmap.ACCESS_COPY, offset=offset)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    flags = mmap.MAP_PRIVATE | _MAP_FIXED
    if place(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return mapping


@cache
def _placing() -> Any:
    """The function mmap of the C library on 64-bit Linux; None elsewhere."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_long) != ctypes.sizeof(ctypes.c_int64):
        return None
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return function


def _release_pages(mapping: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the system decides alone
        mapping.madvise(mmap.MADV_DONTNEED)


def _write_all(file: int, data: memoryview) -> None:
    """Write all bytes: one call writes 2 GiB at most."""
    while len(data):
        data = data[os.write(file, data) :]
