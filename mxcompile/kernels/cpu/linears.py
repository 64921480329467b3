"""MX linear layers on the CPU (mx_cpu.cpp): matmuls with packed weights for up to four tokens, decoding, rounding.

For more than four tokens the weight is decoded into a buffer, shared by all layers, and torch multiplies, in float32
where the processor has no fast products of the dtype. With four or fewer, a compiled graph comes here once for each
combination of arguments; mx_cpu_operator.cpp runs the later calls.
Rounding and decoding match `reference.py` bit for bit, matmuls up to the order of float32 accumulation.
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
MAX_TOKENS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_local = threading.local()
logger = logging.getLogger(__name__)


def supports(x: Tensor, fmt: MXFormat) -> str | None:
    """None if `linears` supports x and the format, else the reason."""
    if x.device.type != "cpu":
        return "runs on the CPU"
    if x.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16 inputs, not {x.dtype}"
    return why_not(fmt)


def supports_rounding(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> str | None:
    """None if `quantize_dequantize` supports the call, else the reason."""
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
    """`x @ dequantize(elements, scales).T + bias` for several weights of one format and inner size.

    x: `[..., in]`, quantized first as `rounding` says, if given. Returns `[..., out]` for each weight.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    few = 0 < len(rows) <= MAX_TOKENS
    if rounding is not None and not (few and _rounds_with(rounding[0], fmt, x.dtype)):
        rows, rounding = quantize_dequantize(rows, *rounding), None
    if few:
        if rows.dtype != torch.float16:
            _register_native_call(fmt, rounding, rows.dtype)
        outputs = _multiply(rows, weights, fmt, rounding)
    else:
        outputs = [decode_and_multiply(rows, weight, fmt) for weight in weights]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def decode(
    elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Packed elements `[rows, bytes]` and scales `[rows, blocks]` to values `[rows, size]`, in `out` if it fits."""
    wide = dtype != torch.bfloat16
    rows = len(elements)
    storage_dtype = torch.float32 if wide else torch.bfloat16
    values = out if out is not None and out.dtype == storage_dtype else torch.empty(rows * size, dtype=storage_dtype)
    values = values[: rows * size].view(rows, size)
    threads = torch.get_num_threads()
    library(fmt).mx_decode(
        _pointer(elements), _pointer(scales), _pointer(values), wide, _long(rows), _long(size), threads
    )
    return values.to(dtype)


def quantize_dequantize(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """Equals reference.quantize_dequantize bit for bit (except for NaN payloads)."""
    plain_x = plain(x)
    values = torch.empty_like(plain_x)
    size = x.shape[-1]
    library(fmt).mx_round(
        _pointer(plain_x),
        _pointer(values),
        plain_x.dtype == torch.float32,
        _long(math.prod(x.shape[:-1])),
        _long(size),
        ctypes.byref(c_rounding(fmt, rule, x.dtype)),
        torch.get_num_threads(),
    )
    return values.to(x.dtype)


def _multiply(
    x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule] | None
) -> list[Tensor]:
    """x: `[1 to 4, in]`. Accumulates and adds the bias in float32, rounds once."""
    tokens, size = x.shape
    plain_x = plain(x)
    wide = plain_x.dtype == torch.float32
    packed = [
        (e.contiguous(), s.contiguous(), None if b is None else b.to(plain_x.dtype).contiguous()) for e, s, b in weights
    ]
    outputs = [plain_x.new_empty(tokens, elements.shape[0]) for elements, _, _ in packed]
    table = (_Weight * len(packed))()
    for entry, (elements, scales, bias), y in zip(table, packed, outputs, strict=True):
        entry.elements, entry.scales, entry.y = elements.data_ptr(), scales.data_ptr(), y.data_ptr()
        entry.rows = elements.shape[0]
        entry.bias, entry.wide = None if bias is None else bias.data_ptr(), wide
    rounded_as = None if rounding is None else ctypes.byref(c_rounding(*rounding, x.dtype))
    threads = torch.get_num_threads()
    library(fmt).mx_multiply(
        table, len(packed), _pointer(plain_x), wide, _long(tokens), _long(size), rounded_as, threads
    )
    return outputs if plain_x.dtype == x.dtype else [y.to(x.dtype) for y in outputs]


@cache
def _register_native_call(fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule] | None, dtype: torch.dtype) -> None:
    """From now on run `mx::cpu_linears` with these arguments in mx_cpu_operator.cpp, if that can be built."""
    try:
        register = operator().mx_register_kernel
    except BuildError as error:
        logger.info("linear layers with few tokens are dispatched through Python: %s", error)
        return
    names = (None, None) if rounding is None else (str(rounding[0]).encode(), rounding[1].value.encode())
    rounded_as = None if rounding is None else ctypes.byref(c_rounding(*rounding, dtype))
    register(str(fmt).encode(), *names, dtype == torch.float32, library(fmt).mx_multiply, rounded_as)


def is_native(
    x: Tensor, weights: Sequence[PackedWeight], fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule] | None
) -> bool:
    """Whether C++ runs `linears` of few tokens with these arguments as they are."""
    biases = [bias for *_, bias in weights if bias is not None]
    packed = [part for elements, scales, _ in weights for part in (elements, scales)]
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and all(bias.dtype == x.dtype for bias in biases)
        and all(tensor.is_contiguous() for tensor in (x, *packed, *biases))
        and (rounding is None or (_rounds_with(rounding[0], fmt, x.dtype) and supports_rounding(x, *rounding) is None))
        and supports(x, fmt) is None
    )


def _rounds_with(activation: MXFormat, weight: MXFormat, dtype: torch.dtype) -> bool:
    """Whether the library of the weight's format can round the input: same block size, and not float16."""
    return activation.block_size == weight.block_size and dtype != torch.float16


@cache
def c_rounding(fmt: MXFormat, rule: ScaleRule, dtype: torch.dtype) -> "Rounding":
    """How values of a dtype are rounded to a format, for the C++ kernels."""
    largest = int(torch.finfo(dtype).max).bit_length() - 1
    return Rounding(list(ELEMENTS).index(fmt.name), rule.threshold(fmt) / 2, rule is ScaleRule.EVEN, largest)


@cache
def kernels(fmt: MXFormat) -> int:
    """The address of the kernels of a format, `Kernels` of mx_cpu.h."""
    function = library(fmt).mx_kernels
    function.restype = ctypes.c_void_p
    return function()


def plain(x: Tensor) -> Tensor:
    """x contiguous, in bfloat16 or else float32."""
    return (x if x.dtype == torch.bfloat16 else x.float()).contiguous()


def decode_and_multiply(x: Tensor, packed: PackedWeight, fmt: MXFormat) -> Tensor:
    """x `[tokens, in]` times one decoded weight, by torch. Returns `[tokens, out]`."""
    elements, scales, bias = packed
    dtype = x.dtype if _torch_is_fast_in(x.dtype) else torch.float32
    buffer = decoding_buffer(elements.shape[0] * x.shape[-1], dtype)
    weight = decode(elements.contiguous(), scales.contiguous(), fmt, x.shape[-1], dtype, buffer)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


@cache
def _torch_is_fast_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype on this processor; torch's own loops are slower than float32."""
    if dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return dtype == torch.float32
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


class _Weight(ctypes.Structure):
    """`Weight` of mx_cpu.h."""

    _fields_ = (
        ("elements", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("wide", ctypes.c_int),
    )


class Rounding(ctypes.Structure):
    """`Rounding` of mx_cpu.h."""

    _fields_ = (
        ("element", ctypes.c_int),
        ("threshold", ctypes.c_float),
        ("or_equal", ctypes.c_int),
        ("largest", ctypes.c_int),
    )


def decoding_buffer(values: int, dtype: torch.dtype) -> Tensor:
    """A buffer for a decoded weight, one per thread and dtype, as large as the largest requested so far."""
    storage_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    name = str(storage_dtype)
    allocated: Tensor | None = getattr(_local, name, None)
    if allocated is None or allocated.numel() < values:
        allocated = torch.empty(values, dtype=storage_dtype)
        setattr(_local, name, allocated)
    return allocated


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)
