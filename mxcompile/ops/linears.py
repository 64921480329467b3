"""Quantize, dequantize, and all that a linear layer with one weight or several of one input needs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import _check as check  # pyright: ignore[reportPrivateUsage] - documented API

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels import dispatch
from mxcompile.kernels.layout import planes as plane_layouts
from mxcompile.kernels.layout import rows_to_planes
from mxcompile.kernels.layout.planes import PlanarScaling
from mxcompile.numerics import block_transforms, hadamard, packing, reference
from mxcompile.numerics.row_slices import row_wise
from mxcompile.ops.library import define, format_of, rounding_of, rule_of, scaling_of


def quantize(x: Tensor, format: str, rule: str) -> tuple[Tensor, Tensor]:
    """Values `[..., size]` to packed elements and scales."""
    fmt = format_of(format)
    codes, scales = reference.quantize(x, fmt, rule_of(rule))
    return packing.pack(codes, fmt), scales


def dequantize(
    elements: Tensor, scales: Tensor, format: str, size: int, dtype: torch.dtype, planes: Sequence[int] | None = None
) -> Tensor:
    """Packed elements and scales to values `[..., size]`, a few rows at a time."""
    elements, scales = _row_major(elements, scales, format, size, planes)
    values = dispatch.dequantize(elements, scales, format_of(format), size, dtype)
    if values is not None:
        return values

    def decode(packed: Tensor, exponents: Tensor) -> tuple[Tensor]:
        return (dequantize_at_once(packed, exponents, format, size, dtype),)

    return row_wise(decode, elements, scales)[0]


def dequantize_at_once(
    elements: Tensor, scales: Tensor, format: str, size: int, dtype: torch.dtype, planes: Sequence[int] | None = None
) -> Tensor:
    """`dequantize` without a loop, which a graph would unroll, and without writes into a part of the result."""
    fmt = format_of(format)
    elements, scales = _row_major(elements, scales, format, size, planes)
    return reference.dequantize(packing.unpack(elements, fmt), scales, fmt, size, dtype)


def _row_major(
    elements: Tensor, scales: Tensor, format: str, size: int, planes: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    if planes is None:
        return elements, scales
    leading = elements.shape[:-1]
    flat = (elements.flatten(0, -2), scales.flatten(0, -2))
    rows = rows_to_planes.convert_to_rows(*flat, format_of(format), size, PlanarScaling(*planes))
    return rows[0].unflatten(0, leading), rows[1].unflatten(0, leading)


def quantize_dequantize(x: Tensor, format: str, rule: str) -> Tensor:
    """`dequantize(quantize(x))` in one step, in the shape and dtype of x."""
    return dispatch.quantize_dequantize(x, format_of(format), rule_of(rule)).contiguous()


def straight_through(gradient: Tensor, x: Tensor, format: str, rule: str) -> Tensor:
    """The gradient of x, where `gradient` is that of `quantize_dequantize(x, format, rule)`; both `[..., size]`."""
    return dispatch.straight_through(gradient, x, format_of(format), rule_of(rule))


def linear(
    x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, format: str, planes: Sequence[int] | None = None
) -> Tensor:
    """`x @ dequantize(elements, scales).T + bias`: x `[..., in]`, elements `[out, bytes]`, returns `[..., out]`."""
    return dispatch.linear(x, elements, scales, bias, format_of(format), scaling_of(planes))


def linears(
    x: Tensor,
    elements: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    format: str,
    activation: str | None,
    rule: str | None,
    planes: Sequence[int] | None = None,
) -> list[Tensor]:
    """`linear` for several weights of one format and inner size; x is first quantized to `activation` by `rule`, if
    given."""
    weights = list(zip(elements, scales, biases, strict=True))
    return dispatch.linears(x, weights, format_of(format), rounding_of(activation, rule), scaling_of(planes))


def multiply(x: Tensor, multiplier: Tensor, digest: str) -> Tensor:
    """`x * multiplier`: x `[..., in]`, multiplier `[in]`; or T x for every run of n channels, T `[in / n, n, n]`."""
    del digest
    return x * multiplier if multiplier.dim() == 1 else block_transforms.apply_to_blocks(x, multiplier)


def rotate(x: Tensor, block: int) -> Tensor:
    """`x` with every run of `block` channels rotated: x `[..., in]`, `in` a multiple of `block`."""
    return hadamard.rotate_input(x, block)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Single-token attention with grouped heads (GQA); see `reference.attend`."""
    return dispatch.attend(query, key, value, mask, scale)


def _fake_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    del mask, scale
    check(query.dim() == key.dim() == value.dim() == 4, lambda: "mx::attend takes 4-D tensors")
    check(query.shape[2] == 1, lambda: f"mx::attend takes one query per head, not {query.shape[2]}")
    check(
        query.shape[1] % key.shape[1] == 0,
        lambda: f"{query.shape[1]} query heads cannot share {key.shape[1]} KV heads",
    )
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _fake_rotate(x: Tensor, block: int) -> Tensor:
    check(x.shape[-1] % block == 0, lambda: f"{x.shape[-1]} channels are not a multiple of the rotation block {block}")
    return x.new_empty(x.shape)


