"""Read the GGUF container; every length is checked against the file's size before it is used.

A file consists of the header [magic, version, number of tensors, number of entries], metadata entries, a description of
each tensor, and, from the next multiple of `general.alignment` on, the tensors' bytes. Source: ggml's docs/gguf.md,
versions 2 and 3. The `gguf` package has a reader too, but it trusts the file; only its dequantization is used.
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
_FLOATS: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MOST_DIMENSIONS: Final = 4
_LONGEST_NAME: Final = 2**16


def package() -> Any:
    """The `gguf` package. Raises an InputError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the gguf package: pip install 'mxcompile[demo]'") from error
    return gguf


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file. type: ggml's number. shape: outermost dimension first. start, bytes: range in the file."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class GGUFArray:
    """An array of the metadata. type: GGUF's number of its values' type. start: of the values in the file."""

    type: int
    count: int
    start: int


class _Cursor:
    """Reads the file from front to back, never past the end."""

    def __init__(self, data: mmap.mmap, position: int = 0) -> None:
        self.data = data
        self.position = position

    def take(self, code: str) -> Any:
        """The next value; code: its `struct` format character."""
        size = struct.calcsize(f"<{code}")
        self.skip(size)
        return struct.unpack_from(f"<{code}", self.data, self.position - size)[0]

    def skip(self, size: int) -> None:
        """Advance; raises CheckpointError if that would pass the file's end."""
        if size > len(self.data) - self.position:
            raise CheckpointError("it ends in the middle of its header")
        self.position += size

    def text(self) -> str:
        """The next string."""
        length = self.take("Q")
        self.skip(length)
        return self.data[self.position - length : self.position].decode()

    def value(self, kind: int) -> Any:
        """The next value of a metadata type; an array is skipped."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"it has metadata of the unknown type {kind}")
        inner, count = self.take("I"), self.take("Q")
        start = self.position
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING and count <= len(self.data):
            for _ in range(count):
                self.skip(self.take("Q"))
        else:
            raise CheckpointError(f"it has an array of {count} values of type {inner}")
        return GGUFArray(inner, count, start)


class GGUFFile:
    """metadata: values by key, arrays as a `GGUFArray`. entries: the tensors by name.

    Raises CheckpointError if the file is not GGUF or damaged, InputError if the gguf package is missing.
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

    def array(self, key: str, kind: type) -> list[Any] | None:
        """An array of the metadata as a list, None if there is none. Raises CheckpointError if its values differ."""
        array = self.metadata.get(key)
        if array is None:
            return None
        if not isinstance(array, GGUFArray):
            raise CheckpointError(f"{self.path}: {key} is {array!r}, not an array")
        cursor = _Cursor(self._data, array.start)
        try:
            values = [cursor.value(array.type) for _ in range(array.count)]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} holds text that is not UTF-8 ({error})") from error
        if not all(isinstance(value, kind) for value in values):
            raise CheckpointError(f"{self.path}: {key} does not hold values of the type {kind.__name__}")
        return values

    def type_name(self, entry: GGUFTensor) -> str:
        """ggml's name of a tensor's type, torch's for plain floats."""
        name = str(package().GGMLQuantizationType(entry.type).name)
        return _FLOATS.get(name, name.lower())

    def tensor(self, entry: GGUFTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor's values: an MXWeight for MXFP4; else floats of that dtype, dequantized if ggml packed them."""
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

    def _weight(self, entry: GGUFTensor, raw: Tensor, dtype: torch.dtype) -> MXWeight:
        """MXFP4 blocks are a scale byte and 16 bytes; byte i holds elements i and i + 16, as in `packing.py`."""
        blocks = raw.view(*entry.shape[:-1], -1, MXFP4.block_bytes + 1)
        scales = blocks[..., 0].contiguous()
        check_scales(f"{self.path}: {entry.name}", scales)
        return MXWeight(blocks[..., 1:].flatten(-2), scales, MXLayout(str(MXFP4), entry.shape[-1]), dtype)

    def _parse(self, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        magic, version = cursor.take("4s"), cursor.take("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(f"it begins with {magic!r}, version {version}; supported are GGUF versions 2 and 3")
        tensor_count, metadata_count = cursor.take("Q"), cursor.take("Q")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = cursor.text()
            if key in metadata:
                raise CheckpointError(f"it has the entry {key!r} twice")
            metadata[key] = cursor.value(cursor.take("I"))
        described = [self._describe(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"its alignment is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        entries_by_name = {e.name: GGUFTensor(e.name, e.type, e.shape, start + e.start, e.bytes) for e in described}
        if len(entries_by_name) != len(described):
            raise CheckpointError("two of its tensors have the same name")
        self._check_ranges(entries_by_name)
        return metadata, entries_by_name

    def _describe(self, cursor: _Cursor) -> GGUFTensor:
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
            raise CheckpointError(f"{name!r} of type {kind} cannot have shape {list(shape)}")
        return GGUFTensor(name, kind, shape, start, values // block * size)

    def _check_ranges(self, entries: dict[str, GGUFTensor]) -> None:
        end = 0
        for entry in sorted(entries.values(), key=lambda entry: entry.start):
            if entry.start < end or entry.start + entry.bytes > len(self._data):
                raise CheckpointError(f"{entry.name!r} overlaps another tensor, or ends beyond the file")
            end = entry.start + entry.bytes
