"""Large weights a few rows at a time, so that the float32 temporaries of a conversion stay small and in cache."""

from collections.abc import Callable

from torch import Tensor

VALUES = 1 << 17
VALUES_ON_GPU = 1 << 24  # there it is the number of launches that costs


def row_wise(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """What `call(*tensors)` returns, computed on slices of about `VALUES` values of the first tensor (more on a GPU).

    tensors: `[..., size]` of any sizes with the same leading dimensions, which the results have too; `call` must treat
    every row alike.
    """
    leading = tensors[0].shape[:-1]
    values = VALUES_ON_GPU if tensors[0].is_cuda else VALUES
    count = max(1, values // max(1, tensors[0].shape[-1]))
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    results: tuple[Tensor, ...] = ()
    for start in range(0, max(1, len(flat[0])), count):
        parts = call(*(tensor[start : start + count] for tensor in flat))
        results = results or tuple(part.new_empty(len(flat[0]), part.shape[-1]) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[start : start + count] = part
    return tuple(result.unflatten(0, leading) for result in results)
