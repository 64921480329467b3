"""MX on the CPU, by mx_cpu.cpp: products with packed weights for up to four tokens, decoding, rounding of inputs.

More tokens than four are multiplied by torch: the weight is decoded into a buffer that the next layer uses again. Fewer
come here from a compiled graph once for each kind of call; then mx_cpu_operator.cpp takes them.
Rounding and decoding are bit for bit `reference.py`'s, products up to the order of a float32 sum.
"""

import ctypes
import logging
import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.cpu.build import ELEMENTS, BuildError, library, operator, why_not

PackedWeight: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Packed elements `[out, bytes]`, scales `[out, blocks]`, and a bias `[out]` or None."""
MOST_TOKENS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_local = threading.local()
logger = logging.getLogger(__name__)


def supports(x: Tensor, fmt: MXFormat) -> str | None:
    """None if `linear` can serve, or the reason why not."""
    if x.device.type != "cpu":
        return "runs on the CPU"
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16 inputs, not {x.dtype}"
    return why_not(fmt)


def supports_rounding(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> str | None:
    """None if `quantize_dequantize` can serve, or the reason why not."""
    if rule is ScaleRule.MSE:
        return "scale rule mse searches exponents, which the CPU kernel does not do"
    try:
        rule.threshold(fmt)
    except MXCompileError as error:
        return str(error)
    return supports(x, fmt)


def linears(
    x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule] | None = None
) -> list[Tensor]:
    """`x @ dequantize(elements, scales).T + bias` for some weights of one format and inner size.

    x `[..., in]`, rounded to a format first if one is given. Returns `[..., out]` for each weight.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    few = 0 < len(rows) <= MOST_TOKENS
    if rounding is not None and not (few and _rounds_with(rounding[0], fmt, x.dtype)):
        rows, rounding = quantize_dequantize(rows, *rounding), None
    if few:
        if rows.dtype != torch.float16:
            _serve_without_python(fmt, rounding, rows.dtype)
        outputs = _multiply(rows, weights, fmt, rounding)
    else:
        outputs = [_decode_and_multiply(rows, weight, fmt) for weight in weights]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def decode(
    elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Packed elements `[rows, bytes]` and scales `[rows, blocks]` to values `[rows, size]`, in `out` if it fits."""
    wide = dtype != torch.bfloat16
    rows = len(elements)
    place = torch.float32 if wide else torch.bfloat16
    values = out if out is not None and out.dtype == place else torch.empty(rows * size, dtype=place)
    values = values[: rows * size].view(rows, size)
    threads = torch.get_num_threads()
    library(fmt).mx_decode(
        _pointer(elements), _pointer(scales), _pointer(values), wide, _long(rows), _long(size), threads
    )
    return values.to(dtype)


def quantize_dequantize(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """What reference.quantize_dequantize gives, bit for bit (the payload of a NaN excepted)."""
    given = _plain(x)
    values = torch.empty_like(given)
    size = x.shape[-1]
    library(fmt).mx_round(
        _pointer(given),
        _pointer(values),
        given.dtype == torch.float32,
        _long(math.prod(x.shape[:-1])),
        _long(size),
        ctypes.byref(_rounding(fmt, rule, x.dtype)),
        torch.get_num_threads(),
    )
    return values.to(x.dtype)


def _multiply(
    x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule] | None
) -> list[Tensor]:
    """x `[1 to 4, in]`; sums and bias in float32, rounded once."""
    tokens, size = x.shape
    given = _plain(x)
    wide = given.dtype == torch.float32
    kept = [
        (e.contiguous(), s.contiguous(), None if b is None else b.to(given.dtype).contiguous()) for e, s, b in weights
    ]
    outputs = [given.new_empty(tokens, elements.shape[0]) for elements, _, _ in kept]
    table = (_Weight * len(kept))()
    for row, (elements, scales, bias), y in zip(table, kept, outputs, strict=True):
        row.elements, row.scales, row.y = elements.data_ptr(), scales.data_ptr(), y.data_ptr()
        row.rows = elements.shape[0]
        row.bias, row.wide = None if bias is None else bias.data_ptr(), wide
    how = None if rounding is None else ctypes.byref(_rounding(*rounding, x.dtype))
    threads = torch.get_num_threads()
    library(fmt).mx_multiply(table, len(kept), _pointer(given), wide, _long(tokens), _long(size), how, threads)
    return outputs if given.dtype == x.dtype else [y.to(x.dtype) for y in outputs]


@cache
def _serve_without_python(fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule] | None, dtype: torch.dtype) -> None:
    """Let `mx::cpu_linears` with these arguments go by mx_cpu_operator.cpp from now on, if that can be built."""
    try:
        serve = operator().mx_serve
    except BuildError as error:
        logger.info("products of a few tokens go through Python: %s", error)
        return
    names = (None, None) if rounding is None else (str(rounding[0]).encode(), rounding[1].value.encode())
    how = None if rounding is None else ctypes.byref(_rounding(*rounding, dtype))
    serve(str(fmt).encode(), *names, dtype == torch.float32, library(fmt).mx_multiply, how)


def _rounds_with(activation: MXFormat, weight: MXFormat, dtype: torch.dtype) -> bool:
    """Whether a weight's own library rounds the input: blocks as long as the weight's, not of float16."""
    return activation.block_size == weight.block_size and dtype != torch.float16


@cache
def _rounding(fmt: MXFormat, rule: ScaleRule, dtype: torch.dtype) -> "_Rounding":
    largest = int(torch.finfo(dtype).max).bit_length() - 1
    return _Rounding(list(ELEMENTS).index(fmt.name), rule.threshold(fmt) / 2, rule is ScaleRule.EVEN, largest)


def _plain(x: Tensor) -> Tensor:
    """Contiguous, in bfloat16 or float32."""
    return (x if x.dtype == torch.bfloat16 else x.float()).contiguous()


def _decode_and_multiply(x: Tensor, packed: PackedWeight, fmt: MXFormat) -> Tensor:
    elements, scales, bias = packed
    room = _buffer(elements.shape[0] * x.shape[-1], x.dtype)
    return F.linear(x, decode(elements.contiguous(), scales.contiguous(), fmt, x.shape[-1], x.dtype, room), bias)


class _Weight(ctypes.Structure):
    """`Weight` of mx_cpu.cpp."""

    _fields_ = (
        ("elements", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("wide", ctypes.c_int),
    )


class _Rounding(ctypes.Structure):
    """`Rounding` of mx_cpu.cpp."""

    _fields_ = (
        ("element", ctypes.c_int),
        ("threshold", ctypes.c_float),
        ("or_equal", ctypes.c_int),
        ("largest", ctypes.c_int),
    )


def _buffer(values: int, dtype: torch.dtype) -> Tensor:
    """Room for a decoded weight, one for each thread and dtype, as large as the largest asked for so far."""
    place = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    name = str(place)
    held: Tensor | None = getattr(_local, name, None)
    if held is None or held.numel() < values:
        held = torch.empty(values, dtype=place)
        setattr(_local, name, held)
    return held


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)
