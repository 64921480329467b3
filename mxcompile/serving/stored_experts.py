"""The experts of one layer as a checkpoint stores them, and the part of them that one process of an engine holds.

    experts.gate_up_proj [E, 2 * inner, hidden], experts.down_proj [E, hidden, inner]   (or both with swapped axes)

transformers keeps all experts of a layer in two tensors, and so do our files; the loaders of engines look for one
tensor per expert, under names that differ from model to model. So a process reads its share from the file itself: with
expert parallelism some experts, with tensor parallelism a range of the inner channels, gate and up rows and down
columns alike. Each range is a number of whole blocks, so that gpt-oss' 2880 channels are divided over four processes
too, into 736, 704, 736 and 704. The results of all processes add up to the layer's.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.checkpoint.stored_tensors import TensorNames, WeightPacking
from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.tensor.layout import MXLayout

UP: Final = "gate_up_proj"
DOWN: Final = "down_proj"
_BIAS: Final = "_bias"


@dataclass(frozen=True)
class ExpertsShare:
    """What one process holds. experts: their numbers in the model, in order. rank, of: its range of inner channels."""

    experts: range
    rank: int = 0
    of: int = 1


@dataclass(frozen=True)
class PackedExperts:
    """One of the two weights: elements `[E, out, bytes]`, scales `[E, out, blocks]`, and what else it has.

    layout: of these bytes; its size is the number of values in a row of them. bias: `[E, out]`, added to the result.
    multiplier: `[in]`, of the input.
    """

    layout: MXLayout
    elements: Tensor
    scales: Tensor
    bias: Tensor | None
    multiplier: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        names = ("elements", "scales", "bias", "multiplier")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class FloatExperts:
    """Both weights of experts that are not quantized, `[E, 2 * inner, hidden]` and `[E, hidden, inner]`, and biases."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


def paths_of(names: Iterable[str]) -> list[str]:
    """The modules that hold fused experts, among the names of a model's tensors."""
    return [name.removesuffix(f".{DOWN}") for name in names if name.endswith(f".experts.{DOWN}")]


def tensors_of(names: TensorNames) -> set[str]:
    """The stored tensors of all fused experts, and other names of them."""
    stored = {*names.stored(), *names.aliases}
    starts = tuple(f"{path}.{weight}" for path in paths_of((*names.plain, *names.weights)) for weight in (UP, DOWN))
    return {name for name in stored if name.startswith(starts)}


def find_experts(checkpoint: Checkpoint, layer: str) -> "StoredExperts":
    """The experts of a layer of an engine, found by the numbers in its name: `blocks.3.moe` is `layers.3.mlp.experts`.

    Raises CheckpointError if not exactly one layer of the checkpoint has these numbers and experts.
    """
    paths = paths_of((*checkpoint.names.plain, *checkpoint.names.weights))
    fitting = [path for path in paths if path == layer] or [
        path for path in paths if numbers_of(path) == numbers_of(layer)
    ]
    if len(fitting) != 1:
        listed = ", ".join(fitting or paths[:3]) or "none"
        raise CheckpointError(
            f"{checkpoint.folder} does not say which experts belong to {layer}: it has {listed}. Serve this model with "
            "mxcompile serve --engine transformers"
        )
    return StoredExperts(checkpoint, fitting[0], checkpoint.folder)


