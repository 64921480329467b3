"""Rounding of weights and inputs as the lowered model will do it, for searches and training."""

from dataclasses import dataclass

from torch import Tensor

from mxcompile.formats import MXFormat, ScaleRule, activation_rule
from mxcompile.kernels import dispatch
from mxcompile.numerics.importance import round_rows

_OFFSETS = (-1, 0)  # the other scales are rarely best: left to the final rounding


@dataclass(frozen=True)
class Quantizers:
    """What weights and activations will be rounded to; activation None if they stay float."""

    weight: MXFormat
    activation: MXFormat | None

    def round_weight(self, rows: Tensor, importance: Tensor) -> Tensor:
        """A weight `[..., out, in]` as its MX values, with scales for inputs of that importance `[in]`."""
        return round_rows(rows, self.weight, ScaleRule.MSE, importance, _OFFSETS)[0]

    def round_input(self, x: Tensor) -> Tensor:
        """An input `[..., in]` as its MX values."""
        return round_input(self.activation, x)


def round_input(activation: MXFormat | None, x: Tensor) -> Tensor:
    """A matmul's input `[..., in]` as at run time; as it is if activations stay float."""
    if activation is None:
        return x
    return dispatch.quantize_dequantize(x, activation, activation_rule(activation))
