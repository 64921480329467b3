"""mx::norm, mx::add_norm, mx::gate_product and mx::attend_next: the composition, in schema and on fake tensors."""

import pytest
import torch

from mxcompile.formats import MXINT8, ScaleRule
from mxcompile.numerics import next_token, reference
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.norms import Norm
from mxcompile.ops import ADD_NORM, ATTEND_NEXT, GATE_PRODUCT, NORM

ROUNDING = (MXINT8, ScaleRule.FLOOR)
TEXTS = ("mxint8", "floor")
RMS = Norm(1e-6, narrowed=True)


def test_norms_and_gates():
    x, residual, weight = torch.randn(3, 2, 64), torch.randn(3, 2, 64), torch.randn(64)
    total, y = ADD_NORM(x, residual, weight, None, str(RMS), *TEXTS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, reference.quantize_dequantize(RMS(x + residual, weight, None), *ROUNDING))
    assert torch.equal(NORM(total, weight, None, str(RMS), *TEXTS), y)
    product = GATE_PRODUCT(x, residual, "swish", *TEXTS)
    assert torch.equal(product, reference.quantize_dequantize(Gate()(torch.cat([x, residual], -1)), *ROUNDING))
    for op, args in (
        (ADD_NORM, (x, residual, weight, weight, str(RMS), *TEXTS)),
        (NORM, (x, None, None, str(RMS), *TEXTS)),
        (GATE_PRODUCT, (x, residual, "gelu", *TEXTS)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def step(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 1, 32), (2, 2, 1, 32), (2, 2, 1, 32), (2, 2, 9, 32), (2, 2, 9, 32)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    angles = torch.randn(1, 1, 1, 16, generator=generator).repeat(1, 1, 1, 2)
    return [*tensors, torch.tensor(5), angles.cos().to(dtype), angles.sin().to(dtype), torch.arange(9) <= 5, 0.2]


@pytest.mark.parametrize("rotates", [True, False])
def test_the_next_token(rotates):
    """Against float64; the cache has the rotated key at its place, and is as before elsewhere."""
    query, key, value, keys, values, place, cos, sin, mask, scale = step()
    cos, sin = (cos, sin) if rotates else (None, None)
    before = keys.clone()
    y = ATTEND_NEXT(query, key, value, keys, values, place, cos, sin, mask, scale, None, None)
    wide = [part.double() for part in (query, key)]
    if rotates:
        half = [torch.cat([-part[..., 16:], part[..., :16]], -1) for part in wide]
        wide = [part * cos + other * sin for part, other in zip(wide, half, strict=True)]
    assert (keys[:, :, 5:6] - wide[1]).abs().max() <= 1e-6
    assert torch.equal(values[:, :, 5:6], value)
    assert torch.equal(keys[:, :, [0, 4, 6, 8]], before[:, :, [0, 4, 6, 8]])
    scores = wide[0] @ keys[:, :, :6].double().repeat_interleave(2, 1).mT * scale
    expected = scores.softmax(-1) @ values[:, :, :6].double().repeat_interleave(2, 1)
    assert (y - expected).abs().max() <= 1e-5


def test_the_next_token_rounded_and_its_schema():
    *args, scale = step(torch.bfloat16)
    copy = [part.clone() for part in args]
    y = ATTEND_NEXT(*args, scale, *TEXTS)
    unrounded = ATTEND_NEXT(*copy, scale, None, None)
    assert torch.equal(y, reference.quantize_dequantize(unrounded, *ROUNDING))
    torch.library.opcheck(ATTEND_NEXT, (*args, scale, *TEXTS), test_utils=("test_schema", "test_faketensor"))


def test_rope_turns_pairs_of_halves():
    """By an angle: lengths of pairs stay, and the angle is that of cos and sin."""
    x, angle = torch.randn(5, 32), torch.full((32,), 0.7)
    first, second = next_token.rotate(x, angle.cos(), angle.sin()).chunk(2, -1)
    turned = torch.complex(*x.chunk(2, -1)) * torch.exp(torch.tensor(0.7j))
    torch.testing.assert_close(torch.complex(first, second), turned, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("index", "bad", "message"),
    [
        (1, torch.zeros(2, 2, 2, 32), "do not fit the cache"),
        (0, torch.zeros(2, 4, 2, 32), "one query"),
        (5, torch.zeros(2, dtype=torch.int64), "one number"),
        (7, None, "given together"),
    ],
)
def test_fake_tensors_of_the_wrong_shape(index, bad, message):
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = step()
    args[index] = bad
    with pytest.raises(RuntimeError, match=message), FakeTensorMode(allow_non_fake_inputs=True):
        ATTEND_NEXT(*args, None, None)
