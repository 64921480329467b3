"""Packed weights as bytes in rows (packing.py) <-> bytes in planes (planes.py), a few tiles at a time.

Planes come with their `Scaling`: the power of two that their values lack, and what products at the rate of 8 bits need.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.planes import (
    TILE,
    Planes,
    Scaling,
    from_bytes,
    from_planes,
    padded_bytes,
    scale_range,
    to_bytes,
    to_planes,
    why_no_format,
)
from mxcompile.numerics.row_slices import VALUES, VALUES_ON_GPU

Parts = tuple[Tensor, Tensor]
Range = tuple[int, int]


def why_no_shape(out: int, fmt: MXFormat) -> str | None:
    """Why a weight with so many outputs must stay in rows, whatever its data is, in a sentence."""
    if out % TILE:
        return f"planes hold weights with a multiple of {TILE} outputs, not {out}"
    return why_no_format(fmt)


def range_of_rows(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int) -> Range:
    """The range of a weight's scales, `[out, bytes]`, as `planes.scaling_for` takes it. Reads the data; raises
    MXCompileError, with the reason, if it must stay in rows."""
    if elements.dim() != 2:
        raise MXCompileError(f"planes hold 2-D weights, not {elements.dim()}-D")
    if (reason := why_no_shape(len(elements), fmt)) is not None:
        raise MXCompileError(reason)
    ranges = [scale_range(part, exponents, fmt) for part, exponents in _pieces(elements, scales, size)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def planes_of_rows(
    elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: Scaling, out: Parts | None = None
) -> Parts:
    """Rows to planes, both as bytes, into `out` if given. scaling: what `scaling_for` says of their range."""
    place = out or empty_planes(len(elements), fmt, size, elements.device)
    start = 0
    for part, exponents in _pieces(elements, scales, size):
        for target, values in zip(place, to_bytes(to_planes(part, exponents, fmt, size, scaling)), strict=True):
            target[start : start + len(part)] = values
        start += len(part)
    return place


def rows_of_planes(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: Scaling) -> Parts:
    """Planes to rows, both as bytes."""
    planes = from_bytes(elements.contiguous(), scales.contiguous(), fmt, size, scaling)
    step = _tiles_at_once(elements, size)
    pieces = [
        from_planes(Planes(words, exponents, fmt, TILE * len(words), size, *scaling))
        for words, exponents in zip(planes.words.split(step), planes.scales.split(step), strict=True)
    ]
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


def empty_planes(out: int, fmt: MXFormat, size: int, device: torch.device) -> Parts:
    """Room for a weight in planes, as bytes."""
    width, blocks = padded_bytes(fmt, size)
    words = torch.empty(out, width, dtype=torch.uint8, device=device)
    return words, torch.empty(out, blocks, dtype=torch.uint8, device=device)


def _pieces(elements: Tensor, scales: Tensor, size: int) -> Iterator[Parts]:
    rows = TILE * _tiles_at_once(elements, size)
    yield from zip(elements.split(rows), scales.split(rows), strict=True)


def _tiles_at_once(elements: Tensor, size: int) -> int:
    return max(1, (VALUES_ON_GPU if elements.is_cuda else VALUES) // (TILE * size))
