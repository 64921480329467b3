"""Which implementation serves a call: the fastest kernel whose `supports` has no objection, else the reference.

The choice depends on device, dtype, format, and whether a weight is held in rows or in planes (`planes.py`), nothing
else. Without a C++ compiler the reference serves on the CPU for `linear`, and for values its equal in fewer passes,
`fast_rounding.py`. `choices` gives every candidate's answer, for dumps, errors and `mxcompile explain`.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.cpu import linears as cpu
from mxcompile.kernels.layout import e4m3_products, rows_to_planes
from mxcompile.kernels.layout.planes import Scaling
from mxcompile.kernels.triton import split_k_counters
from mxcompile.numerics import fast_rounding, packing, reference

TRITON_MISSING = "triton is not installed"


def linear(
    x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, fmt: MXFormat, planes: Scaling | None = None
) -> Tensor:
    """`x @ dequantize(elements, scales).T + bias`; see `reference.linear`, elements packed, in rows or in planes."""
    if planes is not None:
        return linears(x, [(elements, scales, bias)], fmt, None, planes)[0]
    kernel = _triton("triton.rows_linear", x)
    if kernel is not None and kernel.supports(x, fmt) is None:
        return kernel.linear(x, elements, scales, bias, fmt)
    if cpu.supports(x, fmt) is None:
        return cpu.linears(x, [(elements, scales, bias)], fmt)[0]
    return reference.linear(x, packing.unpack(elements, fmt), scales, bias, fmt)


def linears(
    x: Tensor,
    weights: Sequence[cpu.PackedWeight],
    fmt: MXFormat,
    rounding: tuple[MXFormat, ScaleRule] | None,
    planes: Scaling | None = None,
    aligned: bool = False,
) -> list[Tensor]:
    """`linear` with several weights of one x, rounded to that format first if one is given, and aligned if that is
    said."""
    fast = None if planes is None else _triton("gpu_linears", x)
    many = math.prod(x.shape[:-1]) >= e4m3_products.FEWEST_TOKENS
    if fast is not None and many and why_not_fp8(x, fmt, planes, rounding, aligned) is None:
        return fast.fp8_linears(x, weights, fmt, planes, rounding)
    if aligned:
        x, rounding = align(x, rounding), None
    refused = cpu.supports(x, fmt) or (rounding and cpu.supports_rounding(x, *rounding))
    if planes is None and not refused:
        return cpu.linears(x, weights, fmt, rounding)
    if rounding is not None:
        x = quantize_dequantize(x, *rounding)
    if planes is not None:
        if fast is not None and fast.supports(x) is None:
            return fast.linears(x, weights, fmt, planes)
        size = x.shape[-1]
        weights = [(*rows_to_planes.rows_of_planes(*weight[:2], fmt, size, planes), weight[2]) for weight in weights]
    return [linear(x, elements, scales, bias, fmt) for elements, scales, bias in weights]


def quantize_dequantize(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """See `reference.quantize_dequantize`."""
    kernel = _triton("triton.quantize", x)
    if kernel is not None and kernel.supports(x, fmt, rule) is None:
        return kernel.quantize_dequantize(x, fmt, rule)
    if cpu.supports_rounding(x, fmt, rule) is None:
        return cpu.quantize_dequantize(x, fmt, rule)
    return fast_rounding.quantize_dequantize(x, fmt, rule)


def align(x: Tensor, rounding: tuple[MXFormat, ScaleRule] | None = None) -> Tensor:
    """See `reference.align`; of x rounded to MXFP8 E4M3 first, if that is given."""
    kernel = _triton("triton.align", x)
    if kernel is not None and kernel.supports(x, rounding) is None:
        return kernel.values(x, rounding)
    return reference.align(x if rounding is None else quantize_dequantize(x, *rounding))


def why_not_fp8(
    x: Tensor,
    fmt: MXFormat,
    planes: Scaling | None,
    rounding: tuple[MXFormat, ScaleRule] | None,
    aligned: bool = False,
) -> str | None:
    """None if `linears` multiplies many tokens like x at the rate of 8 bits (`layout/e4m3_products.py`), or why not."""
    if planes is None or rounding is None:
        return "the weight is in rows" if planes is None else e4m3_products.why_not(fmt, None)
    kernel = _triton("gpu_linears", x)
    return TRITON_MISSING if kernel is None else kernel.why_not_fp8(x, fmt, planes, rounding, aligned)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `reference.attend`."""
    kernel = _triton("triton.attention", query)
    if kernel is not None and kernel.supports(query, key, value, mask) is None:
        return kernel.attend(query, key, value, mask, scale)
    return reference.attend(query, key, value, mask, scale)


def why_no_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """None if a kernel serves `attend`, or the reason why not."""
    kernel = _triton("triton.attention", query)
    if kernel is None:
        return "runs on a GPU" if query.device.type == "cpu" else TRITON_MISSING
    return kernel.supports(query, key, value, mask)


def choices(x: Tensor, fmt: MXFormat, out: int) -> dict[str, str | None]:
    """For a weight with so many outputs, in order of preference: kernel name -> None if it serves, or why not.

    That of planes serves if the weight's data can be held so, too, which is found when a model is compiled.
    """
    on_gpu = "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    kernel, fast = _triton("triton.rows_linear", x), _triton("gpu_linears", x)
    answer = on_gpu if kernel is None else kernel.supports(x, fmt)
    planes = on_gpu if fast is None else fast.supports(x) or rows_to_planes.why_no_shape(out, fmt)
    return {"planes": planes, "triton_linear": answer, "cpu": cpu.supports(x, fmt), "reference": None}


def rounding_choices(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> dict[str, str | None]:
    """The same for `quantize_dequantize`."""
    kernel = _triton("triton.quantize", x)
    on_gpu = "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    answer = on_gpu if kernel is None else kernel.supports(x, fmt, rule)
    return {"triton_quantize": answer, "cpu": cpu.supports_rounding(x, fmt, rule), "reference": None}


def prepare(device: torch.device) -> None:
    """Make what the kernels of a GPU share; it must be there before a CUDA graph is captured."""
    if device.type == "cuda":
        split_k_counters.of_device(device)


def _triton(name: str, x: Tensor) -> ModuleType | None:
    """A kernel module that needs triton, for a tensor on a GPU; None where triton is not installed."""
    return None if x.device.type == "cpu" else _import(name)


@cache
def _import(name: str) -> ModuleType | None:
    return None if find_spec("triton") is None else import_module(f"mxcompile.kernels.{name}")
