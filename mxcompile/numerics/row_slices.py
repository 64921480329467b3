"""Convert large weights a few rows at a time, so that float32 temporaries stay small and in cache."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SLICE_VALUES = 1 << 17
SLICE_VALUES_ON_GPU = 1 << 24  # on a GPU the number of kernel launches dominates
_FEWEST_COLUMNS = 16


def row_wise(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The results of `call(*tensors)`, computed on slices of about `SLICE_VALUES` values of the first tensor.

    tensors: `[..., size]`, sizes may differ, with equal leading dimensions, which the results have too; none is copied,
    whatever its strides. `call` must treat rows independently. On a GPU slices are larger.
    """
    leading = tensors[0].shape[:-1]
    rows = math.prod(leading)
    results: tuple[Tensor, ...] = ()
    start = 0
    for slices in row_slices(*tensors):
        parts = call(*slices)
        if len(slices[0]) == rows:
            results = tuple(part.contiguous() for part in parts)
            break
        results = results or tuple(part.new_empty(rows, part.shape[-1]) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[start : start + len(part)] = part
        start += len(slices[0])
    return tuple(result.view(*leading, result.shape[-1]) for result in results)


def row_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each `[..., size]` tensor as views `[rows, size]`, about `SLICE_VALUES` values of the first."""
    values = SLICE_VALUES_ON_GPU if tensors[0].is_cuda else SLICE_VALUES
    count = max(1, values // max(1, tensors[0].shape[-1]))
    for matrices in _matrices(tensors):
        for start in range(0, max(1, len(matrices[0])), count):
            yield tuple(matrix[start : start + count] for matrix in matrices)


def matrices(tensor: Tensor) -> Iterator[Tensor]:
    """The matrices of a tensor of more than two dimensions one by one, as views; any other tensor as it is."""
    if tensor.dim() <= 2:
        yield tensor
    else:
        for part in tensor:
            yield from matrices(part)


def column_wise(call: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """The result `[size]` of a `call` on `[rows, columns]` that treats columns independently.

    tensor: `[..., size]`; more than two dimensions are flattened and taken some columns at a time.
    """
    if tensor.dim() <= 2:
        return call(tensor)
    size = tensor.shape[-1]
    columns = max(_FEWEST_COLUMNS, SLICE_VALUES_ON_GPU * size // max(1, tensor.numel()))
    return torch.cat([call(part.flatten(0, -2)) for part in tensor.split(columns, -1)])


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; allocates no mask of its size. True on the meta device."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _matrices(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Views `[rows, size]` that cover tensors `[..., size]`: one each, or one each for every index of dimension 0."""
    try:
        whole = tuple(tensor.view(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor for tensor in tensors)
    except RuntimeError:  # strides that do not allow it, as a transposed 3-D weight has
        for parts in zip(*tensors, strict=True):
            yield from _matrices(parts)
    else:
        yield whole
