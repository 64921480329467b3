"""Convert packed weights between the row-major (packing.py) and the planar layout (planes.py), a few tiles at a time.

Both are bytes. A planar weight comes with its `PlanarScaling`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat
from mxcompile.kernels.layout.planes import (
    TILE,
    PlanarScaling,
    PlanarWeight,
    from_bytes,
    from_planes,
    padded_bytes,
    scale_range,
    to_bytes,
    to_planes,
    why_format_not_planar,
)
from mxcompile.numerics.row_slices import SLICE_VALUES, SLICE_VALUES_ON_GPU

PackedTensors = tuple[Tensor, Tensor]
ScaleRange = tuple[int, int]


def why_shape_not_planar(out: int, fmt: MXFormat) -> str | None:
    """Why a weight with `out` outputs must stay row-major whatever its values are, in a sentence; else None."""
    if out % TILE:
        return f"the planar layout needs a multiple of {TILE} outputs, not {out}"
    return why_format_not_planar(fmt)


def weight_scale_range(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int) -> ScaleRange:
    """The range of a weight's scales, for `planes.scaling_for`; elements `[out, bytes]`. Reads the data.

    Raises MXCompileError with the reason if the weight must stay row-major.
    """
    if elements.dim() != 2:
        raise MXCompileError(f"the planar layout needs a 2-D weight, not {elements.dim()}-D")
    if (reason := why_shape_not_planar(len(elements), fmt)) is not None:
        raise MXCompileError(reason)
    ranges = [scale_range(part, exponents, fmt) for part, exponents in _pieces(elements, scales, size)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def convert_to_planes(
    elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: PlanarScaling, out: PackedTensors | None = None
) -> PackedTensors:
    """Row-major bytes to planar bytes, into `out` if given. scaling: from `scaling_for` for the weight's range."""
    result = out or empty_planes(len(elements), fmt, size, elements.device)
    start = 0
    for part, exponents in _pieces(elements, scales, size):
        for target, values in zip(result, to_bytes(to_planes(part, exponents, fmt, size, scaling)), strict=True):
            target[start : start + len(part)] = values
        start += len(part)
    return result


def convert_to_rows(
    elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, scaling: PlanarScaling
) -> PackedTensors:
    """Planar bytes to row-major bytes."""
    planes = from_bytes(elements.contiguous(), scales.contiguous(), fmt, size, scaling)
    step = _tiles_at_once(elements, size)
    blocks = fmt.blocks(size)
    results = (elements.new_empty(len(elements), blocks * fmt.block_bytes), scales.new_empty(len(elements), blocks))
    start = 0
    for words, exponents in zip(planes.words.split(step), planes.scales.split(step), strict=True):
        rows = from_planes(PlanarWeight(words, exponents, fmt, TILE * len(words), size, *scaling))
        for result, part in zip(results, rows, strict=True):
            result[start : start + len(part)] = part
        start += TILE * len(words)
    return results


def empty_planes(out: int, fmt: MXFormat, size: int, device: torch.device) -> PackedTensors:
    """Uninitialized bytes for a planar weight."""
    width, blocks = padded_bytes(fmt, size)
    words = torch.empty(out, width, dtype=torch.uint8, device=device)
    return words, torch.empty(out, blocks, dtype=torch.uint8, device=device)


def _pieces(elements: Tensor, scales: Tensor, size: int) -> Iterator[PackedTensors]:
    rows = TILE * _tiles_at_once(elements, size)
    yield from zip(elements.split(rows), scales.split(rows), strict=True)


def _tiles_at_once(elements: Tensor, size: int) -> int:
    return max(1, (SLICE_VALUES_ON_GPU if elements.is_cuda else SLICE_VALUES) // (TILE * size))
