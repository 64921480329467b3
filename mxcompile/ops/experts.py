"""Matmuls by the experts of a 3-D weight that were chosen for each token; see `numerics/experts.py`."""

from collections.abc import Sequence

from torch import Tensor
from torch import _check as check  # pyright: ignore[reportPrivateUsage] - documented API

from mxcompile.kernels import dispatch
from mxcompile.numerics.gates import parse_gate
from mxcompile.ops.library import define, format_of, rounding_of, scaling_of
from mxcompile.ops.linears import fake_dequantize, fake_quantize_dequantize


def grouped_linear(
    x: Tensor,
    experts: Tensor,
    elements: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
    planes: Sequence[int] | None = None,
) -> Tensor:
    """Rows of x times the experts chosen for them: x `[rows, in]`, experts (integers) `[rows, k]`, elements
    `[E, out, bytes]`, bias `[E, out]`; returns `[rows * k, out]`."""
    return dispatch.grouped_linear(x, experts, (elements, scales, bias), format_of(format), scaling_of(planes))


def experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    up_bias: Tensor | None,
    down: Sequence[Tensor],
    down_bias: Tensor | None,
    up_format: str,
    down_format: str,
    gate: str,
    activation: str | None,
    rule: str | None,
    up_planes: Sequence[int] | None = None,
    down_planes: Sequence[int] | None = None,
) -> Tensor:
    """x `[tokens, hidden]`, experts and weights `[tokens, k]`, up and down: elements and scales of weights
    `[E, 2 * inner, hidden]` and `[E, hidden, inner]`; returns `[tokens, hidden]`.

    The value after the gate is quantized to `activation` by `rule`, if given.
    """
    first = dispatch.Experts((up[0], up[1], up_bias), format_of(up_format), scaling_of(up_planes))
    second = dispatch.Experts((down[0], down[1], down_bias), format_of(down_format), scaling_of(down_planes))
    return dispatch.experts(x, experts, weights, first, second, parse_gate(gate), rounding_of(activation, rule))


def _fake_grouped_linear(
    x: Tensor,
    experts: Tensor,
    elements: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
    planes: Sequence[int] | None = None,
) -> Tensor:
    fake_dequantize(elements, scales, format, x.shape[-1], x.dtype, planes)
    check(elements.dim() == 3, lambda: f"mx::grouped_linear takes a 3-D weight, not {elements.dim()}-D")
    check(x.dim() == experts.dim() == 2, lambda: "mx::grouped_linear takes rows [rows, in] and experts [rows, k]")
    check(experts.shape[0] == x.shape[0], lambda: f"experts of {experts.shape[0]} rows for {x.shape[0]} rows of x")
    check(bias is None or bias.shape == elements.shape[:2], lambda: "the shape of the bias does not match the weight")
    return x.new_empty((experts.shape[0] * experts.shape[1], elements.shape[1]))


def _fake_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    up_bias: Tensor | None,
    down: Sequence[Tensor],
    down_bias: Tensor | None,
    up_format: str,
    down_format: str,
    gate: str,
    activation: str | None,
    rule: str | None,
    up_planes: Sequence[int] | None = None,
    down_planes: Sequence[int] | None = None,
) -> Tensor:
    parse_gate(gate)
    check((activation is None) == (rule is None), lambda: "activation and rule must be given together")
    check(weights.shape == experts.shape, lambda: "each choice needs one weight")
    gated = _fake_grouped_linear(x, experts, up[0], up[1], up_bias, up_format, up_planes)
    check(gated.shape[1] % 2 == 0, lambda: f"{gated.shape[1]} channels cannot be gates and values")
    inner = gated.new_empty((gated.shape[0], gated.shape[1] // 2))
    if activation is not None and rule is not None:
        inner = fake_quantize_dequantize(inner, activation, rule)
    numbers = experts.reshape(-1, 1)
    y = _fake_grouped_linear(inner, numbers, down[0], down[1], down_bias, down_format, down_planes)
    return y.new_empty((x.shape[0], y.shape[1]))


define(
    "grouped_linear(Tensor x, Tensor experts, Tensor elements, Tensor scales, Tensor? bias, str format, "
    "int[]? planes=None) -> Tensor",
    grouped_linear,
    _fake_grouped_linear,
)
define(
    "experts(Tensor x, Tensor experts, Tensor weights, Tensor[] up, Tensor? up_bias, Tensor[] down, "
    "Tensor? down_bias, str up_format, str down_format, str gate, str? activation, str? rule, "
    "int[]? up_planes=None, int[]? down_planes=None) -> Tensor",
    experts,
    _fake_experts,
)
