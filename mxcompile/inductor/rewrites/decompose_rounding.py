"""quantize_dequantize(x) on a GPU -> amax of each block, its power of two, every value rounded; for an aligned format,
then the same per token.

Decomposed into pointwise operations and an amax, rounding becomes one Inductor kernel with the elementwise producers of
x (a gated product, the scaling of a norm, a residual add), which passes over memory once. The reduction inside a norm
stays a kernel of its own. Where the producer cannot be fused, such as attention, the rounding is a kernel of its own,
still cheaper to launch than one from Python. On the CPU a C++ kernel runs instead.

Equal bit for bit to `reference.quantize_dequantize` of the kernel's input (except for the payload of a NaN). Inductor
keeps fused intermediate values in float32, so these are never rounded to x's dtype first.

The arithmetic is that of `triton/quantize.py`, which has the derivation: magnitudes are compared as integers, and
adding and subtracting `c = 1.5 * 2**23` steps rounds to a step; contracting a multiplication into that addition (FMA)
changes nothing. Integer elements are clamped between the two operations, where the last bits of `v + c` are the
element.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mxcompile.formats import MXFP8_E4M3, SCALE_BIAS, MXFormat, ScaleRule, parse_format, parse_scale_rule
from mxcompile.graph.edit import create_call
from mxcompile.numerics.reference import ALIGNED_TOP_EXPONENT
from mxcompile.ops import QUANTIZE_DEQUANTIZE

Call = Callable[..., Node]

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FRACTION_BITS = 23  # of a float32
_SIGN, _MAGNITUDE, _EXPONENT, _FRACTION = -0x80000000, 0x7FFFFFFF, 0x7F800000, 0x007FFFFF
_SMALLEST_NORMAL, _SMALLEST_SCALE = 0x00800000, 0x00400000  # 2**-126 and 2**-127


def decompose_rounding(graph: Graph, devices: Collection[str] = ("cuda",)) -> int:
    """Decompose all rounding of whole blocks in place. Returns the number of rewrites.

    devices: the device types to do this on.
    """
    roundings = graph.find_nodes(op="call_function", target=QUANTIZE_DEQUANTIZE)
    roundings = [node for node in roundings if _can_decompose(node, devices)]
    for node in roundings:
        _decompose(graph, node)
    return len(roundings)


def _can_decompose(node: Node, devices: Collection[str]) -> bool:
    x, fmt, rule = _operands(node)
    return _is_static(node, devices) and rule is not ScaleRule.MSE and x.shape[-1] % fmt.block_size == 0


def _is_static(node: Node, devices: Collection[str]) -> bool:
    x: Tensor = node.args[0].meta["val"]  # pyright: ignore
    sizes: list[Any] = list(x.shape)
    is_empty = any(isinstance(size, int) and size == 0 for size in sizes)
    return x.device.type in devices and x.dtype in _DTYPES and not is_empty and isinstance(sizes[-1], int)


def _operands(node: Node) -> tuple[Tensor, MXFormat, ScaleRule]:
    x, fmt, rule = node.args
    return x.meta["val"], parse_format(str(fmt)), parse_scale_rule(str(rule))  # pyright: ignore


def _decompose(graph: Graph, node: Node) -> None:
    """Values `[..., size]` as `[..., blocks, block_size]` and back."""
    x, fmt, rule = _operands(node)
    with graph.inserting_before(node):
        call = partial(create_call, graph)
        source = call(aten.clone.default, node.args[0], memory_format=torch.contiguous_format)
        sizes = _numbers(call, aten.sym_size.int, source, x.shape)
        strides = _numbers(call, aten.sym_stride.int, source, source.meta["val"].stride())
        blocks = call(aten.reshape.default, source, [*sizes[:-1], sizes[-1] // fmt.block_size, fmt.block_size])
        values = call(_CONVERT, blocks, torch.float32)
        rounded = call(_CONVERT, _round(call, values, fmt, rule, x.dtype), x.dtype)
        # Inductor materializes the input of as_strided in blocks. A reshape would move into the loops, which it then
        # does not fuse with others where lengths are dynamic.
        result = call(aten.as_strided.default, rounded, sizes, strides)
        if fmt.aligned:
            result = call(_CONVERT, _align(call, call(_CONVERT, result, torch.float32)), x.dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _numbers(call: Call, read: Any, value: Node, numbers: Sequence[Any]) -> list[Any]:
    """The sizes or strides of a value; nodes that read them where they are dynamic."""
    return [n if isinstance(n, int) else call(read, value, dim) for dim, n in enumerate(numbers)]


def _round(call: Call, values: Node, fmt: MXFormat, rule: ScaleRule, dtype: torch.dtype) -> Node:
    bits = _bits(call, values)
    magnitudes = call(aten.bitwise_and.Scalar, bits, _MAGNITUDE)
    down, up = _powers(call, call(aten.amax.default, magnitudes, [-1], True), fmt, rule, dtype)
    if fmt.is_integer:
        return call(aten.mul.Tensor, _integers(call, call(aten.mul.Tensor, values, down), fmt), up)
    return _signed(call, bits, magnitudes, down, up, fmt)


def _align(call: Call, values: Node) -> Node:
    """Round float32 values to e4m3 numbers times one power of two per row (from the row's largest magnitude)."""
    bits = _bits(call, values)
    magnitudes = call(aten.bitwise_and.Scalar, bits, _MAGNITUDE)
    largest = call(aten.amax.default, magnitudes, [-1], True)
    pattern = call(
        aten.sub.Tensor, call(aten.bitwise_and.Scalar, largest, _EXPONENT), _exponent_bits(ALIGNED_TOP_EXPONENT, 0)
    )
    down, up = _down_and_up(call, call(aten.clamp_min.default, pattern, 0), largest)
    return _signed(call, bits, magnitudes, down, up, MXFP8_E4M3)


def _signed(call: Call, bits: Node, magnitudes: Node, down: Node, up: Node, fmt: MXFormat) -> Node:
    """Magnitudes of float32 `bits`, scaled by `down`, rounded to floating elements, scaled by `up`, with their
    signs."""
    scaled = call(aten.mul.Tensor, _floats(call, magnitudes), down)
    rounded = call(aten.mul.Tensor, _floating(call, scaled, fmt), up)
    sign = call(aten.bitwise_and.Scalar, bits, _SIGN)
    return _floats(call, call(aten.bitwise_or.Tensor, _bits(call, rounded), sign))


def _bits(call: Call, values: Node) -> Node:
    return call(aten.view.dtype, values, torch.int32)


def _floats(call: Call, bits: Node) -> Node:
    return call(aten.view.dtype, bits, torch.float32)


def _powers(call: Call, largest: Node, fmt: MXFormat, rule: ScaleRule, dtype: torch.dtype) -> tuple[Node, Node]:
    """`2**-e` and `2**e` for `e = reference.scale_exponents(...)` of bit patterns; `2**e` is NaN for Inf and NaN.

    The addend carries into the exponent where the fraction exceeds the rule's threshold.
    """
    limit = int((rule.threshold(fmt) - 1) * 2**_FRACTION_BITS) - (rule is ScaleRule.EVEN)
    carry = max(_FRACTION - limit, 0)
    pattern = largest
    if carry and fmt.emax == 0:
        # A subnormal of at least 2**-127 becomes exponent 0 with its fraction in place. It matters only for formats
        # with emax 0: in others such an exponent is clamped.
        doubled = call(aten.sub.Tensor, call(aten.mul.Tensor, largest, 2), _SMALLEST_NORMAL)
        pattern = call(aten.where.self, call(aten.lt.Scalar, largest, _SMALLEST_NORMAL), doubled, largest)
    pattern = call(aten.add.Tensor, pattern, carry - _exponent_bits(fmt.emax, 0))
    pattern = call(aten.bitwise_and.Scalar, pattern, ~_FRACTION)
    highest = int(torch.finfo(dtype).max).bit_length() - 1 - fmt.emax
    pattern = call(aten.clamp_max.default, call(aten.clamp_min.default, pattern, 0), _exponent_bits(highest))
    return _down_and_up(call, pattern, largest)


def _down_and_up(call: Call, pattern: Node, largest: Node) -> tuple[Node, Node]:
    """`2**-e` and `2**e` for an exponent field `pattern`; `2**e` is NaN where `largest` (bits) is not finite."""
    down = call(aten.add.Tensor, call(aten.neg.default, pattern), _exponent_bits(SCALE_BIAS))
    down, up = (_floats(call, call(aten.clamp_min.default, part, _SMALLEST_SCALE)) for part in (down, pattern))
    zero_or_nan = call(aten.mul.Tensor, _floats(call, largest), 0.0)
    return down, call(aten.add.Tensor, up, zero_or_nan)


def _integers(call: Call, v: Node, fmt: MXFormat) -> Node:
    """Round values below 2 in magnitude to the nearest integer elements, saturating; zero loses its sign."""
    magic, most = 1.5 * 2.0 ** (_FRACTION_BITS - fmt.mantissa_bits), int(fmt.max_value * 2**fmt.mantissa_bits)
    zero = _exponent_bits(_FRACTION_BITS - fmt.mantissa_bits) + (1 << (_FRACTION_BITS - 1))
    bits = _bits(call, call(aten.add.Tensor, v, magic))
    bits = call(aten.clamp_min.default, call(aten.clamp_max.default, bits, zero + most), zero - most)
    return call(aten.sub.Tensor, _floats(call, bits), magic)


def _floating(call: Call, v: Node, fmt: MXFormat) -> Node:
    """Round magnitudes below `2**(emax + 1)` to the nearest floating elements, saturating."""
    power = call(aten.bitwise_and.Scalar, _bits(call, v), _EXPONENT)
    power = _floats(call, call(aten.clamp_min.default, power, _exponent_bits(fmt.emin)))
    magic = call(aten.mul.Tensor, power, 1.5 * 2.0 ** (_FRACTION_BITS - fmt.mantissa_bits))
    bits = _bits(call, call(aten.sub.Tensor, call(aten.add.Tensor, v, magic), magic))
    most = _exponent_bits(fmt.emax) + int((fmt.max_value / 2.0**fmt.emax - 1) * 2**_FRACTION_BITS)
    return _floats(call, call(aten.clamp_max.default, bits, most))


def _exponent_bits(exponent: int, bias: int = SCALE_BIAS) -> int:
    """The exponent field of a float32."""
    return (exponent + bias) << _FRACTION_BITS
