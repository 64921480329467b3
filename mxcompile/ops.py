"""The `mx::` operators, of which lowered graphs consist.

    mx::quantize(x, format, rule) -> (elements, scales)              explicit, one pair per value
    mx::dequantize(elements, scales, format, size, dtype, planes) -> values
    mx::quantize_dequantize(x, format, rule) -> values               the two above, fused
    mx::linear(x, elements, scales, bias, format, planes) -> y       dequantize + linear, fused
    mx::linears(x, elements, scales, biases, format, activation, rule, planes) -> ys
                                                                     the three above, for several weights of one input
    mx::cpu_linears(the same except planes)                          the same, in C++ for few tokens
    mx::rotate(x, block) -> runs of block channels times Hadamard    input of a matmul; see `hadamard.py`
    mx::multiply(x, multiplier, digest) -> x * multiplier            input of a matmul of a deployed module
    mx::attend(query, key, value, mask, scale) -> y                  single-token attention; see `fuse_attention.py`

`format` is the text of an `MXFormat` ("mxint8", "mxfp4:64"), `rule` that of a `ScaleRule`. Elements are packed
(`packing.py`), uint8 `[..., blocks * block_bytes]`; scales are E8M0 bytes `[..., blocks]`; blocks run along the last
dimension, whose true length is `size`. With `planes`, which is its `PlanarScaling`, a 2-D weight has the planar layout
of the GPU kernels (`kernels/layout/planes.py`), in rows of bytes padded to whole K-steps.

The first two are the reference itself on every device. The fused operators run the fastest kernel that supports the
call (`kernels.dispatch`) and are defined as the composition of the first two with `aten.linear`. Compiled graphs
contain `cpu_linears` in place of `linears`: it is C++, because calling a small matmul through Python takes longer than
the matmul. It does not check sizes, which a compiled graph cannot get wrong.

Gradients pass `quantize_dequantize` unchanged (the straight-through estimator); those of `linear`, `rotate` and
`multiply` are exact. Packed weights have none. No gradient passes the bytes between `quantize` and `dequantize`, or the
operators that are only in finished graphs (`linears`, `cpu_linears`, `attend`): a graph to be trained has the others.

`digest` identifies the values of a multiplier. Weights that share an input each have their own multiplier tensor;
inside `torch.compile` only the digest shows that they are equal and one multiplication suffices.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import _check as check  # pyright: ignore[reportPrivateUsage] - documented API

from mxcompile.formats import MXFormat, ScaleRule, parse_format, parse_scale_rule
from mxcompile.kernels import dispatch
from mxcompile.kernels.layout import planes as plane_layouts
from mxcompile.kernels.layout import rows_to_planes
from mxcompile.kernels.layout.planes import PlanarScaling
from mxcompile.numerics import hadamard, packing, reference

_LIBRARY = torch.library.Library("mx", "DEF")
_format = cache(parse_format)
_rule = cache(parse_scale_rule)


def quantize(x: Tensor, format: str, rule: str) -> tuple[Tensor, Tensor]:
    """Values `[..., size]` to packed elements and scales."""
    fmt = _format(format)
    codes, scales = reference.quantize(x, fmt, _rule(rule))
    return packing.pack(codes, fmt), scales


def dequantize(
    elements: Tensor, scales: Tensor, format: str, size: int, dtype: torch.dtype, planes: Sequence[int] | None = None
) -> Tensor:
    """Packed elements and scales to values `[..., size]`."""
    fmt = _format(format)
    if planes is not None:
        elements, scales = rows_to_planes.convert_to_rows(elements, scales, fmt, size, PlanarScaling(*planes))
    return reference.dequantize(packing.unpack(elements, fmt), scales, fmt, size, dtype).contiguous()


def quantize_dequantize(x: Tensor, format: str, rule: str) -> Tensor:
    """`dequantize(quantize(x))` in one step, in the shape and dtype of x."""
    return dispatch.quantize_dequantize(x, _format(format), _rule(rule)).contiguous()


def linear(
    x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, format: str, planes: Sequence[int] | None = None
) -> Tensor:
    """`x @ dequantize(elements, scales).T + bias`: x `[..., in]`, elements `[out, bytes]`, returns `[..., out]`."""
    return dispatch.linear(x, elements, scales, bias, _format(format), _scaling(planes))


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
    rounding = None if activation is None or rule is None else (_format(activation), _rule(rule))
    return dispatch.linears(x, weights, _format(format), rounding, _scaling(planes))


def _scaling(planes: Sequence[int] | None) -> PlanarScaling | None:
    return None if planes is None else PlanarScaling(*planes)


def multiply(x: Tensor, multiplier: Tensor, digest: str) -> Tensor:
    """`x * multiplier`: x `[..., in]`, multiplier `[in]`."""
    del digest
    return x * multiplier


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
    fmt: MXFormat = _format(format)
    _check_rule(rule, fmt)
    blocks = fmt.blocks(x.shape[-1])
    elements = x.new_empty((*x.shape[:-1], blocks * fmt.block_bytes), dtype=torch.uint8)
    return elements, x.new_empty((*x.shape[:-1], blocks), dtype=torch.uint8)


def _fake_dequantize(
    elements: Tensor, scales: Tensor, format: str, size: int, dtype: torch.dtype, planes: Sequence[int] | None = None
) -> Tensor:
    fmt = _format(format)
    check(elements.dtype == torch.uint8 and scales.dtype == torch.uint8, lambda: "elements and scales must be uint8")
    if planes is not None:
        sizes = (elements.shape[-1], scales.shape[-1])
        check(sizes == plane_layouts.padded_bytes(fmt, size), lambda: f"elements are not planar {fmt}")
        return elements.new_empty((elements.shape[0], size), dtype=dtype)
    check(scales.shape[-1] == fmt.blocks(size), lambda: f"{scales.shape[-1]} scales for {size} values of {fmt}")
    check(elements.shape[-1] == scales.shape[-1] * fmt.block_bytes, lambda: f"elements are not packed {fmt}")
    return elements.new_empty((*elements.shape[:-1], size), dtype=dtype)


def _fake_quantize_dequantize(x: Tensor, format: str, rule: str) -> Tensor:
    _check_rule(rule, _format(format))
    return x.new_empty(x.shape)


def _fake_linear(
    x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, format: str, planes: Sequence[int] | None = None
) -> Tensor:
    _fake_dequantize(elements, scales, format, x.shape[-1], x.dtype, planes)
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
        x = _fake_quantize_dequantize(x, activation, rule)
    weights = zip(elements, scales, biases, strict=True)
    return [_fake_linear(x, packed, exponents, bias, format, planes) for packed, exponents, bias in weights]


def _check_rule(rule: str, fmt: MXFormat) -> None:
    scale_rule: ScaleRule = _rule(rule)
    scale_rule.threshold(fmt)


def _register() -> None:
    of_linears = (
        "Tensor x, Tensor[] elements, Tensor[] scales, Tensor?[] biases, str format, str? activation, str? rule"
    )
    schemas = {
        "quantize(Tensor x, str format, str rule) -> (Tensor, Tensor)": (quantize, _fake_quantize),
        "dequantize(Tensor elements, Tensor scales, str format, SymInt size, ScalarType dtype, int[]? planes=None) "
        "-> Tensor": (
            dequantize,
            _fake_dequantize,
        ),
        "quantize_dequantize(Tensor x, str format, str rule) -> Tensor": (
            quantize_dequantize,
            _fake_quantize_dequantize,
        ),
        "linear(Tensor x, Tensor elements, Tensor scales, Tensor? bias, str format, int[]? planes=None) -> Tensor": (
            linear,
            _fake_linear,
        ),
        f"linears({of_linears}, int[]? planes=None) -> Tensor[]": (linears, _fake_linears),
        f"cpu_linears({of_linears}) -> Tensor[]": (linears, _fake_linears),
        "multiply(Tensor x, Tensor multiplier, str digest) -> Tensor": (multiply, multiply),
        "rotate(Tensor x, int block) -> Tensor": (rotate, _fake_rotate),
        "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor": (attend, _fake_attend),
    }
    any_strides = {"attend"}
    for schema, (implementation, fake) in schemas.items():
        name = schema.partition("(")[0]
        tags = (torch.Tag.flexible_layout,) if name in any_strides else ()
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mx::{name}", fake, lib=_LIBRARY)


_register()


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
    return torch.ops.mx.multiply.default(gradient, ctx.saved_tensors[0], ctx.digest), None, None


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    del ctx
    return gradient, None, None


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


def _register_gradients() -> None:
    gradients: dict[str, tuple[Any, Any]] = {
        "rotate": (_rotate_back, _setup_rotate),
        "multiply": (_multiply_back, _setup_multiply),
        "quantize_dequantize": (_straight_through, None),
        "linear": (_linear_back, _setup_linear),
    }
    for name, (backward, setup) in gradients.items():
        torch.library.register_autograd(f"mx::{name}", backward, setup_context=setup, lib=_LIBRARY)


_register_gradients()

QUANTIZE = torch.ops.mx.quantize.default
DEQUANTIZE = torch.ops.mx.dequantize.default
QUANTIZE_DEQUANTIZE = torch.ops.mx.quantize_dequantize.default
LINEAR = torch.ops.mx.linear.default
LINEARS = torch.ops.mx.linears.default
CPU_LINEARS = torch.ops.mx.cpu_linears.default
MULTIPLY = torch.ops.mx.multiply.default
ROTATE = torch.ops.mx.rotate.default
ATTEND = torch.ops.mx.attend.default
