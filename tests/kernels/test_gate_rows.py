"""triton/gate_rows.py in Triton's interpreter: the gate against float64, its rounding bit for bit."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.formats import MXFP4, MXFP8_E4M3, MXINT8, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate

# exp overflows to Inf, and 1 / Inf is the limit that is meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
GATES = (
    Gate(),
    Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True),
    Gate("gelu"),
    Gate("gelu_tanh", interleaved=True),
    Gate("relu"),
)
ROUNDINGS = (
    (MXFP4, ScaleRule.FLOOR),
    (MXINT8, ScaleRule.EVEN),
    (MXFP8_E4M3.with_block(64), ScaleRule.RCEIL),
    (MXFP4.with_block(16), ScaleRule.CEIL),
)


def rows(slots: int, inner: int) -> Tensor:
    x = torch.randn(slots, 2 * inner, generator=torch.Generator().manual_seed(inner)) * 4
    x[0] *= 8
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gate(interpreted: SimpleNamespace, gate: Gate) -> None:
    y = rows(32, 70)
    h = interpreted.gate_rows.gate_rows(y, torch.tensor([2], dtype=torch.int32), 16, gate, None)
    exact = gate(y.double())
    # 1 + erf(x) and the like cancel for large negative x: an error of the size of the product times float32's.
    product = dataclasses.replace(gate, function="relu", limit=None)(y.double().abs())
    assert (h.shape, h.dtype) == ((32, 70), torch.bfloat16)
    assert ((h.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-22 * product).all()


@pytest.mark.parametrize(("rounding", "gate"), crossed(ROUNDINGS, GATES), ids=str)
def test_rounding_is_that_of_the_reference(
    interpreted: SimpleNamespace,
    assert_same_bits: Callable[..., None],
    rounding: tuple[MXFormat, ScaleRule],
    gate: Gate,
) -> None:
    y, used = rows(16, 200), torch.tensor([1], dtype=torch.int32)
    plain = interpreted.gate_rows.gate_rows(y, used, 16, gate, None)
    rounded = interpreted.gate_rows.gate_rows(y, used, 16, gate, rounding)
    assert_same_bits(rounded, reference.quantize_dequantize(plain, *rounding))


def test_touches_only_rows_in_use(interpreted: SimpleNamespace, accesses: ...) -> None:
    """Also NaN, which stays NaN in its block."""
    y, used = rows(48, 1100), torch.tensor([2], dtype=torch.int32)
    y[0, 5], y[1, 1105] = torch.nan, torch.nan
    h = interpreted.gate_rows.gate_rows(y, used, 16, Gate(limit=7.0), None)
    stores = torch.from_numpy(accesses.stores[0].astype("int64"))
    assert sum(map(len, accesses.stores)) == 32 * 1100
    assert stores.min().item() == h.data_ptr()
    assert h[0, 5].isnan()
    assert h[1, 5].isnan()
    assert int(h[:32].isnan().sum()) == 2
