"""Kernel selection: each call runs the fastest kernel whose `supports` accepts it, else the reference.

The choice depends only on device, dtype, format, number of tokens, and the layout of the weight, row-major or planar
(`planes.py`). On a CPU without a C++ compiler `linear` runs the reference, and quantize-dequantize its equivalent in
fewer passes, `fast_rounding.py`. `choices` returns every candidate's answer, for dumps, errors and `mxcompile explain`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.cpu import experts as cpu_experts
from mxcompile.kernels.cpu import linears as cpu
from mxcompile.kernels.layout import fp8_eligibility, rows_to_planes
from mxcompile.kernels.layout.planes import PlanarScaling
from mxcompile.kernels.triton import split_k_counters
from mxcompile.numerics import exact_tokens, fast_rounding, next_token, packed_attention, packing, reference
from mxcompile.numerics import experts as experts_reference
from mxcompile.numerics.exact_tokens import ExactTokens
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.norms import Norm
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.numerics.straight_through import straight_through as straight_through_reference

TRITON_MISSING = "triton is not installed"


def linear(
    x: Tensor, elements: Tensor, scales: Tensor, bias: Tensor | None, fmt: MXFormat, planes: PlanarScaling | None = None
) -> Tensor:
    """`x @ dequantize(elements, scales).T + bias`; see `reference.linear`. Elements are packed, planar if `planes`."""
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
    planes: PlanarScaling | None = None,
) -> list[Tensor]:
    """`linear` of one x with several weights; x is quantized first as `rounding` says, if given."""
    gpu = None if planes is None else _triton("gpu_linears", x)
    if gpu is not None and gpu.supports(x) is None:
        many_tokens = math.prod(x.shape[:-1]) >= fp8_eligibility.MIN_TOKENS
        if many_tokens and rounding is not None and gpu.why_not_fp8(x, fmt, planes, rounding) is None:
            return gpu.fp8_linears(x, weights, fmt, planes, rounding)
        if rounding is not None and gpu.why_not_integers(x, fmt, rounding) is None:
            return gpu.integer_linears(x, weights, fmt, planes, rounding)
        return gpu.linears(x if rounding is None else quantize_dequantize(x, *rounding), weights, fmt, planes)
    if rounding is not None and rounding[0].aligned:
        x, rounding = quantize_dequantize(x, *rounding), None
    why_not_cpu = cpu.supports(x, fmt) or (rounding and cpu.supports_rounding(x, *rounding))
    if planes is None and not why_not_cpu:
        return cpu.linears(x, weights, fmt, rounding)
    if rounding is not None:
        x = quantize_dequantize(x, *rounding)
    if planes is not None:
        size = x.shape[-1]
        weights = [(*rows_to_planes.convert_to_rows(*weight[:2], fmt, size, planes), weight[2]) for weight in weights]
    return [linear(x, elements, scales, bias, fmt) for elements, scales, bias in weights]


@dataclass(frozen=True)
class Experts:
    """Packed experts `[E, out, in]`: elements, scales and a bias `[E, out]` or None; planar if `planes`."""

    weight: cpu.PackedWeight
    fmt: MXFormat
    planes: PlanarScaling | None


def grouped_linear(
    x: Tensor, experts: Tensor, weight: cpu.PackedWeight, fmt: MXFormat, planes: PlanarScaling | None = None
) -> Tensor:
    """Rows of x times the experts chosen for them; see `numerics/experts.py`. x `[rows, in]`, experts `[rows, k]`."""
    if planes is None and cpu_experts.supports(x, fmt) is None:
        return cpu_experts.grouped_linear(x, experts, weight, fmt)
    elements, scales, bias = weight
    gpu = None if planes is None else _triton("gpu_experts", x)
    if gpu is not None and gpu.supports(x) is None:
        return gpu.grouped_linear(x, experts, weight, fmt, planes)

    def multiply(rows: Tensor, expert: int) -> Tensor:
        return linear(rows, elements[expert], scales[expert], None if bias is None else bias[expert], fmt, planes)

    return experts_reference.grouped_linear(x, experts, len(elements), elements.shape[1], multiply)


def experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Experts,
    down: Experts,
    gate: Gate,
    rounding: tuple[MXFormat, ScaleRule] | None,
) -> Tensor:
    """The sum of a token's chosen experts, with weights `[tokens, k]`: x `[tokens, hidden]`, experts `[tokens, k]`.

    rounding: of the value between the two matmuls.
    """
    gpu = None if up.planes is None or down.planes is None else _triton("gpu_experts", x)
    if gpu is not None and gpu.supports(x, rounding) is None:
        packed = [(each.weight, each.fmt, each.planes) for each in (up, down)]
        return gpu.experts(x, experts, weights, *packed, gate, rounding)
    if why_not_cpu_experts(x, up, down, rounding) is None:
        return cpu_experts.experts(x, experts, weights, (up.weight, up.fmt), (down.weight, down.fmt), gate, rounding)
    hidden = gate(grouped_linear(x, experts, up.weight, up.fmt, up.planes))
    if rounding is not None:
        hidden = quantize_dequantize(hidden, *rounding)
    y = grouped_linear(hidden, experts.reshape(-1, 1), down.weight, down.fmt, down.planes)
    return experts_reference.weighted_sum(y, weights, x.dtype)


def why_not_cpu_experts(
    x: Tensor, up: Experts, down: Experts, rounding: tuple[MXFormat, ScaleRule] | None
) -> str | None:
    """None if `experts` is one call of the CPU kernel, else the reason."""
    if up.planes is not None or down.planes is not None:
        return "the weight has the planar layout of the GPU kernels"
    formats = (cpu_experts.supports(x, up.fmt), cpu_experts.supports(x, down.fmt))
    return next(filter(None, formats), None) or cpu_experts.supports_rounding(x, rounding)


def quantize_dequantize(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """See `reference.quantize_dequantize`."""
    if fmt.aligned:
        return _quantize_aligned(x, fmt, rule)
    kernel = _triton("triton.quantize", x)
    if kernel is not None and kernel.supports(x, fmt, rule) is None:
        return kernel.quantize_dequantize(x, fmt, rule)
    if cpu.supports_rounding(x, fmt, rule) is None:
        return cpu.quantize_dequantize(x, fmt, rule)
    return fast_rounding.quantize_dequantize(x, fmt, rule)


def straight_through(gradient: Tensor, x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """The gradient of x, contiguous; see `numerics/straight_through.py`."""
    kernel = _triton("triton.quantize", x)
    if kernel is not None and not fmt.aligned and kernel.supports(x, fmt, rule) is None:
        return kernel.straight_through(gradient, x, fmt, rule)
    return straight_through_reference(gradient, x, fmt, rule).contiguous()


def dequantize(elements: Tensor, scales: Tensor, fmt: MXFormat, size: int, dtype: torch.dtype) -> Tensor | None:
    """`reference.dequantize` of packed, row-major elements without temporaries; None where no kernel does it."""
    kernel = _triton("triton.quantize", elements)
    if kernel is None or kernel.why_not_decoded(elements, fmt, dtype) is not None:
        return None
    return kernel.dequantize(elements, scales, fmt, size, dtype)


def _quantize_aligned(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    kernel = _triton("triton.align", x)
    if kernel is not None and kernel.supports(x, (fmt, rule)) is None:
        return kernel.values(x, (fmt, rule))
    return reference.align(quantize_dequantize(x, fmt.with_alignment(False), rule))


def why_not_fp8(
    x: Tensor,
    fmt: MXFormat,
    planes: PlanarScaling | None,
    rounding: tuple[MXFormat, ScaleRule] | None,
) -> str | None:
    """None if `linears` uses FP8 tensor cores for many tokens like x (`layout/fp8_eligibility.py`), else the reason."""
    if planes is None or rounding is None:
        return "the weight is row-major" if planes is None else fp8_eligibility.why_not(fmt, None)
    kernel = _triton("gpu_linears", x)
    return TRITON_MISSING if kernel is None else kernel.why_not_fp8(x, fmt, planes, rounding)


def why_not_integers(
    x: Tensor,
    fmt: MXFormat,
    planes: PlanarScaling | None,
    rounding: tuple[MXFormat, ScaleRule],
) -> str | None:
    """None if `linears` rounds a token like x to integers and multiplies these, else the reason."""
    kernel = _triton("gpu_linears", x)
    if planes is None or kernel is None:
        return "the weight is row-major" if planes is None else TRITON_MISSING
    return kernel.why_not_integers(x, fmt, rounding)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `reference.attend`."""
    kernel = _triton("triton.attention.one_token", query)
    if kernel is not None and kernel.supports(query, key, value, mask) is None:
        return kernel.attend(query, key, value, mask, scale)
    return reference.attend(query, key, value, mask, scale)


