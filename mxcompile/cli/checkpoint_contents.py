"""The contents of a checkpoint, as tables and as JSON: `mxcompile inspect`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mxcompile.checkpoint.cache_sizes import cache_line
from mxcompile.checkpoint.interop.gguf_architectures import class_name
from mxcompile.checkpoint.interop.gguf_file import GGUFFile
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import WeightPacking, flatten_module
from mxcompile.diagnostics.tables import table
from mxcompile.tensor.dtypes import torch_name
from mxcompile.tensor.modules import named_tensors
from mxcompile.tensor.weight import MXWeight


@dataclass(frozen=True)
class StoredTensor:
    """format: of the values. input: the format to which a matmul rounds the other operand. bytes: as stored, 0 for an
    alias of another tensor.
    """

    name: str
    format: str
    input: str | None
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class CheckpointContents:
    """What a checkpoint holds. module: name of the class. bytes: of the files with weights.

    cache: the format of the key/value cache that the model generates with, and its bytes a token; None: float.
    """

    path: Path
    module: str
    recipe: str | None
    versions: Mapping[str, str]
    bytes: int
    files: tuple[str, ...]
    entries: tuple[StoredTensor, ...]
    cache: str | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Reads the tensors of a checkpoint of mxcompile, and checks their checksums if the checkpoint verifies."""
        config, shards, names = checkpoint.config, checkpoint.index.shards, checkpoint.names
        made = config.provenance
        return cls(
            checkpoint.folder,
            config.class_name,
            made and made.recipe,
            made.versions if made else {},
            sum(shard.bytes for shard in shards.values()),
            (config.index, *shards, *config.files),
            tuple(
                _entry(name, tensor, names.weights.get(name), name in names.aliases)
                for name, tensor in checkpoint.tensors().items()
            ),
            cache_line(config.model_config, made.cache) if made and made.cache else None,
        )

    @classmethod
    def of_gguf(cls, path: Path) -> Self:
        """The tensors that a GGUF file of any architecture describes, under llama.cpp's names, in ggml's types."""
        file = GGUFFile(path)
        entries = [StoredTensor(e.name, file.type_name(e), None, e.shape, e.bytes) for e in file.entries.values()]
        kind = class_name(file.metadata) or str(file.metadata.get("general.architecture"))
        size = path.stat().st_size
        return cls(path, kind, None, {}, size, (path.name,), tuple(entries))

    @classmethod
    def of_module(cls, folder: Path, module: nn.Module) -> Self:
        """The tensors of a module that was loaded from another project's folder."""
        names, stored = flatten_module(module)
        entries = [
            _entry(name, tensor, names.weights.get(name), name in names.aliases)
            for name, tensor in named_tensors(module).items()
            if name not in names.non_persistent
        ]
        files = tuple(sorted(file.name for file in folder.iterdir() if file.is_file()))
        size = sum(tensor.nbytes for name, tensor in stored.items() if name not in names.non_persistent)
        return cls(folder, type(module).__name__, None, {}, size, files, tuple(entries))

    def groups(self) -> dict[tuple[str, str | None], list[StoredTensor]]:
        """Tensors by format and input format, the largest group first."""
        groups: dict[tuple[str, str | None], list[StoredTensor]] = {}
        for entry in self.entries:
            groups.setdefault((entry.format, entry.input), []).append(entry)
        return dict(sorted(groups.items(), key=lambda item: -sum(entry.bytes for entry in item[1])))

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "folder": str(self.path),
            "module": self.module,
            "recipe": self.recipe,
            "versions": dict(self.versions),
            "bytes": self.bytes,
            "cache": self.cache,
            "files": list(self.files),
            "tensors": [asdict(entry) for entry in self.entries],
        }

    def print_to(self, console: Console, *, every: bool = False) -> None:
        """Print the recipe, the versions and a table of the formats, or of every tensor."""
        record = self.record()
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        console.print(
            f"{record['module']}, {record['bytes'] / 1e6:.1f} MB in {len(record['files'])} file"
            f"{'s' if len(record['files']) != 1 else ''}",
            markup=False,
        )
        console.print(f"recipe: {record['recipe'] or 'unknown'}", markup=False)
        console.print(f"made by: {versions or 'unknown'}", markup=False)
        if self.cache is not None:
            console.print(self.cache, markup=False)
        console.print(self._tensor_table() if every else self._format_table())

    def _format_table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for (fmt, rounded), entries in self.groups().items():
            values, size = sum(math.prod(entry.shape) for entry in entries), sum(entry.bytes for entry in entries)
            rows.append((fmt, rounded or "", str(len(entries)), f"{values:,}", f"{size / 1e6:.2f}"))
        return table(("format", "input"), ("tensors", "values", "MB"), rows)

    def _tensor_table(self) -> Table:
        rows = [
            (entry.name, entry.format, entry.input or "", "x".join(map(str, entry.shape)), f"{entry.bytes / 1e6:.2f}")
            for entry in self.entries
        ]
        return table(("tensor", "format", "input"), ("shape", "MB"), rows)


def _entry(name: str, tensor: Tensor, packing: WeightPacking | None, shared: bool) -> StoredTensor:
    size = tensor.packed_bytes if isinstance(tensor, MXWeight) else tensor.nbytes
    fmt = torch_name(tensor.dtype) if packing is None else packing.layout.format
    rounded = None if packing is None else packing.layout.activation
    return StoredTensor(name, fmt, rounded, tuple(tensor.shape), 0 if shared else size)
