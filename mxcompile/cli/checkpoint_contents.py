"""The contents of a checkpoint, as tables and as JSON: `mxcompile inspect`."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import WeightPacking
from mxcompile.diagnostics.tables import table
from mxcompile.tensor.dtypes import torch_name
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


class CheckpointContents:
    """Reads the tensors of a checkpoint, and checks their checksums if the checkpoint verifies."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        names = checkpoint.names
        self.entries = [
            _entry(name, tensor, names.weights.get(name), name in names.aliases)
            for name, tensor in checkpoint.tensors().items()
        ]

    def groups(self) -> dict[tuple[str, str | None], list[StoredTensor]]:
        """Tensors by format and input format, the largest group first."""
        groups: dict[tuple[str, str | None], list[StoredTensor]] = {}
        for entry in self.entries:
            groups.setdefault((entry.format, entry.input), []).append(entry)
        return dict(sorted(groups.items(), key=lambda item: -sum(entry.bytes for entry in item[1])))

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        config, shards = self.checkpoint.config, self.checkpoint.index.shards
        return {
            "folder": str(self.checkpoint.folder),
            "module": config.class_name,
            "recipe": config.provenance and config.provenance.recipe,
            "versions": dict(config.provenance.versions) if config.provenance else {},
            "bytes": sum(shard.bytes for shard in shards.values()),
            "files": [config.index, *shards, *config.files],
            "tensors": [asdict(entry) for entry in self.entries],
        }

    def print_to(self, console: Console, *, every: bool = False) -> None:
        """Print the recipe, the versions and a table of the formats, or of every tensor."""
        record = self.record()
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        console.print(
            f"{record['module']}, {record['bytes'] / 1e6:.1f} MB in {len(record['files'])} files", markup=False
        )
        console.print(f"recipe: {record['recipe'] or 'unknown'}", markup=False)
        console.print(f"made by: {versions or 'unknown'}", markup=False)
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
