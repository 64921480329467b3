"""Mixtures of experts on the CPU (mx_cpu_experts.cpp): the experts that tokens chose, packed and row-major.

    grouped_linear: y[r * k + j] = x[r] @ W[experts[r, j]].T + bias[experts[r, j]]
    experts:        the sum over j of weights[r, j] * down(rounded(gate(up(x[r]))))

Only chosen experts are read, in one parallel region of one C++ call for all of them. An expert with few choices is
multiplied as it is packed. One with more is decoded eight rows at a time and multiplied as bfloat16 pairs; where the
processor or the dtype of x does not allow that, it is decoded alone, into the buffer of `linears.py`, and torch
multiplies.

The value between the two matmuls is rounded to the dtype of x as torch does, then to the MX format, bit for bit as
`reference.quantize_dequantize` does. Float16 inputs are computed in float32 throughout. The weighted sum is float32.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule
from mxcompile.kernels.cpu import linears
from mxcompile.kernels.cpu.build import BuildError, experts_library, library
from mxcompile.kernels.cpu.linears import PackedWeight
from mxcompile.numerics.gates import Gate

MAX_CHOICES = 8
"""Choices of one expert that are multiplied as it is packed, where torch multiplies the others."""
_FUNCTIONS = ("swish", "gelu", "gelu_tanh", "relu")


def supports(x: Tensor, fmt: MXFormat) -> str | None:
    """None if `grouped_linear` and `experts` support x and the format of the experts, else the reason."""
    return linears.supports(x, fmt) or _why_no_library()


def supports_rounding(x: Tensor, rounding: tuple[MXFormat, ScaleRule] | None) -> str | None:
    """None if `experts` supports this rounding between the matmuls, else the reason."""
    if rounding is not None and rounding[0].aligned:
        return "the CPU kernel does not align activations"
    return rounding and linears.supports_rounding(x, *rounding)


def grouped_linear(x: Tensor, experts: Tensor, weight: PackedWeight, fmt: MXFormat) -> Tensor:
    """x `[rows, in]`, experts int `[rows, k]`; elements `[E, out, bytes]`, bias `[E, out]` or None.

    Returns `[rows * k, out]` in the dtype of x, zeros where the number is not in `[0, E)`.
    """
    plain_x, chosen, weight = linears.plain(x), _numbers(experts), _plain_weight(weight)
    choices = None if _takes_many(plain_x, fmt) else _sorted_choices(chosen, len(weight[0]))
    if choices is None:
        y = _multiply(plain_x, chosen, weight, fmt)
    else:
        y = choices.restore(_multiply_sorted(plain_x[choices.rows], choices, weight, fmt))
    return y.to(x.dtype)


def experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: tuple[PackedWeight, MXFormat],
    down: tuple[PackedWeight, MXFormat],
    gate: Gate,
    rounding: tuple[MXFormat, ScaleRule] | None = None,
) -> Tensor:
    """x `[tokens, hidden]`, experts and weights `[tokens, k]`; up `[E, 2 * inner, hidden]`, down `[E, hidden, inner]`.

    rounding: of the value between the matmuls. If x is to be rounded, it has been. Returns `[tokens, hidden]`.
    """
    plain_x, chosen, factors = linears.plain(x), _numbers(experts), weights.to(torch.float32).contiguous()
    up, down = (_plain_weight(up[0]), up[1]), (_plain_weight(down[0]), down[1])
    takes_many = _takes_many(plain_x, up[1]) and _takes_many(plain_x, down[1])
    choices = None if takes_many else _sorted_choices(chosen, len(up[0][0]))
    if chosen.numel() == 0:
        return x.new_zeros(len(x), down[0][0].shape[1])
    if choices is None:
        return _in_one_call(plain_x, chosen, factors, up, down, gate, rounding, x.dtype).to(x.dtype)
    channels = _multiply_sorted(plain_x[choices.rows], choices, *up)
    h = _apply_gate(channels, gate)
    if rounding is not None:
        h = linears.plain(linears.quantize_dequantize(h.to(x.dtype), *rounding))
    y = choices.restore(_multiply_sorted(h, choices, *down))
    return (y.unflatten(0, chosen.shape) * factors[..., None]).sum(1).to(x.dtype)


def _in_one_call(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: tuple[PackedWeight, MXFormat],
    down: tuple[PackedWeight, MXFormat],
    gate: Gate,
    rounding: tuple[MXFormat, ScaleRule] | None,
    dtype: torch.dtype,
) -> Tensor:
    """All of it in one C++ call."""
    y = x.new_empty(len(x), down[0][0].shape[1])
    c_rounding, c_round = None, None
    if rounding is not None:
        c_rounding = ctypes.pointer(linears.c_rounding(*rounding, dtype))
        if {up[1].block_size, down[1].block_size} != {rounding[0].block_size}:
            c_round = ctypes.cast(library(rounding[0]).mx_round, ctypes.c_void_p)
    call = _Call(
        _experts(*up, x.shape[1]),
        _experts(*down, up[0][0].shape[1] // 2),
        _gate(gate),
        c_rounding,
        c_round,
        x.data_ptr(),
        chosen.data_ptr(),
        weights.data_ptr(),
        y.data_ptr(),
        *chosen.shape,
        x.dtype == torch.float32,
    )
    experts_library().mx_experts(ctypes.byref(call), torch.get_num_threads())
    return y


def _multiply(x: Tensor, chosen: Tensor, weight: PackedWeight, fmt: MXFormat) -> Tensor:
    """`grouped_linear` in one C++ call."""
    rows, slots = chosen.shape
    y = x.new_empty(rows * slots, weight[0].shape[1])
    if len(y) == 0:
        return y
    experts_library().mx_grouped_linear(
        ctypes.byref(_experts(weight, fmt, x.shape[1])),
        *(ctypes.c_void_p(each.data_ptr()) for each in (x, chosen, y)),
        ctypes.c_int64(rows),
        ctypes.c_int64(slots),
        x.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return y


@dataclass(frozen=True)
class _SortedChoices:
    """Choices sorted by expert.

    order: int64 `[choices]`, numbers of choices. rows: the row of x of each. numbers: the expert of each, -1 where
    torch multiplies. popular: (expert, begin, end) of those, positions in the sorted order.
    """

    order: Tensor
    rows: Tensor
    numbers: Tensor
    popular: list[tuple[int, int, int]]

    def restore(self, values: Tensor) -> Tensor:
        """Rows `[choices, n]` in the order before sorting."""
        return torch.empty_like(values).index_copy_(0, self.order, values)


def _sorted_choices(chosen: Tensor, count: int) -> _SortedChoices | None:
    """None if no expert has more than MAX_CHOICES; count: the number of experts."""
    rows, slots = chosen.shape
    if rows * slots <= MAX_CHOICES or rows <= linears.MAX_TOKENS:
        return None
    numbers, order = chosen.flatten().sort(stable=True)
    starts: list[int] = torch.searchsorted(numbers, torch.arange(count + 1)).tolist()
    spans = [(expert, *starts[expert : expert + 2]) for expert in range(count)]
    popular = [(expert, begin, end) for expert, begin, end in spans if end - begin > MAX_CHOICES]
    if not popular:
        return None
    for _, begin, end in popular:
        numbers[begin:end] = -1
    return _SortedChoices(order, order // slots, numbers, popular)


def _multiply_sorted(x: Tensor, choices: _SortedChoices, weight: PackedWeight, fmt: MXFormat) -> Tensor:
    """x: a row for each choice, sorted. Experts with few choices in one call, the others one after the other."""
    y = _multiply(x, choices.numbers[:, None], weight, fmt)
    elements, scales, bias = weight
    for expert, begin, end in choices.popular:
        packed = (elements[expert], scales[expert], None if bias is None else bias[expert])
        y[begin:end] = linears.decode_and_multiply(x[begin:end], packed, fmt)
    return y


def _apply_gate(channels: Tensor, gate: Gate) -> Tensor:
    rows, inner = channels.shape[0], channels.shape[1] // 2
    h = channels.new_empty(rows, inner)
    experts_library().mx_gate(
        *(ctypes.c_void_p(each.data_ptr()) for each in (channels, h)),
        ctypes.c_int64(rows),
        ctypes.c_int64(inner),
        ctypes.byref(_gate(gate)),
        h.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return h


def _takes_many(x: Tensor, fmt: MXFormat) -> bool:
    """Whether the C++ kernels multiply many choices of an expert, too: bfloat16 and a processor with its products."""
    return x.dtype == torch.bfloat16 and bool(library(fmt).mx_takes_pairs())


def _numbers(experts: Tensor) -> Tensor:
    return experts.to(torch.int64).contiguous()


def _plain_weight(weight: PackedWeight) -> PackedWeight:
    elements, scales, bias = weight
    return elements.contiguous(), scales.contiguous(), None if bias is None else linears.plain(bias)


def _experts(weight: PackedWeight, fmt: MXFormat, size: int) -> "_Experts":
    elements, scales, bias = weight
    return _Experts(
        elements.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        *elements.shape[:2],
        size,
        linears.kernels(fmt),
        bias is not None and bias.dtype == torch.float32,
    )


@cache
def _gate(gate: Gate) -> "_Gate":
    limit = float("inf") if gate.limit is None else gate.limit
    return _Gate(_FUNCTIONS.index(gate.function), gate.alpha, limit, gate.shift, gate.interleaved)


def _why_no_library() -> str | None:
    try:
        experts_library()
    except BuildError as error:
        return str(error)
    return None


class _Experts(ctypes.Structure):
    """`Experts` of mx_cpu_experts.cpp."""

    _fields_ = (
        ("elements", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("kernels", ctypes.c_void_p),
        ("wide_bias", ctypes.c_int),
    )


class _Gate(ctypes.Structure):
    """`Gate` of mx_cpu_gate.h."""

    _fields_ = (
        ("function", ctypes.c_int),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("interleaved", ctypes.c_int),
    )


class _Call(ctypes.Structure):
    """`ExpertsCall` of mx_cpu_experts.cpp."""

    _fields_ = (
        ("up", _Experts),
        ("down", _Experts),
        ("gate", _Gate),
        ("rounding", ctypes.POINTER(linears.Rounding)),
        ("round", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("wide", ctypes.c_int),
    )