@dataclass(frozen=True)
class StoredExperts:
    """The experts of one layer of a checkpoint, in the module `path`. No tensor is read before it is asked for.

    folder: with the files of tensors; of a hub id, the checkpoint's own may have the JSON files alone.
    """

    checkpoint: Checkpoint
    path: str
    folder: Path

    @property
    def packings(self) -> tuple[WeightPacking, WeightPacking] | None:
        """How both weights are packed; None if both are float. Raises CheckpointError if only one of them is."""
        weights = self.checkpoint.names.weights
        up, down = weights.get(f"{self.path}.{UP}"), weights.get(f"{self.path}.{DOWN}")
        if up is not None and down is not None:
            return up, down
        if up is None and down is None:
            return None
        names = (UP, DOWN) if down is None else (DOWN, UP)
        raise CheckpointError(
            f"{self.path} cannot be served: {names[0]} is quantized and {names[1]} is not, and both run in one kernel. "
            "Quantize both, or leave both out"
        )

    @property
    def has_bias(self) -> bool:
        """Whether the experts have biases."""
        return f"{self.path}.{UP}{_BIAS}" in self.checkpoint.names.plain

    def check(self, experts: int, hidden: int, inner: int) -> None:
        """Raise CheckpointError if the layer of the engine has other sizes, all counted over all processes."""
        packings = self.packings
        if packings is None:
            return
        up, down = (packing.layout.size for packing in packings)
        stored = self._shape(UP)[0]
        if (stored, up, down) != (experts, hidden, inner):
            raise CheckpointError(
                f"{self.path} has {stored} experts of {up} and {down} inputs, the engine's have {experts} of {hidden} "
                f"and {inner}: the checkpoint does not fit its config.json"
            )

    def packed(self, share: ExpertsShare, *, interleaved: bool) -> tuple[PackedExperts, PackedExperts]:
        """The share of quantized experts. interleaved: even rows of `gate_up_proj` are gates, odd ones are values.

        Raises CheckpointError if the layer cannot be divided so.
        """
        assert self.packings is not None
        up, down = (packing.layout for packing in self.packings)
        start, stop = self.channels(share)
        block = parse_format(down.format).block_size
        blocks = slice(start // block, -(-stop // block))
        pieces = _gate_and_up(start, stop, down.size, interleaved=interleaved)
        first = PackedExperts(
            up,
            self._rows(UP, share, pieces).flatten(-2),
            self._rows(f"{UP}.scales", share, pieces),
            self._rows(f"{UP}{_BIAS}", share, pieces) if self.has_bias else None,
            self._multiplier(UP),
        )
        multiplier = self._multiplier(DOWN)
        bias = self._part(f"{DOWN}{_BIAS}", share.experts, slice(None)) if self.has_bias else None
        second = PackedExperts(
            replace(down, size=stop - start),
            self._part(DOWN, share.experts, slice(None), blocks).flatten(-2),
            self._part(f"{DOWN}.scales", share.experts, slice(None), blocks),
            _of_first(bias, share),
            None if multiplier is None else multiplier[start:stop].clone(),
        )
        return first, second

    def invented(self, share: ExpertsShare, *, dtype: torch.dtype) -> tuple[PackedExperts, PackedExperts]:
        """Zeros in place of the share of quantized experts, for engines that run without a file of weights."""
        assert self.packings is not None
        start, stop = self.channels(share)
        up, down = (packing.layout for packing in self.packings)
        made: list[PackedExperts] = []
        for layout, out in ((up, 2 * (stop - start)), (replace(down, size=stop - start), up.size)):
            fmt = parse_format(layout.format)
            rows, blocks = (len(share.experts), out), fmt.blocks(layout.size)
            elements = torch.zeros(*rows, blocks * fmt.block_bytes, dtype=torch.uint8)
            bias = torch.zeros(rows, dtype=dtype) if self.has_bias else None
            multiplier = None if layout.multiplier is None else torch.ones(layout.size, dtype=dtype)
            made.append(PackedExperts(layout, elements, torch.full((*rows, blocks), 127).byte(), bias, multiplier))
        return made[0], made[1]

    def floats(self, share: ExpertsShare, inner: int, *, interleaved: bool) -> FloatExperts:
        """The share of experts that are not quantized. inner: channels over all processes, divided evenly."""
        size = inner // share.of
        start = share.rank * size
        pieces = _gate_and_up(start, start + size, inner, interleaved=interleaved)
        if self._shape(UP)[1] == 2 * inner and self._shape(DOWN)[2] == inner:
            up = self._rows(UP, share, pieces)
            down = self._part(DOWN, share.experts, slice(None), slice(start, start + size))
        else:
            whole = slice(None)
            columns = [self._part(UP, share.experts, whole, piece) for piece in pieces]
            up = torch.cat(columns, 2).transpose(1, 2)
            down = self._part(DOWN, share.experts, slice(start, start + size)).transpose(1, 2)
        if not self.has_bias:
            return FloatExperts(up, down, None, None)
        bias = self._part(f"{DOWN}{_BIAS}", share.experts, slice(None))
        return FloatExperts(up, down, self._rows(f"{UP}{_BIAS}", share, pieces), _of_first(bias, share))

    def channels(self, share: ExpertsShare) -> tuple[int, int]:
        """The inner channels of a process, if they are quantized: the first and the one behind the last.

        Raises CheckpointError if the layer cannot be divided so. Reads no tensor.
        """
        assert self.packings is not None
        down = self.packings[1].layout
        inner = down.size
        activation = None if down.activation is None else parse_format(down.activation)
        if share.of > 1 and activation is not None and activation.aligned:
            raise CheckpointError(
                f"{self.path}.{DOWN} cannot be divided over {share.of} processes: {activation} aligns a token to its "
                "largest value, and each process has only a part of the token. Serve with --enable-expert-parallel, or "
                "with --tensor-parallel-size 1"
            )
        sizes = [parse_format(down.format).block_size, down.rotation or 1]
        unit = math.lcm(*sizes, 1 if activation is None else activation.block_size)
        units = -(-inner // unit)
        if units < share.of:
            raise CheckpointError(
                f"{self.path}.{DOWN} cannot be divided over {share.of} processes: its {inner} inputs are {units} "
                f"parts of {unit}, which a block or rotation needs whole. Serve with a smaller --tensor-parallel-size, "
                "or with --enable-expert-parallel"
            )
        # the first processes get one unit more than the last ones, if they do not divide evenly
        bounds = [units - (share.of - rank) * units // share.of for rank in (share.rank, share.rank + 1)]
        return bounds[0] * unit, min(bounds[1] * unit, inner)

    def _rows(self, name: str, share: ExpertsShare, pieces: list[slice]) -> Tensor:
        parts = [self._part(name, share.experts, piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _multiplier(self, name: str) -> Tensor | None:
        assert self.packings is not None
        packing = self.packings[0 if name == UP else 1]
        return None if packing.layout.multiplier is None else self._part(f"{name}.multiplier", slice(None))

    def _part(self, name: str, experts: range | slice, *slices: slice) -> Tensor:
        """A part of a stored tensor, in memory of its own."""
        first = slice(experts.start, experts.stop)
        file, stored = self._place(name)
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(stored)[(first, *slices)].clone()

    def _shape(self, name: str) -> list[int]:
        file, stored = self._place(name)
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(stored).get_shape()

    def _place(self, name: str) -> tuple[str, str]:
        """The file of a tensor of the module, and its name there."""
        names = self.checkpoint.names
        stored = names.aliases.get(f"{self.path}.{name}", f"{self.path}.{name}")
        for file, shard in self.checkpoint.index.shards.items():
            if stored in shard.tensors:
                return str(self.folder / file), stored
        raise CheckpointError(f"{self.folder} has no tensor {stored}: save the model again")


def _gate_and_up(start: int, stop: int, inner: int, *, interleaved: bool) -> list[slice]:
    """The rows of gates and values of a range of inner channels."""
    if interleaved or (start, stop) == (0, inner):
        return [slice(2 * start, 2 * stop)]
    return [slice(start, stop), slice(inner + start, inner + stop)]


def _of_first(bias: Tensor | None, share: ExpertsShare) -> Tensor | None:
    """The bias behind the last matmul, which the first process adds alone."""
    return bias if bias is None or share.rank == 0 else torch.zeros_like(bias)


def numbers_of(name: str) -> tuple[str, ...]:
    """The numbers in a layer's name: `model.layers.3.mlp` has 3."""
    return tuple(re.findall(r"(?<=\.)\d+(?=\.|$)", name))
