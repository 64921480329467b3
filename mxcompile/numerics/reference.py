"""Reference semantics in plain PyTorch: MX quantize, dequantize, linear, and single-token attention.

Every kernel must agree with this file: quantization bit for bit, matmuls up to the order of float32 accumulation.
Source: OCP Microscaling Formats (MX) specification v1.0, section 6.3; the scale rules are described at `ScaleRule`.

Blocks run along the last dimension. A size that is not a multiple of the block is padded with zeros inside the last
block (a zero never raises a block's maximum), and the padding is dropped again by `dequantize`.

All arithmetic is exact except the one rounding to an element: scaling multiplies by a power of two built from its
bits, never by `exp2` or a division, which compilers approximate.
"""

from functools import cache

import torch
from torch import Tensor

from mxcompile.formats import MXFP8_E4M3, SCALE_BIAS, SCALE_NAN, MXFormat, ScaleRule, as_format, as_scale_rule

_MSE_OFFSETS = (0, -1, 1)
_FLOAT16_MANTISSA = 10
_FLOAT16_EMIN = -14
ALIGNED_TOP_EXPONENT = 7  # exponent of the largest e4m3 number of an aligned token


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float32, exact for int32 exponents in [-127, 127]; -127 is subnormal in float32."""
    bits = (exponent + SCALE_BIAS) << 23
    return torch.where(exponent <= -SCALE_BIAS, 1 << 22, bits).view(torch.float32)


def scale_values(scales: Tensor) -> Tensor:
    """E8M0 bytes (uint8) to float32: 2**(byte - 127); 255 is NaN."""
    values = power_of_two(scales.to(torch.int32) - SCALE_BIAS)
    return torch.where(scales == SCALE_NAN, torch.nan, values)


def largest_exponent(dtype: torch.dtype) -> int:
    """Exponent of the largest finite number of a float dtype, at most float32's: 15 for float16, else 127."""
    return min(SCALE_BIAS, int(torch.finfo(dtype).max).bit_length() - 1)


def to_blocks(x: Tensor, fmt: MXFormat) -> Tensor:
    """`[..., size]` to `[..., blocks, block_size]`, padded with zeros."""
    padding = fmt.blocks(x.shape[-1]) * fmt.block_size - x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, padding)) if padding else x
    return padded.unflatten(-1, (-1, fmt.block_size))


def round_elements(v: Tensor, fmt: MXFormat) -> Tensor:
    """Round float32 to the nearest element, ties to even, subnormals kept, saturating at `fmt.max_value`."""
    if fmt.is_integer:
        steps = 2.0**fmt.mantissa_bits
        rounded = torch.round(v * steps) + 0.0  # two's complement has one zero: -0.0 becomes 0.0
        return (rounded / steps).clamp(-fmt.max_value, fmt.max_value)
    exponent = _exponent(v).clamp(fmt.emin, fmt.emax)
    rounded = torch.round(v * power_of_two(fmt.mantissa_bits - exponent))
    return (rounded * power_of_two(exponent - fmt.mantissa_bits)).clamp(-fmt.max_value, fmt.max_value)


def encode(elements: Tensor, fmt: MXFormat) -> Tensor:
    """Element values (float32, already rounded) to codes (uint8, `fmt.bits` bits used)."""
    if fmt.is_integer:
        codes = (elements * 2.0**fmt.mantissa_bits).to(torch.int32) & (2**fmt.bits - 1)
        return codes.to(torch.uint8)
    exponent = _exponent(elements).clamp(fmt.emin, fmt.emax)
    mantissa = (elements.abs() * power_of_two(fmt.mantissa_bits - exponent)).to(torch.int32)
    sign = torch.signbit(elements).to(torch.int32) << (fmt.bits - 1)
    return (((exponent - fmt.emin) << fmt.mantissa_bits) + mantissa + sign).to(torch.uint8)


