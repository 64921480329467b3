"""What the operators of torch do with an MXWeight: matmuls, lookups, and views of the same bytes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import MXCompileError
from mxcompile.ops import DEQUANTIZE, EXPERTS, LINEAR, LINEARS
from mxcompile.tensor import experts
from mxcompile.tensor.refusals import no_storage, not_defined
from mxcompile.tensor.unfused import is_for_shapes, is_traced, needs_gradient
from mxcompile.tensor.weight import CUSTOM_OPS, HANDLERS, LOW_LEVEL, MXWeight, planes_argument

aten = torch.ops.aten


def _right_operand(op: Callable[..., Tensor], position: int) -> Callable[..., Tensor]:
    """`op` with an MXWeight as operand `position`; the operand before it is the input, which is prepared first."""

    def multiply(*args: Any, **kwargs: Any) -> Tensor:
        weight = args[position] if len(args) > position else None
        if not isinstance(weight, MXWeight):
            if op is torch.baddbmm and isinstance(args[0], MXWeight):
                raise MXCompileError(not_defined(op.__name__))
            raise MXCompileError(f"{op.__name__}: an MXWeight can only be the right operand of a matmul")
        if op is torch.matmul and weight.dim() == args[0].dim() == 3 and len(weight) == len(args[0]):
            return experts.bmm(*args, **kwargs)
        before, after = args[: position - 1], args[position + 1 :]
        return op(*before, weight.prepare(args[position - 1]), weight.dequantize(), *after, **kwargs)

    return multiply


def _linear(input: Tensor, weight: MXWeight, bias: Tensor | None = None) -> Tensor:
    spec = weight.layout_
    if weight.dim() == 2 and not spec.transposed and input.dtype == weight.dtype:
        if needs_gradient(input) or (bias is not None and needs_gradient(bias)):
            # Its backward pass keeps the packed weight; that of F.linear would keep the float one.
            args = (weight.elements, weight.scales, bias, spec.format)
            return LINEAR(weight.prepare(input), *args, *planes_argument(spec))
        if not is_traced(input):
            args = ([weight.elements], [weight.scales], [bias], spec.format, spec.activation, spec.rule)
            return LINEARS(weight.transform(input), *args, spec.planes)[0]
        if is_for_shapes(input) and _can_multiply(input, weight, bias):
            return input.new_empty((*input.shape[:-1], len(weight)))  # F.linear takes several steps to find that
    return F.linear(weight.prepare(input), weight.dequantize(), bias)


def _can_multiply(input: Tensor, weight: MXWeight, bias: Tensor | None) -> bool:
    """Whether F.linear takes these, with a result in the dtype of the input."""
    fits = bias is None or (bias.shape == (len(weight),) and bias.dtype == input.dtype)
    return fits and input.shape[-1] == weight.shape[1] and not torch.is_autocast_enabled(input.device.type)


def _embedding(input: Tensor, weight: MXWeight, *args: Any, **kwargs: Any) -> Tensor:
    del args, kwargs  # padding_idx and others only affect gradients
    spec = weight.layout_
    weight = weight.to_row_major()
    rows = [F.embedding(input, part) for part in (weight.elements, weight.scales)]
    return DEQUANTIZE(*rows, spec.format, spec.size, weight.dtype)


def _transpose(weight: MXWeight, dim0: int = -2, dim1: int = -1) -> MXWeight:
    last = {weight.dim() - 1, weight.dim() - 2}
    if {dim0 % weight.dim(), dim1 % weight.dim()} != last:
        raise MXCompileError("only the last two dimensions of an MXWeight can be swapped")
    return weight.swap_axes()


def _expand(weight: MXWeight, sizes: Sequence[int]) -> MXWeight:
    if tuple(sizes[-2:]) != tuple(weight.shape[-2:]):
        raise MXCompileError("only leading dimensions of an MXWeight can be expanded")
    elements, scales = (part.expand(*sizes[:-2], *part.shape[-2:]) for part in (weight.elements, weight.scales))
    return MXWeight(elements, scales, weight.layout_, weight.dtype, weight.multiplier)


def _view(weight: MXWeight, sizes: Sequence[int]) -> MXWeight:
    if tuple(sizes) != tuple(weight.shape):
        raise MXCompileError(f"an MXWeight of shape {tuple(weight.shape)} cannot be viewed as {tuple(sizes)}")
    return MXWeight(weight.elements, weight.scales, weight.layout_, weight.dtype, weight.multiplier)


def _requires_grad(weight: MXWeight, requires_grad: bool = True) -> MXWeight:
    if requires_grad:
        raise MXCompileError(
            "an MXWeight holds packed bytes and cannot be trained: train other parameters (an adapter such as LoRA, "
            "norms, biases), through which gradients flow, or replace it with nn.Parameter(weight.dequantize()); "
            "load_state_dict(..., assign=True) needs model.requires_grad_(False) before it"
        )
    return weight


def _set_data(weight: MXWeight, value: Tensor) -> None:
    """torch would accept it and change nothing: the values are in the component tensors."""
    del value
    raise MXCompileError(
        f".data of an MXWeight ({list(weight.shape)}, {weight.layout_.format}) cannot be set: replace the parameter "
        "(module.weight = nn.Parameter(value, requires_grad=False)); cast or move the whole module with .to"
    )


def _share_memory(weight: MXWeight) -> MXWeight:
    for part in weight.parts:
        part.share_memory_()
    return weight


def _is_shared(weight: MXWeight) -> bool:
    return all(part.is_shared() for part in weight.parts)


def _data_ptr(weight: MXWeight) -> int:
    return weight.elements.data_ptr()  # tells weights apart: accelerate looks for tied ones by it


def _without_storage(weight: MXWeight, *_: Any, **__: Any) -> Any:
    raise MXCompileError(no_storage(weight.shape, weight.layout_.format))


_SELECTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: experts.select,
    Tensor.__iter__: experts.one_by_one,
    torch.select: experts.select_along,
    Tensor.select: experts.select_along,
    torch.unbind: experts.unbind,
    Tensor.unbind: experts.unbind,
}
HANDLERS.update(_SELECTIONS)
HANDLERS[EXPERTS] = experts.unpack_experts
LOW_LEVEL[EXPERTS] = experts.unpack_experts
HANDLERS.update(
    {
        Tensor.requires_grad_: _requires_grad,
        Tensor.requires_grad.__set__: _requires_grad,  # pyright: ignore[reportAttributeAccessIssue]
        F.linear: _linear,
        F.embedding: _embedding,
        torch.matmul: _right_operand(torch.matmul, 1),
        Tensor.matmul: _right_operand(torch.matmul, 1),
        Tensor.__matmul__: _right_operand(torch.matmul, 1),
        torch.mm: _right_operand(torch.mm, 1),
        Tensor.mm: _right_operand(torch.mm, 1),
        torch.bmm: experts.bmm,
        Tensor.bmm: experts.bmm,
        torch.addmm: _right_operand(torch.addmm, 2),
        Tensor.addmm: _right_operand(torch.addmm, 2),
        torch.baddbmm: _right_operand(torch.baddbmm, 2),
        Tensor.baddbmm: _right_operand(torch.baddbmm, 2),
        torch.t: _transpose,
        Tensor.t: _transpose,
        Tensor.T.__get__: _transpose,  # pyright: ignore[reportAttributeAccessIssue]
        Tensor.mT.__get__: _transpose,  # pyright: ignore[reportAttributeAccessIssue]
        torch.transpose: _transpose,
        Tensor.transpose: _transpose,
        Tensor.data.__set__: _set_data,  # pyright: ignore[reportAttributeAccessIssue]
        Tensor.share_memory_: _share_memory,
        Tensor.is_shared: _is_shared,
        Tensor.data_ptr: _data_ptr,
        Tensor.storage: _without_storage,
        Tensor.numpy: _without_storage,
        torch._grouped_mm: experts.grouped_mm,  # pyright: ignore[reportPrivateUsage] - what F.grouped_mm calls
    }
)
LOW_LEVEL.update(
    {
        aten.t.default: _transpose,
        aten.transpose.int: _transpose,
        aten.expand.default: _expand,
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten.linear.default: _linear,
        aten.mm.default: _right_operand(torch.mm, 1),
        aten.bmm.default: experts.bmm,
        aten.index.Tensor: experts.select_many,
        aten.select.int: experts.select_along,
        aten.unbind.int: experts.unbind,
        aten.addmm.default: _right_operand(torch.addmm, 2),
        aten.baddbmm.default: _right_operand(torch.baddbmm, 2),
        aten._grouped_mm.default: experts.grouped_mm,
    }
)
CUSTOM_OPS.update(
    {
        "transformers.grouped_mm_fallback": experts.grouped_mm_fallback,
        "transformers.grouped_mm_fallback.default": experts.grouped_mm_fallback,
    }
)
