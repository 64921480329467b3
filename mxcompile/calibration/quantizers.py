"""Quantize-dequantize of weights and matmul inputs as in the lowered model, for searches and training."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function

from mxcompile.analysis.matmuls import Matmul
from mxcompile.formats import MXFormat, ScaleRule, activation_rule
from mxcompile.graph.program import Program
from mxcompile.kernels import dispatch
from mxcompile.numerics.importance import round_rows

_OFFSETS = (-1, 0)  # other scale exponents are rarely the best; only the final rounding tries them


@dataclass(frozen=True)
class Quantizers:
    """Formats of weights and activations; activation None: float."""

    weight: MXFormat
    activation: MXFormat | None

    def round_weight(self, rows: Tensor, importance: Tensor) -> Tensor:
        """A weight `[..., out, in]` rounded to MX values, with scales chosen by the importance of its inputs `[in]`."""
        return round_rows(rows, self.weight, ScaleRule.MSE, importance, _OFFSETS)[0]

    def round_input(self, x: Tensor) -> Tensor:
        """A matmul's input `[..., in]` rounded to MX values."""
        return round_input(self.activation, x)


def round_input(activation: MXFormat | None, x: Tensor) -> Tensor:
    """A matmul's input `[..., in]` rounded to MX values as at run time; unchanged if activation is None."""
    if activation is None:
        return x
    return dispatch.quantize_dequantize(x, activation, activation_rule(activation))


def input_format(program: Program, matmul: Matmul, default: MXFormat | None) -> MXFormat | None:
    """The format of a matmul's input: the one that a pass has chosen (`program.input_formats`), or the default."""
    return program.input_formats.get(matmul.parameter, default)


def input_roundings(
    program: Program, matmuls: Iterable[Matmul], default: MXFormat | None
) -> dict[Matmul, Callable[[Tensor], Tensor]]:
    """For each matmul the function that rounds its input as at run time, the same object for the same format."""
    formats = {matmul: input_format(program, matmul, default) for matmul in matmuls}
    functions = {fmt: partial(round_input, fmt) for fmt in {*formats.values()}}
    return {matmul: functions[fmt] for matmul, fmt in formats.items()}


def trainable_roundings(
    roundings: Mapping[Matmul, Callable[[Tensor], Tensor]],
) -> dict[Matmul, Callable[[Tensor], Tensor]]:
    """The same functions with gradients that pass the rounding (`straight_through`), one object for each of them."""
    functions = {function: partial(straight_through, function) for function in {*roundings.values()}}
    return {matmul: functions[function] for matmul, function in roundings.items()}


def straight_through(prepare: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """prepare(x) in the forward pass, the identity in the backward pass (straight-through estimator)."""
    return _StraightThrough.apply(prepare, x)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class _StraightThrough(Function):
    """Rounded exactly: x + (prepare(x) - x) would not be MX values to the last bit."""

    @staticmethod
    def forward(ctx: Any, prepare: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        rounded = prepare(x)
        return x.view_as(x) if rounded is x else rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return None, gradient
