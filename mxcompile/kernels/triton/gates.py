"""The gate between the two matmuls of an expert (numerics/gates.py) on values in registers, inside Triton kernels."""

# ruff: noqa: N803  (upper case marks constexpr arguments, as everywhere in Triton)
# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions. Host code is fully typed.

from typing import Any

import triton
import triton.language as tl

from mxcompile.numerics.gates import Gate


def gate_constants(gate: Gate | None) -> dict[str, Any]:
    """The constexpr arguments that describe a gate: GATE (function, alpha, limit, shift) or None; INTERLEAVED."""
    if gate is None:
        return {"GATE": None, "INTERLEAVED": False}
    return {"GATE": (gate.function, gate.alpha, gate.limit, gate.shift), "INTERLEAVED": gate.interleaved}


@triton.jit
def gated(gate, up, GATE: tl.constexpr):
    """`f(gate) * (up + shift)` in float32; NaN stays NaN."""
    if GATE[2] is not None:
        gate = tl.where(gate > GATE[2], GATE[2], gate)
        up = tl.where(up > GATE[2], GATE[2], up)
        up = tl.where(up < -GATE[2], -GATE[2], up)
    if GATE[3] != 0.0:
        up += GATE[3]
    return activated(gate, GATE) * up


@triton.jit
def activated(gate, GATE: tl.constexpr):
    """`f(gate)` in float32."""
    if GATE[0] == "swish":
        result = gate / (1.0 + tl.exp(-GATE[1] * gate))
    elif GATE[0] == "relu":
        result = tl.where(gate < 0.0, 0.0, gate)
    elif GATE[0] == "gelu":
        result = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    else:
        # tanh(u) = 1 - 2 / (exp(2 u) + 1) with u = sqrt(2 / pi) (x + 0.044715 x**3)
        u = gate * (1.0 + 0.044715 * gate * gate) * 0.7978845608028654
        result = gate * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))
    return result
