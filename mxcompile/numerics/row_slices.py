"""Convert large weights a few rows at a time, so that float32 temporaries stay small and in cache."""

from collections.abc import Callable, Iterator

from torch import Tensor

SLICE_VALUES = 1 << 17
SLICE_VALUES_ON_GPU = 1 << 24  # on a GPU the number of kernel launches dominates


def row_wise(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The results of `call(*tensors)`, computed on slices of about `SLICE_VALUES` values of the first tensor.

    tensors: `[..., size]`, sizes may differ, with equal leading dimensions, which the results have too. `call` must
    treat rows independently. On a GPU slices are larger.
    """
    leading = tensors[0].shape[:-1]
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    results: tuple[Tensor, ...] = ()
    start = 0
    for slices in row_slices(*flat):
        parts = call(*slices)
        results = results or tuple(part.new_empty(len(flat[0]), part.shape[-1]) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[start : start + len(part)] = part
        start += len(slices[0])
    return tuple(result.unflatten(0, leading) for result in results)


def row_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each `[rows, size]` tensor, about `SLICE_VALUES` values of the first (more on a GPU)."""
    values = SLICE_VALUES_ON_GPU if tensors[0].is_cuda else SLICE_VALUES
    count = max(1, values // max(1, tensors[0].shape[-1]))
    for start in range(0, max(1, len(tensors[0])), count):
        yield tuple(tensor[start : start + count] for tensor in tensors)