def decode(codes: Tensor, fmt: MXFormat) -> Tensor:
    """Codes (uint8) to element values (float32), Inf and NaN of E5M2 and E4M3 included.

    Integers are sign-extended. The fields of a float element are moved into those of a float16, whose exponent range
    contains theirs (subnormals stay subnormals), and an exact power of two corrects the difference in bias.
    """
    if fmt.is_integer:
        unused = 8 - fmt.bits
        return ((codes << unused).view(torch.int8) >> unused).to(torch.float32) * 2.0**-fmt.mantissa_bits
    wide = codes.to(torch.int16)
    sign = (wide >> (fmt.bits - 1)) << 15
    magnitude = wide & (2 ** (fmt.bits - 1) - 1)
    half = (sign | (magnitude << (_FLOAT16_MANTISSA - fmt.mantissa_bits))).view(torch.float16)
    values = half.to(torch.float32) * 2.0 ** (fmt.emin - _FLOAT16_EMIN)
    if fmt.exponent_bits == 4:  # the last code of E4M3 is NaN, where the rule for the others gives a number
        return torch.where(magnitude > fmt.max_code, torch.nan, values)
    return values


@cache
def element_table(fmt: MXFormat) -> tuple[float, ...]:
    """The values of all `2**fmt.bits` codes."""
    return tuple(decode(torch.arange(2**fmt.bits, dtype=torch.uint8), fmt).tolist())


def scale_exponents(amax: Tensor, fmt: MXFormat, rule: ScaleRule, largest: int = SCALE_BIAS) -> Tensor:
    """Exponent of the shared scale for each block maximum.

    `amax` float32 (finite), result int32 in [-127, largest - emax]. `largest` is the exponent of the largest finite
    number of the tensor's own dtype: a scale beyond it could round a finite value up to infinity.
    MSE gives FLOOR's exponent here: its search needs the block itself.
    """
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2**exponent, mantissa in [0.5, 1)
    threshold = rule.threshold(fmt) / 2
    beyond = mantissa >= threshold if rule is ScaleRule.EVEN else mantissa > threshold
    return (exponent - 1 - fmt.emax + beyond.to(torch.int32)).clamp(-SCALE_BIAS, largest - fmt.emax)


def quantize(x: Tensor, fmt: MXFormat | str, rule: ScaleRule | str) -> tuple[Tensor, Tensor]:
    """Quantize along the last dimension.

    x: `[..., size]`, float32 / bfloat16 / float16 (float64 is rounded to float32 first).
    Returns codes `[..., blocks * block_size]` (uint8, one element a byte) and E8M0 scales `[..., blocks]` (uint8).
    A block that holds Inf or NaN gets scale 255, so that all of it decodes to NaN.
    """
    fmt = as_format(fmt)
    elements, exponent, finite = _quantize_blocks(x, fmt, as_scale_rule(rule))
    scales = torch.where(finite, exponent + SCALE_BIAS, SCALE_NAN).to(torch.uint8)
    return encode(elements, fmt).flatten(-2), scales.squeeze(-1)


def quantize_on_scales(x: Tensor, scales: Tensor, fmt: MXFormat | str) -> Tensor:
    """Codes `[..., blocks * block_size]` of finite values `[..., size]` on scales `[..., blocks]` (none 255)."""
    fmt = as_format(fmt)
    blocks = to_blocks(x.to(torch.float32), fmt)
    exponent = SCALE_BIAS - scales.to(torch.int32).unsqueeze(-1)
    return encode(round_elements(blocks * power_of_two(exponent), fmt), fmt).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor, fmt: MXFormat | str, size: int, dtype: torch.dtype) -> Tensor:
    """Codes `[..., blocks * block_size]` and scales `[..., blocks]` to values `[..., size]` of `dtype`.

    Those of an aligned format are aligned (`align`).
    """
    fmt = as_format(fmt)
    blocks = decode(codes, fmt).unflatten(-1, (-1, fmt.block_size))
    values = (blocks * scale_values(scales).unsqueeze(-1)).flatten(-2)[..., :size].to(dtype)
    return align(values) if fmt.aligned else values


def quantize_dequantize(x: Tensor, fmt: MXFormat | str, rule: ScaleRule | str) -> Tensor:
    """`dequantize(quantize(x))` without forming codes: same values, in the shape and dtype of x."""
    fmt = as_format(fmt)
    elements, exponent, finite = _quantize_blocks(x, fmt, as_scale_rule(rule))
    values = torch.where(finite, elements * power_of_two(exponent), torch.nan)
    values = values.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return align(values) if fmt.aligned else values