def why_no_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rounding: tuple[MXFormat, ScaleRule] | None = None,
) -> str | None:
    """None if a kernel runs `attend`, or `attend_next` with that rounding, else the reason."""
    kernel = _triton("triton.attention.one_token", query)
    if kernel is None:
        return "runs on a GPU" if query.device.type == "cpu" else TRITON_MISSING
    return kernel.supports(query, key, value, mask, rounding)


def attend_next(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    mask: Tensor | None,
    scale: float,
    rounding: tuple[MXFormat, ScaleRule] | None,
) -> Tensor:
    """See `numerics/next_token.py`; the result is then quantized and dequantized."""
    if why_no_attention(query, keys, values, mask, rounding) is None:
        kernel: Any = _triton("triton.attention.one_token", query)
        return kernel.attend(query, keys, values, mask, scale, None, kernel.NewToken(*new), rounding)
    y = next_token.attend_next(query, keys, values, new, mask, scale)
    return y if rounding is None else quantize_dequantize(y, *rounding)


def attend_packed(query: Tensor, keys: PackedStates, values: PackedStates, mask: Tensor | None, scale: float) -> Tensor:
    """See `numerics/packed_attention.py`."""
    if why_no_packed_attention(query, keys, values, mask) is None:
        kernel: Any = _triton("triton.attention.packed_attention", query)
        return kernel.attend(query, keys, values, mask, scale)
    return packed_attention.attend_packed(query, keys, values, mask, scale)


