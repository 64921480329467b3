"""Matmuls with a 3-D MXWeight, whose slices are experts: only those that some token chose are decoded.

    grouped_mm(x, w, offs), bmm(x, w), bmm(w, x), w[index] @ x  ->  mx::grouped_linear(x, experts, elements, scales)

Under `unfused_matmuls`, and where the operands do not fit the operator, every step is an operator of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.numerics import experts as experts_reference
from mxcompile.ops import EXPERTS, GROUPED_LINEAR
from mxcompile.tensor.refusals import not_defined
from mxcompile.tensor.unfused import is_step_by_step
from mxcompile.tensor.weight import MXWeight, planes_argument

ExpertsWeights: TypeAlias = tuple[MXWeight, Tensor | None, MXWeight, Tensor | None]
"""Gate and up rows `[E, 2 * inner, hidden]` and their bias, down rows `[E, hidden, inner]` and theirs."""


def grouped_linear(x: Tensor, experts: Tensor, weight: MXWeight, bias: Tensor | None = None) -> Tensor:
    """x `[rows, in]`, which is prepared first, times the experts `[rows, k]` chosen for each row: `[rows * k, out]`."""
    x, spec = weight.prepare(x), weight.layout_
    if not is_step_by_step():
        args = (weight.elements, weight.scales, bias, spec.format, *planes_argument(spec))
        return GROUPED_LINEAR(x, experts, *args)

    def multiply(rows: Tensor, expert: int) -> Tensor:
        values = select(weight, expert).dequantize()
        y = rows @ (values if spec.transposed else values.transpose(-1, -2))
        return y if bias is None else y + bias[expert]

    return experts_reference.grouped_linear(x, experts, len(weight.elements), weight.elements.shape[1], multiply)


def grouped_mm(x: Tensor, weight: MXWeight, offs: Tensor | None = None, **options: Any) -> Tensor:
    """`torch._grouped_mm`: rows of x, sorted by expert, times weights `[E, in, out]`; expert e's end at `offs[e]`."""
    if offs is None or x.dim() != 2 or not _multiplies_rows(x, weight):
        return torch._grouped_mm(weight.prepare(x), weight.dequantize(), offs=offs, **options)  # pyright: ignore
    return grouped_linear(x, experts_reference.experts_of_rows(offs, x.shape[0]), weight)


def grouped_mm_fallback(input: Tensor, weight: MXWeight, offs: Tensor) -> Tensor:
    """`transformers::grouped_mm_fallback`, the same operator of transformers."""
    return grouped_mm(input, weight, offs)


def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """`torch.bmm` with an MXWeight as the right operand `[E, in, out]` or the left one `[E, out, in]`.

    Rows of zeros are not multiplied: `numerics/experts.py`, `experts_in_turn`.
    """
    if isinstance(input, MXWeight):
        if isinstance(mat2, MXWeight):
            raise MXCompileError("bmm: an MXWeight can only be multiplied by a float tensor")
        return bmm(mat2.transpose(-1, -2), input.swap_axes()).transpose(-1, -2)
    assert isinstance(mat2, MXWeight)
    count, rows, size = input.shape
    is_expanded = mat2.elements.stride(0) == 0 and count > 1
    if is_step_by_step() or is_expanded or not _multiplies_rows(input, mat2):
        return torch.bmm(mat2.prepare(input), mat2.dequantize())
    numbers = experts_reference.experts_in_turn(input)
    return grouped_linear(input.reshape(-1, size), numbers, mat2).unflatten(0, (count, rows))


def gated_experts(x: Tensor, numbers: Tensor, weights: Tensor, module_weights: ExpertsWeights, gate: str) -> Tensor:
    """`mx::experts` of two MX weights; see `numerics/experts.py`. x `[tokens, hidden]`, the others `[tokens, k]`.

    Called on the weights themselves, as torch.compile needs: a graph takes their component tensors as inputs.
    """
    up, up_bias, down, down_bias = module_weights
    return EXPERTS(x, numbers, weights, [up], up_bias, [down], down_bias, "", "", gate, None, None)


def unpack_experts(
    x: Tensor,
    numbers: Tensor,
    weights: Tensor,
    up: Sequence[MXWeight],
    up_bias: Tensor | None,
    down: Sequence[MXWeight],
    down_bias: Tensor | None,
    up_format: str,
    down_format: str,
    gate: str,
    *_: Any,
) -> Tensor:
    """What `mx::experts` does with MX weights: x is prepared, the weights become their component tensors."""
    del up_format, down_format
    first, second = up[0], down[0]
    one, two = first.layout_, second.layout_
    return EXPERTS(
        first.prepare(x),
        numbers,
        weights,
        [first.elements, first.scales],
        up_bias,
        [second.elements, second.scales],
        down_bias,
        one.format,
        two.format,
        gate,
        two.activation,
        two.rule,
        one.planes,
        two.planes,
    )


def select(weight: MXWeight, index: int | slice | Tensor) -> MXWeight:
    """`weight[index]`: some of its experts, or one, still packed."""
    is_number = isinstance(index, int) and not isinstance(index, bool)
    is_numbers = isinstance(index, Tensor) and not (index.dtype.is_floating_point or index.dtype == torch.bool)
    if weight.dim() != 3 or not (is_number or is_numbers or isinstance(index, slice)):
        raise MXCompileError(not_defined("aten.index.Tensor"))
    return MXWeight(weight.elements[index], weight.scales[index], weight.layout_, weight.dtype, weight.multiplier)


def select_along(weight: MXWeight, dim: int, index: int) -> MXWeight:
    """`weight.select(0, index)`."""
    if dim % weight.dim() != 0:
        raise MXCompileError(not_defined("aten.select.int"))
    return select(weight, index)


def select_many(weight: MXWeight, indices: Sequence[Tensor | None]) -> MXWeight:
    """`aten.index`, which `weight[index]` becomes."""
    if len(indices) != 1 or indices[0] is None:
        raise MXCompileError(not_defined("aten.index.Tensor"))
    return select(weight, indices[0])


def unbind(weight: MXWeight, dim: int = 0) -> tuple[MXWeight, ...]:
    """All experts, one by one."""
    if weight.dim() != 3 or dim % weight.dim() != 0:
        raise MXCompileError(not_defined("aten.unbind.int"))
    return tuple(select(weight, index) for index in range(weight.shape[0]))


def one_by_one(weight: MXWeight) -> Iterator[MXWeight]:
    """`for expert in weight`."""
    return iter(unbind(weight))


def _multiplies_rows(x: Tensor, weight: MXWeight) -> bool:
    """Whether blocks run along the contracted dimension of a right operand `[E, in, out]` of x's dtype."""
    return weight.dim() == 3 and weight.layout_.transposed and x.dtype == weight.dtype
