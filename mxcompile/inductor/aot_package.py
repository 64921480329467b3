"""Exported program -> AOTInductor package that needs torch alone: `mx::` operators are decomposed into plain torch.

    mx::grouped_linear(x, experts, w) -> bmm(dequantize(w[experts]), x)

The bytes of the chosen experts are gathered for every choice, so that the graph has no loop over what the data choose.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.errors import CompileError
from mxcompile.inductor.backend import why_no_compiler
from mxcompile.inductor.private_api import aoti_compile_and_package, inductor_config
from mxcompile.numerics.experts import weighted_sum
from mxcompile.numerics.gates import parse_gate
from mxcompile.ops import DEQUANTIZE, EXPERTS, GROUPED_LINEAR, MULTIPLY, QUANTIZE, ROTATE
from mxcompile.ops.linears import dequantize_at_once, multiply, quantize, rotate


def _grouped_linear(
    x: Tensor,
    experts: Tensor,
    elements: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
    planes: Sequence[int] | None = None,
) -> Tensor:
    numbers = experts.reshape(-1)
    exist = (numbers >= 0) & (numbers < elements.shape[0])
    chosen = numbers.clamp(0, elements.shape[0] - 1)
    values = dequantize_at_once(elements[chosen], scales[chosen], format, x.shape[-1], x.dtype, planes)
    rows = x.unsqueeze(1).expand(-1, experts.shape[1], -1).reshape(-1, x.shape[-1], 1)
    y = torch.bmm(values, rows).squeeze(-1)
    y = y if bias is None else y + bias[chosen]
    return torch.where(exist.unsqueeze(1), y, 0.0)


def _experts(
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
    hidden = parse_gate(gate)(_grouped_linear(x, experts, up[0], up[1], up_bias, up_format, up_planes))
    if activation is not None and rule is not None:
        hidden = dequantize_at_once(*quantize(hidden, activation, rule), activation, hidden.shape[-1], hidden.dtype)
    numbers = experts.reshape(-1, 1)
    y = _grouped_linear(hidden, numbers, down[0], down[1], down_bias, down_format, down_planes)
    return weighted_sum(y, weights, x.dtype)


_DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {
    QUANTIZE: quantize,
    DEQUANTIZE: dequantize_at_once,
    MULTIPLY: multiply,
    ROTATE: rotate,
    GROUPED_LINEAR: _grouped_linear,
    EXPERTS: _experts,
}


def write_package(exported: torch.export.ExportedProgram, archive: io.IOBase) -> None:
    """Compile for the device of the program's tensors and write the package.

    Raises CompileError if Inductor cannot compile for that device.
    """
    device = next((tensor.device for tensor in exported.state_dict.values()), torch.device("cpu"))
    if (reason := why_no_compiler(device)) is not None:
        raise CompileError(reason)
    decomposed = exported.run_decompositions(_DECOMPOSITIONS)
    # torch writes the package's metadata into this global setting, which is part of every cache key
    with inductor_config.patch({"aot_inductor.metadata": {}}):
        aoti_compile_and_package(decomposed, package_path=archive)  # pyright: ignore[reportArgumentType] - it accepts an IOBase