def why_no_packed_attention(
    query: Tensor,
    keys: PackedStates,
    values: PackedStates,
    mask: Tensor | None,
    rounding: tuple[MXFormat, ScaleRule] | None = None,
) -> str | None:
    """None if a kernel runs `attend_packed`, with that rounding of the result, else the reason."""
    kernel = _triton("triton.attention.packed_attention", query)
    if kernel is None:
        return "runs on a GPU" if query.device.type == "cpu" else TRITON_MISSING
    return kernel.supports(query, keys, values, mask, rounding)


def attend_packed_next(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    states: tuple[PackedStates, PackedStates],
    rules: tuple[ScaleRule, ScaleRule],
    position: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    scale: float,
    rounding: tuple[MXFormat, ScaleRule] | None,
) -> Tensor:
    """`append_packed` and `attend_packed` of `numerics/packed_attention.py`, one launch on a GPU; the result is then
    quantized and dequantized. Tokens after `position` are not read, so that room to spare costs no time."""
    runs = why_no_packed_attention(query, *states, mask, rounding) is None
    kernel: Any = _triton("triton.attention.packed_attention", query) if runs else None
    if runs and kernel.why_not_written(query, new, states, rules, rotation) is None:
        token = kernel.Next(*new, rules, rotation)
        return kernel.attend(query, *states, mask, scale, None, rounding, position, new=token)
    query = packed_attention.append_packed(query, new, states, rules, position, rotation)
    if runs:
        return kernel.attend(query, *states, mask, scale, None, rounding, position)
    y = packed_attention.attend_packed(query, *states, mask, scale, position)
    return y if rounding is None else quantize_dequantize(y, *rounding)


