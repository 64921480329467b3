"""Attention over packed keys and values: that of the decoded ones in float64, and the operator as it is in graphs."""

import pytest
import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXINT4, MXINT8, MXFormat, activation_rule
from mxcompile.numerics.next_token import rotate
from mxcompile.numerics.packed_attention import PackedStates, attend_packed
from mxcompile.ops import ATTEND_PACKED, ATTEND_PACKED_NEXT, DEQUANTIZE, QUANTIZE, QUANTIZE_DEQUANTIZE


def packed(states: Tensor, fmt: MXFormat) -> PackedStates:
    return PackedStates(*QUANTIZE(states, str(fmt), str(activation_rule(fmt))), fmt, states.shape[-1])


def tensors(batch: int, heads: int, kv_heads: int, queries: int, tokens: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (batch, heads, queries, size), (batch, kv_heads, tokens, size), (batch, kv_heads, tokens, size)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def in_float64(query: Tensor, keys: PackedStates, values: PackedStates, mask: Tensor | None, scale: float) -> Tensor:
    group = query.shape[1] // keys.elements.shape[1]
    key, value = (
        DEQUANTIZE(each.elements, each.scales, str(each.fmt), each.size, torch.float32)
        .double()
        .repeat_interleave(group, 1)
        for each in (keys, values)
    )
    added = torch.zeros(()) if mask is None else mask.double()
    if mask is not None and mask.dtype == torch.bool:
        added = torch.where(mask, 0.0, -torch.inf)
    return ((query.double() @ key.mT * scale + added).softmax(-1).nan_to_num() @ value).to(query.dtype)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 2, 1, 70, 128), (2, 3, 1, 4, 33, 80), (1, 2, 2, 1, 1, 64)], ids=str)
def test_is_attention_over_decoded_states(fmt: MXFormat, shape: tuple[int, ...]) -> None:
    query, key, value = tensors(*shape)
    keys, values = packed(key, fmt), packed(value, MXINT8)
    y = attend_packed(query, keys, values, None, 0.2)
    torch.testing.assert_close(y, in_float64(query, keys, values, None, 0.2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float", "of heads"])
def test_masks(kind: str) -> None:
    query, key, value = tensors(3, 4, 2, 2, 40, 32)
    keys, values = packed(key, MXINT8), packed(value, MXINT4)
    mask = torch.ones(3, 1, 2, 40, dtype=torch.bool)
    mask[0, ..., :7], mask[1, :, 0, 20:], mask[2, :, 1] = False, False, False
    if kind == "float":
        mask = torch.where(mask, 0.0, -torch.inf)
    elif kind == "of heads":
        mask = torch.randn(3, 4, 2, 40, generator=torch.Generator().manual_seed(0))
    y = attend_packed(query, keys, values, mask, 0.2)
    torch.testing.assert_close(y, in_float64(query, keys, values, mask, 0.2), rtol=1e-5, atol=1e-5)
    if kind != "of heads":
        assert (y[2, :, 1] == 0).all()


def test_a_block_with_nan_makes_its_head_nan() -> None:
    query, key, value = tensors(1, 2, 2, 1, 9, 64)
    value[0, 1, 3, 40] = torch.nan
    y = attend_packed(query, packed(key, MXINT8), packed(value, MXINT8), None, 0.2)
    assert y[0, 0].isfinite().all()
    assert y[0, 1, 0, :32].isfinite().all()
    assert y[0, 1, 0, 32:].isnan().all()


def test_the_operator_is_its_definition_in_every_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        query, key, value = (part.to(dtype) for part in tensors(2, 4, 2, 1, 50, 64))
        keys, values = packed(key, MXINT8), packed(value, MXINT4)
        parts = (keys.elements, keys.scales, values.elements, values.scales)
        args = (query, *parts, None, 0.2, "mxint8", "mxint4", 64)
        y = ATTEND_PACKED(*args)
        assert (y.dtype, y.shape) == (dtype, (2, 4, 1, 64))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, attend_packed(query, keys, values, None, 0.2), rtol=2 * eps, atol=1e-6)
        torch.library.opcheck(ATTEND_PACKED, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("turns", [True, False])
def test_the_next_token_is_rotated_rounded_written_and_attended_to(turns: bool) -> None:
    query, key, value = tensors(2, 4, 2, 1, 12, 64)
    keys, values = packed(key, MXINT8), packed(value, MXINT4)
    new = [part[:, :, 3:4] + 1 for part in (key, value)]
    angles = torch.linspace(0, 3, 32).repeat(2).view(1, 1, 1, 64)
    rotation = (angles.cos(), angles.sin()) if turns else (None, None)
    states = [part for each in (keys, values) for part in (each.elements, each.scales)]
    expected = [part.clone() for part in states]
    turned = [rotate(part, angles.cos(), angles.sin()) if turns else part for part in (query, new[0])]
    for i, (part, fmt) in enumerate(((turned[1], "mxint8"), (new[1], "mxint4"))):
        for into, rows in zip(expected[2 * i : 2 * i + 2], QUANTIZE(part, fmt, "floor"), strict=True):
            into[:, :, 7] = rows[:, :, 0]
    mask = torch.arange(12) <= 7
    formats = ("mxint8", "floor", "mxint4", "floor", "mxfp8_e4m3", "even")
    args = (query, *new, *states, torch.tensor([7]), *rotation, mask, 0.2, *formats)
    torch.library.opcheck(ATTEND_PACKED_NEXT, args, test_utils=("test_schema", "test_faketensor"))
    y = ATTEND_PACKED_NEXT(*args)
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    plain = ATTEND_PACKED(turned[0], *expected, mask, 0.2, "mxint8", "mxint4", 64)
    assert torch.equal(y, QUANTIZE_DEQUANTIZE(plain, "mxfp8_e4m3", "even"))


def test_shapes_that_do_not_fit_are_named() -> None:
    query, key, value = tensors(1, 4, 2, 1, 10, 64)
    keys, values = packed(key, MXINT8), packed(value, MXINT8)
    shorter = packed(value[:, :, 1:], MXINT8)
    wrong_scales = PackedStates(keys.elements, keys.scales[..., :1], MXINT8, 64)
    wrong_format = PackedStates(keys.elements, keys.scales, MXINT4, 64)
    for given, match in (
        ((query, keys, shorter), "cannot attend"),
        ((query[:, :3], keys, values), "cannot share"),
        ((query[..., :32], keys, values), "cannot share"),
        ((query, wrong_scales, values), "are not 64 bytes, 1 scales"),
        ((query, wrong_format, values), "are not 64 bytes"),
        ((query, PackedStates(keys.elements, keys.scales[:, :, 1:], MXINT8, 64), values), "do not fit"),
    ):
        with pytest.raises(MXCompileError, match=match):
            attend_packed(*given, None, 1.0)
