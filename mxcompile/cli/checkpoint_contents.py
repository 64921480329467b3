"""What a checkpoint holds, for people (`mxcompile inspect`) and for programs."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import Packing
from mxcompile.diagnostics.tables import table
from mxcompile.formats import input_text
from mxcompile.tensor.weight import MXWeight


@dataclass(frozen=True)
class Entry:
    """A tensor of the module. format: of its values. input: what a matmul with it rounds the other operand to.

    bytes: as stored; 0 where it shares another's.
    """

    name: str
    format: str
    input: str | None
    shape: tuple[int, ...]
    bytes: int


class Description:
    """Reads the checkpoint's tensors, with their checksums if the checkpoint is one that verifies."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        names = checkpoint.names
        self.entries = [
            _entry(name, tensor, names.weights.get(name), name in names.aliases)
            for name, tensor in checkpoint.tensors().items()
        ]

    def groups(self) -> dict[tuple[str, str | None], list[Entry]]:
        """Tensors by format and input, those with most bytes first."""
        found: dict[tuple[str, str | None], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.format, entry.input), []).append(entry)
        return dict(sorted(found.items(), key=lambda item: -sum(entry.bytes for entry in item[1])))

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        card, shards = self.checkpoint.card, self.checkpoint.index.shards
        return {
            "folder": str(self.checkpoint.folder),
            "module": card.module,
            "recipe": card.provenance and card.provenance.recipe,
            "versions": dict(card.provenance.versions) if card.provenance else {},
            "bytes": sum(shard.bytes for shard in shards.values()),
            "files": [card.index, *shards, *card.files],
            "tensors": [asdict(entry) for entry in self.entries],
        }

    def print_to(self, console: Console, *, every: bool = False) -> None:
        """Print what made it and a table of its formats, or of every tensor."""
        record = self.record()
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        console.print(
            f"{record['module']}, {record['bytes'] / 1e6:.1f} MB in {len(record['files'])} files", markup=False
        )
        console.print(f"recipe: {record['recipe'] or 'unknown'}", markup=False)
        console.print(f"made by: {versions or 'unknown'}", markup=False)
        console.print(self._every() if every else self._by_format())

    def _by_format(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for (fmt, rounded), entries in self.groups().items():
            values, size = sum(math.prod(entry.shape) for entry in entries), sum(entry.bytes for entry in entries)
            rows.append((fmt, rounded or "", str(len(entries)), f"{values:,}", f"{size / 1e6:.2f}"))
        return table(("format", "input"), ("tensors", "values", "MB"), rows)

    def _every(self) -> Table:
        rows = [
            (entry.name, entry.format, entry.input or "", "x".join(map(str, entry.shape)), f"{entry.bytes / 1e6:.2f}")
            for entry in self.entries
        ]
        return table(("tensor", "format", "input"), ("shape", "MB"), rows)


def _entry(name: str, tensor: Tensor, packing: Packing | None, shared: bool) -> Entry:
    size = tensor.packed_bytes if isinstance(tensor, MXWeight) else tensor.nbytes
    fmt = str(tensor.dtype).removeprefix("torch.") if packing is None else packing.layout.format
    rounded = None if packing is None else input_text(packing.layout.activation, packing.layout.aligned)
    return Entry(name, fmt, rounded, tuple(tensor.shape), 0 if shared else size)