def scaled_blocks(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize` rounds to elements: x `[..., size]` in units of its blocks' scales, `[..., blocks, block_size]`.

    And the exponents of the scales (int32), and which blocks are finite (bool), `[..., blocks, 1]`; others are zeros.
    """
    largest = largest_exponent(x.dtype)
    blocks = to_blocks(x.to(torch.float32), fmt)
    amax = blocks.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(amax)
    blocks = torch.where(finite, blocks, 0.0)
    exponent = scale_exponents(torch.where(finite, amax, 0.0), fmt, rule, largest)
    if rule is ScaleRule.MSE:
        exponent = _least_squares_exponent(blocks, exponent, fmt, largest)
    return blocks * power_of_two(-exponent), exponent, finite


def align(x: Tensor) -> Tensor:
    """Make every token e4m3 numbers times one power of two, 2**(floor(log2(max|x|)) - 7), at least 2**-127.

    x: `[..., size]`, one token along the last dimension, with values of MXFP8 E4M3. Same shape and dtype. With
    p = 2**floor(log2(max|x|)), values below 2**-13 p are rounded to multiples of 2**-16 p, ties to even; the others are
    unchanged. A token that holds Inf or NaN becomes NaN as a whole. Idempotent.
    """
    wide = x.to(torch.float32)
    amax = wide.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(amax)
    exponent = (_exponent(amax) - ALIGNED_TOP_EXPONENT).clamp(min=-SCALE_BIAS)
    numbers = round_elements(torch.where(finite, wide, 0.0) * power_of_two(-exponent), MXFP8_E4M3)
    return torch.where(finite, numbers * power_of_two(exponent), torch.nan).to(x.dtype)


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, fmt: MXFormat | str) -> Tensor:
    """`x @ dequantize(codes, scales).T + bias`: x `[..., in]`, codes `[out, blocks * block_size]`, y `[..., out]`."""
    weight = dequantize(codes, scales, fmt, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(query @ key.T * scale + mask) @ value` in float32; zero where every key is masked.

    Query `[batch, heads, 1, size]`, key `[batch, kv_heads, keys, size]`, value `[batch, kv_heads, keys, vsize]`: each
    KV head belongs to `heads / kv_heads` consecutive query heads (GQA). mask: additive, or bool, true where a key is
    attended to; broadcast to `[batch, heads, 1, keys]`. Returns `[batch, heads, 1, vsize]` in the dtype of the query.
    """
    (batch, heads, _, _), (_, kv_heads, keys, vsize) = query.shape, value.shape
    scores = query.float().unflatten(1, (kv_heads, -1)).squeeze(3) @ key.float().mT * scale
    if mask is not None:
        added = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
        scores = scores + added.expand(batch, heads, 1, keys).reshape(scores.shape)
    weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    return (weights @ value.float()).reshape(batch, heads, 1, vsize).to(query.dtype)


def _exponent(v: Tensor) -> Tensor:
    """floor(log2(|v|)) of normal float32 values, as int32; -127 for zero and subnormals."""
    return ((v.view(torch.int32) >> 23) & 0xFF) - SCALE_BIAS


def _quantize_blocks(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded elements `[..., blocks, block_size]`, scale exponents and finiteness `[..., blocks, 1]`."""
    scaled, exponent, finite = scaled_blocks(x, fmt, rule)
    return round_elements(scaled, fmt), exponent, finite


def _least_squares_exponent(blocks: Tensor, floor: Tensor, fmt: MXFormat, largest: int) -> Tensor:
    """The exponent of floor - 1, floor, floor + 1 with the least squared error; floor on a tie."""
    v = blocks * power_of_two(-floor)
    best, best_error = floor, torch.full_like(floor, torch.inf, dtype=torch.float32)
    for offset in _MSE_OFFSETS:
        candidate = (floor + offset).clamp(-SCALE_BIAS, largest - fmt.emax)
        shift = candidate - floor
        rounded = round_elements(v * power_of_two(-shift), fmt) * power_of_two(shift)
        error = _sum_by_halves((rounded - v).square())
        best = torch.where(error < best_error, candidate, best)
        best_error = torch.minimum(error, best_error)
    return best


def _sum_by_halves(blocks: Tensor) -> Tensor:
    """Sums `[..., 1]` of blocks `[..., block_size]` in an order that kernels keep: one half plus the other, and so on.

    So that two scales with nearly the same error are chosen alike everywhere.
    """
    while blocks.shape[-1] > 1:
        first, second = blocks.chunk(2, -1)
        blocks = first + second
    return blocks
