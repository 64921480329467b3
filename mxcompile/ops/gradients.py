"""Gradients of the `mx::` operators; none passes the packed weights."""

from typing import Any

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.numerics import experts as experts_reference
from mxcompile.numerics.cache_format import CacheFormat
from mxcompile.numerics.cached_attention import cached_attention
from mxcompile.ops import cached, experts, linears
from mxcompile.ops.library import LIBRARY

__all__ = ["cached", "experts", "linears"]  # which define the operators


def _setup_rotate(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    del output
    ctx.block = inputs[1]


def _rotate_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mx.rotate.default(gradient, ctx.block), None  # the matrix is symmetric


def _setup_multiply(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1])
    ctx.digest = inputs[2]


def _multiply_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (multiplier,) = ctx.saved_tensors
    transposed = multiplier if multiplier.dim() == 1 else multiplier.transpose(-1, -2)
    return torch.ops.mx.multiply.default(gradient, transposed, ctx.digest), None, None


def _setup_quantize_dequantize(ctx: Any, inputs: tuple[Tensor, str, str], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[0])  # not the mask: other operators mostly keep the same x
    ctx.rounding = inputs[1:]


def _quantize_dequantize_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.mx.straight_through.default(gradient, ctx.saved_tensors[0], *ctx.rounding), None, None


def _setup_straight_through(ctx: Any, inputs: tuple[Tensor, Tensor, str, str], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1])
    ctx.rounding = inputs[2:]


def _straight_through_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.mx.straight_through.default(gradient, ctx.saved_tensors[0], *ctx.rounding), None, None, None


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, elements, scales, bias, format, *planes = inputs
    ctx.save_for_backward(elements, scales)
    ctx.decoding = (format, x.shape[-1], x.dtype, *planes)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.mx.dequantize.default(*ctx.saved_tensors, *ctx.decoding)
    bias = gradient.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return gradient @ weight if ctx.needs_input_grad[0] else None, None, None, bias, None, None


def _setup_grouped_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, numbers, elements, scales, bias, *decoding = inputs
    ctx.save_for_backward(numbers, elements, scales)
    ctx.decoding, ctx.size, ctx.bias = decoding, x.shape[-1], None if bias is None else (bias.shape, bias.dtype)


def _grouped_linear_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    numbers, elements, scales = ctx.saved_tensors
    format, *planes = ctx.decoding

    def multiply(rows: Tensor, expert: int) -> Tensor:
        parts = (elements[expert], scales[expert], format, ctx.size, rows.dtype, *planes)
        return rows @ torch.ops.mx.dequantize.default(*parts)

    x = bias = None
    if ctx.needs_input_grad[0]:
        each = experts_reference.grouped_linear(gradient, numbers.reshape(-1, 1), len(elements), ctx.size, multiply)
        x = each.unflatten(0, numbers.shape).sum(1)
    if ctx.needs_input_grad[4]:
        shape, dtype = ctx.bias
        chosen = (numbers.flatten() >= 0) & (numbers.flatten() < shape[0])
        bias = gradient.new_zeros(shape).index_add(0, numbers.flatten()[chosen].long(), gradient[chosen]).to(dtype)
    return x, None, None, None, bias, None, None


def _setup_cached_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, ctx.scale, ctx.is_causal, ctx.cache, ctx.prompt_length = inputs
    ctx.save_for_backward(*tensors)


def _cached_attention_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding of keys and values; the forward pass is computed again."""
    *operands, mask = ctx.saved_tensors
    leaves = [tensor.detach().requires_grad_() for tensor in operands]
    with torch.enable_grad():
        how = (mask, ctx.scale, ctx.is_causal, CacheFormat.parse(ctx.cache), ctx.prompt_length)
        output = cached_attention(*leaves, *how, rounding=_trainable_rounding)  # pyright: ignore[reportCallIssue]
    return *torch.autograd.grad(output, leaves, gradient), None, None, None, None, None


def _trainable_rounding(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    return torch.ops.mx.quantize_dequantize.default(x, str(fmt), str(rule))


def _register_gradients() -> None:
    gradients: dict[str, tuple[Any, Any]] = {
        "rotate": (_rotate_back, _setup_rotate),
        "multiply": (_multiply_back, _setup_multiply),
        "quantize_dequantize": (_quantize_dequantize_back, _setup_quantize_dequantize),
        "straight_through": (_straight_through_back, _setup_straight_through),
        "linear": (_linear_back, _setup_linear),
        "cached_attention": (_cached_attention_back, _setup_cached_attention),
        "grouped_linear": (_grouped_linear_back, _setup_grouped_linear),
    }
    for name, (backward, setup) in gradients.items():
        torch.library.register_autograd(f"mx::{name}", backward, setup_context=setup, lib=LIBRARY)


_register_gradients()
