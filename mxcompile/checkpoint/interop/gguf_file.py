"""GGUF files, the container: read with every length compared with the file before it is believed.

A file's header is [magic, version, number of tensors, number of entries], metadata entries, a description of each
tensor, and from the next multiple of `general.alignment` on their bytes. Source: ggml's docs/gguf.md, version 2 and 3.
The `gguf` package's own reader, which trusts a file, is given it afterwards.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from mxcompile.checkpoint.interop.element_layouts import check_scales
from mxcompile.errors import CheckpointError, InputError
from mxcompile.formats import MXFP4
from mxcompile.tensor.weight import MXLayout, MXWeight

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS: Final = 4
_LONGEST_NAME: Final = 2**16


def package() -> Any:
    """The `gguf` package. Raises InputError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the gguf package: pip install 'mxcompile[demo]'") from error
    return gguf


@dataclass(frozen=True)
class Entry:
    """A tensor of a file. type: ggml's number. shape: outermost dimension first. start, bytes: where it lies."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    bytes: int


class _Cursor:
    """A place in the file that moves forward, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def take(self, code: str) -> Any:
        """The next value, by `struct`'s letter."""
        size = struct.calcsize(f"<{code}")
        self.skip(size)
        return struct.unpack_from(f"<{code}", self.data, self.place - size)[0]

    def skip(self, size: int) -> None:
        """Go on; raises CheckpointError at the file's end."""
        if size > len(self.data) - self.place:
            raise CheckpointError("it ends in the middle of its header")
        self.place += size

    def text(self) -> str:
        """The next string."""
        length = self.take("Q")
        self.skip(length)
        return self.data[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:
        """The next value of a metadata type; of an array, how long it is."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"it has metadata of the unknown type {kind}")
        inner, count = self.take("I"), self.take("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING and count <= len(self.data):
            for _ in range(count):
                self.skip(self.take("Q"))
        else:
            raise CheckpointError(f"it has an array of {count} values of type {inner}")
        return count


class GGUFFile:
    """metadata: single values by key; of arrays, lengths. entries: the tensors.

    Raises CheckpointError if it is no such file or damaged, InputError if the gguf package is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes = {int(kind): size for kind, size in package().GGML_QUANT_SIZES.items()}
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.entries = self._parse(_Cursor(self._data))
        except (OSError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF ({error}): copy it again") from error

    def tensor(self, entry: Entry, dtype: torch.dtype = torch.float32) -> Tensor:
        """Its values: an MXWeight for MXFP4, else floats, in that dtype (where ggml has packed them, decoded)."""
        raw = np.frombuffer(self._data, np.uint8, entry.bytes, entry.start)
        gguf = package()
        kind = gguf.GGMLQuantizationType(entry.type)
        if kind == gguf.GGMLQuantizationType.MXFP4:
            return self._weight(entry, torch.from_numpy(raw.copy()), dtype)
        try:
            values = gguf.quants.dequantize(raw.reshape(-1, self._sizes[entry.type][1]), kind)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {entry.name} is {kind.name}, which gguf does not decode") from error
        return torch.from_numpy(np.array(values, np.float32).reshape(entry.shape)).to(dtype)

    def _weight(self, entry: Entry, raw: Tensor, dtype: torch.dtype) -> MXWeight:
        """Blocks of a scale byte and 16 bytes; byte i holds elements i and i + 16, as ours do."""
        blocks = raw.view(*entry.shape[:-1], -1, MXFP4.block_bytes + 1)
        scales = blocks[..., 0].contiguous()
        check_scales(f"{self.path}: {entry.name}", scales)
        return MXWeight(blocks[..., 1:].flatten(-2), scales, MXLayout(str(MXFP4), entry.shape[-1]), dtype)

    def _parse(self, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Entry]]:
        magic, version = cursor.take("4s"), cursor.take("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(f"it begins with {magic!r}, version {version}; GGUF of version 2 or 3 is read")
        tensors, entries = cursor.take("Q"), cursor.take("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.text()
            if key in metadata:
                raise CheckpointError(f"it has the entry {key!r} twice")
            metadata[key] = cursor.value(cursor.take("I"))
        found = [self._describe(cursor) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"its alignment is {alignment!r}")
        start = -(-cursor.place // alignment) * alignment
        placed = {e.name: Entry(e.name, e.type, e.shape, start + e.start, e.bytes) for e in found}
        self._check_places(found, placed)
        return metadata, placed

    def _describe(self, cursor: _Cursor) -> Entry:
        name, dimensions = cursor.text(), cursor.take("I")
        if dimensions > _MOST_DIMENSIONS or len(name) > _LONGEST_NAME:
            raise CheckpointError(f"{name[:99]!r} has {dimensions} dimensions")
        shape = tuple(cursor.take("Q") for _ in range(dimensions))[::-1] or (1,)
        kind, start = cursor.take("I"), cursor.take("Q")
        block, size = self._sizes.get(kind, (0, 0))
        values = 1
        for dimension in shape:
            values *= dimension
        if not block or not values or shape[-1] % block:
            raise CheckpointError(f"{name!r} of type {kind} and shape {list(shape)} cannot be")
        return Entry(name, kind, shape, start, values // block * size)

    def _check_places(self, found: list[Entry], placed: dict[str, Entry]) -> None:
        if len(placed) != len(found):
            raise CheckpointError("it has two tensors of one name")
        end = 0
        for entry in sorted(placed.values(), key=lambda entry: entry.start):
            if entry.start < end or entry.start + entry.bytes > len(self._data):
                raise CheckpointError(f"{entry.name!r} lies on another tensor, or beyond the end")
            end = entry.start + entry.bytes
