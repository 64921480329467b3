"""Which implementation serves a call: the fastest kernel whose `supports` has no objection, else the reference.

The choice depends on device, dtype and format alone. Without a C++ compiler the reference serves on the CPU for
`linear`, and for values its equal in fewer passes, `nearest.py`. `choices` gives every candidate's answer, for dumps,
errors and `mxcompile explain`.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from mxcompile import nearest, packing, reference
from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels import cpu

TRITON_MISSING = "triton is not installed"


def linear(x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, fmt: MXFormat) -> Tensor:
    """`x @ dequantize(elements, scales).T + bias`; see `reference.linear`, elements packed."""
    kernel = _triton("triton_linear", x)
    if kernel is not None and kernel.supports(x, fmt) is None:
        return kernel.linear(x, elements, scales, bias, fmt)
    if cpu.supports(x, fmt) is None:
        return cpu.linears(x, [(elements, scales, bias)], fmt)[0]
    return reference.linear(x, packing.unpack(elements, fmt), scales, bias, fmt)


def linears(
    x: Tensor, weights: Sequence[cpu.PackedWeight], fmt: MXFormat, rounding: tuple[MXFormat, ScaleRule] | None
) -> list[Tensor]:
    """`linear` with several weights of one x, rounded to that format first if one is given."""
    refused = cpu.supports(x, fmt) or (rounding and cpu.supports_rounding(x, *rounding))
    if not refused:
        return cpu.linears(x, weights, fmt, rounding)
    if rounding is not None:
        x = quantize_dequantize(x, *rounding)
    return [linear(x, elements, scales, bias, fmt) for elements, scales, bias in weights]


def quantize_dequantize(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """See `reference.quantize_dequantize`."""
    kernel = _triton("triton_quantize", x)
    if kernel is not None and kernel.supports(x, fmt, rule) is None:
        return kernel.quantize_dequantize(x, fmt, rule)
    if cpu.supports_rounding(x, fmt, rule) is None:
        return cpu.quantize_dequantize(x, fmt, rule)
    return nearest.quantize_dequantize(x, fmt, rule)


def choices(x: Tensor, fmt: MXFormat) -> dict[str, str | None]:
    """For `linear`, in order of preference: kernel name -> None if it serves, or why not."""
    kernel = _triton("triton_linear", x)
    on_gpu = "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    answer = on_gpu if kernel is None else kernel.supports(x, fmt)
    return {"triton_linear": answer, "cpu": cpu.supports(x, fmt), "reference": None}


def rounding_choices(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> dict[str, str | None]:
    """The same for `quantize_dequantize`."""
    kernel = _triton("triton_quantize", x)
    on_gpu = "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    answer = on_gpu if kernel is None else kernel.supports(x, fmt, rule)
    return {"triton_quantize": answer, "cpu": cpu.supports_rounding(x, fmt, rule), "reference": None}


def _triton(name: str, x: Tensor) -> ModuleType | None:
    """A kernel module that needs triton, for a tensor on a GPU; None where triton is not installed."""
    return None if x.device.type == "cpu" else _import(name)


@cache
def _import(name: str) -> ModuleType | None:
    return None if find_spec("triton") is None else import_module(f"mxcompile.kernels.{name}")