def attend_packed_exact(
    query: Tensor,
    turned: Tensor,
    states: tuple[PackedStates, PackedStates],
    exact: tuple[ExactTokens, ExactTokens],
    held: Tensor,
    position: Tensor,
    window: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See `numerics/exact_tokens.py`."""
    if why_no_packed_attention(query, *states, mask) is None:
        kernel: Any = _triton("triton.attention.packed_attention", query)
        read = kernel.Exact(query, *exact, held, window)
        return kernel.attend(turned, *states, mask, scale, position=position, exact=read)
    return exact_tokens.attend_packed_exact(query, turned, states, exact, held, position, window, mask, scale)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    rounding: tuple[MXFormat, ScaleRule],
) -> tuple[Tensor, Tensor]:
    """`x + residual` and its norm, quantized and dequantized."""
    kernel = _triton("triton.norm", x)
    if kernel is not None and kernel.supports(x, rounding) is None:
        return kernel.add_norm(x, residual, weight, bias, norm, rounding, None, _start_early(x))
    x = x if residual is None else x + residual
    return x, quantize_dequantize(norm(x, weight, bias), *rounding)


def _start_early(x: Tensor) -> bool:
    matmuls = _triton("gpu_linears", x)
    return matmuls is not None and matmuls.start_early(x)


def gate_product(gate: Tensor, up: Tensor, function: Gate, rounding: tuple[MXFormat, ScaleRule]) -> Tensor:
    """`f(gate) * up`, quantized and dequantized."""
    kernel = _triton("triton.gate_product", gate)
    if kernel is not None and kernel.supports(gate, rounding) is None:
        return kernel.multiply_and_round(gate, up, function, rounding, None, _start_early(gate))
    return quantize_dequantize(function(torch.cat([gate, up], -1)), *rounding)


def why_no_small_kernel(name: str, x: Tensor, rounding: tuple[MXFormat, ScaleRule]) -> str | None:
    """None if a kernel ("norm" or "gate_product") runs on values like x, else the reason."""
    kernel = _triton(f"triton.{name}", x)
    if kernel is None:
        return "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    return kernel.supports(x, rounding)


def choices(x: Tensor, fmt: MXFormat, out: int) -> dict[str, str | None]:
    """Kernel name -> None if it supports a weight with `out` outputs, else the reason; in order of preference.

    "planes" also requires that the weight's values fit the planar layout, which is checked when a model is compiled.
    """
    unavailable = "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    kernel, gpu = _triton("triton.rows_linear", x), _triton("gpu_linears", x)
    reason = unavailable if kernel is None else kernel.supports(x, fmt)
    planes = unavailable if gpu is None else gpu.supports(x) or rows_to_planes.why_shape_not_planar(out, fmt)
    return {"planes": planes, "triton_linear": reason, "cpu": cpu.supports(x, fmt), "reference": None}


def expert_choices(x: Tensor, fmt: MXFormat, out: int) -> dict[str, str | None]:
    """The same as `choices`, for `grouped_linear` and experts with `out` outputs each."""
    gpu = _triton("gpu_experts", x)
    unavailable = "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    planes = unavailable if gpu is None else gpu.supports(x) or rows_to_planes.why_shape_not_planar(out, fmt)
    return {"experts": planes, "cpu_experts": cpu_experts.supports(x, fmt), "each_expert": None}


def rounding_choices(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> dict[str, str | None]:
    """The same as `choices`, for `quantize_dequantize`."""
    kernel = _triton("triton.quantize", x)
    unavailable = "runs on a GPU" if x.device.type == "cpu" else TRITON_MISSING
    reason = unavailable if kernel is None else kernel.supports(x, fmt, rule)
    return {"triton_quantize": reason, "cpu": cpu.supports_rounding(x, fmt, rule), "reference": None}


def prepare(device: torch.device) -> None:
    """Allocate the counters shared by the kernels of a GPU; must run before a CUDA graph is captured."""
    if device.type == "cuda":
        split_k_counters.device_counters(device)


def append_token(x: Tensor) -> ModuleType | None:
    """The module `triton.append_token` for tensors on a GPU; None where torch does its work, in more launches."""
    return _triton("triton.attention.append_token", x)


def _triton(name: str, x: Tensor) -> ModuleType | None:
    """A kernel module that needs triton, for a tensor on a GPU; None where triton is not installed."""
    return None if x.device.type == "cpu" else _import(name)


@cache
def _import(name: str) -> ModuleType | None:
    return None if find_spec("triton") is None else import_module(f"mxcompile.kernels.{name}")
