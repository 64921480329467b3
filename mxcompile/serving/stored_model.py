"""What a saved model says of its layers, for an engine that builds the model and reads the tensors itself.

`model.layers.0.self_attn.q_proj` -> `MXLayout`, or None for a layer of float weights. The engine's names may differ
from the checkpoint's: `rename` maps them.
"""

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mxcompile.checkpoint import shards
from mxcompile.checkpoint.hub import find_folder
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import unflatten_tensors
from mxcompile.errors import CheckpointError
from mxcompile.serving import published_layers, stored_experts
from mxcompile.serving.stored_experts import numbers_of
from mxcompile.tensor.layout import MXLayout
from mxcompile.tensor.weight import MXWeight

WEIGHT: Final = ".weight"


class StoredModel:
    """The layers of a checkpoint of mxcompile, by their names in an engine. No tensor is read before it is asked for.

    Raises CheckpointError if the folder or hub id holds no such checkpoint, or config.json or the index has changed
    since it was saved.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        self.source, self.revision, self.checked = source, revision, False
        self.cache: str | None = None
        """Where the engine puts the files of a hub id, None for Hugging Face's cache."""
        self.checkpoint = Checkpoint(find_folder(source, revision, "*.json"))
        with _one_thread():
            self._published = published_layers.renamed_tensors(self.checkpoint)
        weights = {self._published.get(name, name): name for name in self.checkpoint.names.weights}
        self._stored = {name.removesuffix(WEIGHT): of for name, of in weights.items() if name.endswith(WEIGHT)}
        self.others = {name: of for name, of in weights.items() if not name.endswith(WEIGHT)}
        """MX weights that are not called `weight`, such as fused experts: name in the engine -> stored name."""

    def rename(self, mapped: Callable[[str], str | None]) -> None:
        """Give the layers an engine's names. mapped: the new name of a tensor, None to keep its name."""
        stored = {mapped(f"{name}{WEIGHT}") or f"{name}{WEIGHT}": of for name, of in self._stored.items()}
        self._stored = {name.removesuffix(WEIGHT): of for name, of in stored.items()}
        self.others = {mapped(name) or name: of for name, of in self.others.items()}

    def layout(self, layer: str, parts: Sequence[str]) -> MXLayout | None:
        """The layout of a layer that an engine makes of `parts`, the layers of the checkpoint; None if it is float.

        Raises CheckpointError if the parts differ: the engine runs them as one matmul with one input.
        """
        layouts = {part: self.layout_of(part) for part in parts}
        if len(set(layouts.values())) == 1:
            return next(iter(layouts.values()))
        described = "; ".join(f"{part.rpartition('.')[2]}: {describe(layout)}" for part, layout in layouts.items())
        raise CheckpointError(
            f"{layer} cannot be served: the engine runs its parts as one matmul, but they are quantized differently "
            f"({described}). Quantize them alike: give all of them the same format, or leave all of them out"
        )

    def layout_of(self, part: str) -> MXLayout | None:
        """The layout of one layer of the checkpoint, None if its weight is float."""
        stored = self._stored.get(part)
        return None if stored is None else self.checkpoint.names.weights[stored].layout

    def tied(self) -> tuple[str, str] | None:
        """The embedding and the head that share one MX weight, or None. Neither is in a numbered layer.

        Raises CheckpointError if there are several heads.
        """
        aliases = self.checkpoint.names.aliases
        layers = {stored: layer for layer, stored in self._stored.items() if not numbers_of(f".{layer}")}
        shared = [(layers[aliases[of]], layer) for of, layer in layers.items() if aliases.get(of) in layers]
        if len(shared) > 1:
            heads = ", ".join(head for _, head in shared)
            raise CheckpointError(f"{heads} each share the weight of another layer: only one tied head can be served")
        return shared[0] if shared else None

    def multiplier(self, part: str) -> Tensor:
        """The multiplier of a layer `[in]`, read from the file; it may be stored under another layer's name."""
        names = self.checkpoint.names
        name = f"{self._stored[part]}.multiplier"
        return self._read(names.aliases.get(name, name))

    def check_tensors(self) -> None:
        """Raise CheckpointError if a byte of any tensor has changed since the model was saved. Reads all files."""
        shards.check_tensors(self.folder(), self.checkpoint.index.shards)
        self.checked = True

    def _read(self, name: str) -> Tensor:
        """One stored tensor, checked."""
        files = self.checkpoint.index.shards
        file = next(file for file, shard in files.items() if name in shard.tensors)
        return shards.read_tensor(self.folder() / file, files[file], name)

    def folder(self) -> Path:
        """The folder with the tensors too: of a hub id, only JSON files have been downloaded so far."""
        return find_folder(self.source, self.revision, cache=self.cache)

    def left_in_float(self, asked: Iterable[str]) -> dict[str, str]:
        """Layer -> stored name, for MX weights that an engine runs in float: it has built the layer, without asking.

        asked: the layers that it asked for. A layer of another process is not built: none of its number was asked for.
        """
        names, asked = self.checkpoint.names, set(asked)
        built = {numbers_of(part) for part in asked}
        shared = {names.aliases.get(of, of) for part, of in self._stored.items() if part in asked}
        return {
            part: of
            for part, of in self._stored.items()
            if part not in asked and numbers_of(part) in built and names.aliases.get(of, of) not in shared
        }

    def float_weight(self, stored: str) -> Tensor:
        """A stored MX weight as float values, for an input that is not prepared."""
        names = self.checkpoint.names
        packing = names.weights[stored]
        parts = {source: self._read(source) for source in names.sources(packing.parts(stored))}
        only = replace(names, plain=(), weights={stored: packing}, non_persistent=frozenset())
        weight = unflatten_tensors(only, parts)[stored]
        assert isinstance(weight, MXWeight)
        return weight.float_weight()

    def patterns(self, decoded: Iterable[str] = ()) -> dict[re.Pattern[str], str | None]:
        """Renamings of stored tensors, which an engine applies to each name: pattern -> replacement, None to skip it.

        decoded: MX weights that the engine gets as float values, without their component tensors.
        `q_proj.weight.scales` -> `q_proj.weight_scales`, as a name of a parameter has no dot. Buffers that the module
        computes by itself are skipped, and fused experts, which are not read by the engine.
        """
        leaves = {name.rpartition(".")[2] for name in self.checkpoint.names.weights}
        renamed = re.compile(rf"\.({_any(leaves)})\.(scales|multiplier)$")
        names = self.checkpoint.names
        components = {part for name in decoded for part in names.weights[name].parts(name)[1:]}
        skipped = {*names.non_persistent, *stored_experts.tensors_of(names), *components}
        patterns: dict[re.Pattern[str], str | None] = {re.compile(rf"^(?:{_any(skipped)})$"): None} if skipped else {}
        return {**patterns, **published_layers.patterns(self._published), renamed: r".\1_\2"}


@contextmanager
def _one_thread() -> Generator[None]:
    """Let torch start no threads: an engine forks its workers afterwards, which would wait for them without end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def describe(layout: MXLayout | None) -> str:
    """A layout in a few words: "mxint4, input mxint8 by round-half, rotated by 64"."""
    if layout is None:
        return "float"
    words = [layout.format]
    words += [] if layout.activation is None else [f"input {layout.activation} by {layout.rule}"]
    words += [] if layout.rotation is None else [f"rotated by {layout.rotation}"]
    words += [] if layout.multiplier is None else [f"multiplied by {layout.multiplier[:8]}"]
    return ", ".join(words)


def _any(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(names)))