def _fake_quantize(x: Tensor, format: str, rule: str) -> tuple[Tensor, Tensor]:
    fmt: MXFormat = format_of(format)
    _check_rule(rule, fmt)
    blocks = fmt.blocks(x.shape[-1])
    elements = x.new_empty((*x.shape[:-1], blocks * fmt.block_bytes), dtype=torch.uint8)
    return elements, x.new_empty((*x.shape[:-1], blocks), dtype=torch.uint8)


def fake_dequantize(
    elements: Tensor, scales: Tensor, format: str, size: int, dtype: torch.dtype, planes: Sequence[int] | None = None
) -> Tensor:
    """The result of `dequantize` on fake tensors; raises if the sizes do not fit the format."""
    fmt = format_of(format)
    check(elements.dtype == torch.uint8 and scales.dtype == torch.uint8, lambda: "elements and scales must be uint8")
    if planes is not None:
        sizes = (elements.shape[-1], scales.shape[-1])
        check(sizes == plane_layouts.padded_bytes(fmt, size), lambda: f"elements are not planar {fmt}")
        return elements.new_empty((*elements.shape[:-1], size), dtype=dtype)
    check(scales.shape[-1] == fmt.blocks(size), lambda: f"{scales.shape[-1]} scales for {size} values of {fmt}")
    check(elements.shape[-1] == scales.shape[-1] * fmt.block_bytes, lambda: f"elements are not packed {fmt}")
    return elements.new_empty((*elements.shape[:-1], size), dtype=dtype)


def fake_quantize_dequantize(x: Tensor, format: str, rule: str) -> Tensor:
    """The result of `quantize_dequantize` on fake tensors; raises if the format has no such rule."""
    _check_rule(rule, format_of(format))
    return x.new_empty(x.shape)


def _fake_straight_through(gradient: Tensor, x: Tensor, format: str, rule: str) -> Tensor:
    return fake_quantize_dequantize(gradient, format, rule)


def _fake_linear(
    x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, format: str, planes: Sequence[int] | None = None
) -> Tensor:
    fake_dequantize(elements, scales, format, x.shape[-1], x.dtype, planes)
    check(elements.dim() == 2, lambda: f"mx::linear takes a 2-D weight, not {elements.dim()}-D")
    check(bias is None or bias.shape == elements.shape[:1], lambda: "the shape of the bias does not match the weight")
    return x.new_empty((*x.shape[:-1], elements.shape[0]))


def _fake_linears(
    x: Tensor,
    elements: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    format: str,
    activation: str | None,
    rule: str | None,
    planes: Sequence[int] | None = None,
) -> list[Tensor]:
    check((activation is None) == (rule is None), lambda: "activation and rule must be given together")
    if activation is not None and rule is not None:
        x = fake_quantize_dequantize(x, activation, rule)
    weights = zip(elements, scales, biases, strict=True)
    return [_fake_linear(x, packed, exponents, bias, format, planes) for packed, exponents, bias in weights]


def _check_rule(rule: str, fmt: MXFormat) -> None:
    scale_rule: ScaleRule = rule_of(rule)
    scale_rule.threshold(fmt)


_OF_LINEARS = "Tensor x, Tensor[] elements, Tensor[] scales, Tensor?[] biases, str format, str? activation, str? rule"

define("quantize(Tensor x, str format, str rule) -> (Tensor, Tensor)", quantize, _fake_quantize)
define(
    "dequantize(Tensor elements, Tensor scales, str format, SymInt size, ScalarType dtype, int[]? planes=None) "
    "-> Tensor",
    dequantize,
    fake_dequantize,
)
define("quantize_dequantize(Tensor x, str format, str rule) -> Tensor", quantize_dequantize, fake_quantize_dequantize)
define(
    "straight_through(Tensor gradient, Tensor x, str format, str rule) -> Tensor",
    straight_through,
    _fake_straight_through,
)
define(
    "linear(Tensor x, Tensor elements, Tensor scales, Tensor? bias, str format, int[]? planes=None) -> Tensor",
    linear,
    _fake_linear,
)
define(f"linears({_OF_LINEARS}, int[]? planes=None) -> Tensor[]", linears, _fake_linears)
define(f"cpu_linears({_OF_LINEARS}) -> Tensor[]", linears, _fake_linears)
define("multiply(Tensor x, Tensor multiplier, str digest) -> Tensor", multiply, multiply)
define("rotate(Tensor x, int block) -> Tensor", rotate, _fake_rotate)
define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    attend,
    _fake_attend,
    torch.Tag.flexible_layout,
)
