"""Attention over packed keys and values on a GPU, against its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mxcompile.formats import FORMATS, MXFP8_E4M3, MXINT4, MXINT6, MXINT8, MXFormat, ScaleRule, activation_rule
from mxcompile.numerics import packed_attention as definition
from mxcompile.numerics import reference
from mxcompile.numerics.exact_tokens import ExactTokens, attend_packed_exact
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import QUANTIZE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROUNDING = (MXINT8, ScaleRule.FLOOR)
SHAPES = [(1, 32, 8, 2047, 128), (3, 8, 1, 300, 128), (2, 12, 12, 70, 80), (1, 8, 4, 1025, 256), (5, 8, 4, 33, 64)]


@pytest.fixture(autouse=True)
def counters() -> None:
    from mxcompile.kernels import dispatch

    dispatch.prepare(torch.device("cuda", torch.cuda.current_device()))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def packed(fmt: MXFormat, *shape: int) -> PackedStates:
    return PackedStates(*QUANTIZE(random(*shape), str(fmt), str(activation_rule(fmt))), fmt, shape[-1])


def relative(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], fmt: MXFormat) -> None:
    """With every kind of mask and up to a position; also bit-identical on repeat."""
    from mxcompile.kernels.triton.attention import packed_attention

    torch.manual_seed(0)
    batch, heads, shared, tokens, size = shape
    query = random(batch, 1, heads, size).transpose(1, 2) * torch.tensor(2.0**-30, device="cuda").bfloat16()
    keys, values = (packed(fmt, batch, shared, tokens, size) for _ in range(2))
    left = torch.rand(batch, 1, 1, tokens, device="cuda") < 0.7
    left[..., :2] = True
    bias = random(batch, heads, 1, tokens)
    for mask, position in ((None, None), (left, None), (left, tokens // 2), (bias, 0), (bias, tokens + 5)):
        at = None if position is None else torch.tensor([position], device="cuda")
        assert packed_attention.supports(query, keys, values, mask) is None
        y = packed_attention.attend(query, keys, values, mask, 2.0**28, position=at)
        expected = definition.attend_packed(query, keys, values, mask, 2.0**28, at)
        assert relative(y, expected) <= 5e-3, (mask is None, position)
        for _ in range(3):
            assert torch.equal(packed_attention.attend(query, keys, values, mask, 2.0**28, position=at), y)


@pytest.mark.parametrize("fmt", [MXINT8, MXFP8_E4M3, MXINT6, MXINT4], ids=str)
@pytest.mark.parametrize("place", [0, 700, 1499])
def test_the_next_token(place: int, fmt: MXFormat) -> None:
    """Its bytes are those of the definition, and later tokens are not read: they hold NaN."""
    from mxcompile.kernels import dispatch

    torch.manual_seed(1)
    states = tuple(packed(fmt, 2, 2, 1500, 128) for _ in range(2))
    for side in states:
        side.scales[:, :, place + 1 :] = 255
    query, key, value = (random(2, 1, heads, 128).transpose(1, 2) for heads in (8, 2, 2))
    angles = 6 * torch.rand(1, 1, 1, 64, device="cuda").repeat(1, 1, 1, 2)
    rope, position = (angles.cos().bfloat16(), angles.sin().bfloat16()), torch.tensor([place], device="cuda")
    rules: Any = [activation_rule(fmt)] * 2
    parts = [part for side in states for part in (side.elements, side.scales)]
    before = [part.clone() for part in parts]
    turned = definition.append_packed(query, (key, value), states, rules, position, rope)
    after = [part.clone() for part in parts]
    filled = [
        PackedStates(side.elements[:, :, : place + 1], side.scales[:, :, : place + 1], fmt, 128) for side in states
    ]
    expected = definition.attend_packed(turned, filled[0], filled[1], None, 0.1)
    for part, old in zip(parts, before, strict=True):
        part.copy_(old)
    y = dispatch.attend_packed_next(query, (key, value), states, rules, position, rope, None, 0.1, ROUNDING)
    assert all(torch.equal(a, b) for a, b in zip(parts, after, strict=True))
    assert relative(y, reference.quantize_dequantize(expected, *ROUNDING)) <= 1e-2


@pytest.mark.parametrize("fmt", [MXINT8, MXINT6, MXINT4], ids=str)
@pytest.mark.parametrize(
    ("position", "window", "sink"), [(1400, 32, 4), (2, 32, 4), (0, 32, 0), (1499, 1, 0), (900, 0, 70), (33, 33, 8)]
)
def test_exact_tokens(position: int, window: int, sink: int, fmt: MXFormat) -> None:
    """Packed states have other values than exact ones, so that a token of the wrong kind shows."""
    from mxcompile.kernels import dispatch

    torch.manual_seed(3)
    shape = (2, 2, 1500, 128)
    key, value = random(*shape), random(*shape)
    states = tuple(PackedStates(*QUANTIZE(3 * x, str(fmt), str(activation_rule(fmt))), fmt, 128) for x in (key, value))
    query, turned = (random(2, 1, 8, 128).transpose(1, 2) for _ in range(2))
    room = window - 1 + 32 if window > 1 else 0
    places = torch.arange(max(0, position - room), position, device="cuda")
    held = torch.full((room,), -1, device="cuda")
    held[places % max(1, room)] = places
    if window > 8 and position > 8:
        held[(position - 8) % room] = position + 1  # that token and those before are read rounded
    exact: list[Any] = []
    for part in (key, value):
        newest = torch.full((2, 2, room, 128), torch.nan, device="cuda").bfloat16() if room else None
        if newest is not None:
            newest[:, :, places % room] = part[:, :, places]
        exact.append(ExactTokens(part[:, :, position : position + 1], newest, part[:, :, :sink] if sink else None))
    mask = torch.rand(2, 1, 1, 1500, device="cuda") < 0.7
    mask[..., position] = True
    rest = (torch.tensor([position], device="cuda"), window, mask, 0.1)
    y = dispatch.attend_packed_exact(query, turned, states, (exact[0], exact[1]), held, *rest)
    expected = attend_packed_exact(query, turned, states, (exact[0], exact[1]), held, *rest)
    assert relative(y, expected) <= 5e-3
    for _ in range(3):
        again = dispatch.attend_packed_exact(query, turned, states, (exact[0], exact[1]), held, *rest)
        assert torch.equal(again, y)


@pytest.mark.parametrize("splits", [1, 2, 33, 66])
def test_in_a_cuda_graph(splits: int) -> None:
    from mxcompile.kernels.triton.attention import packed_attention
    from mxcompile.kernels.triton.attention.one_token import Config

    torch.manual_seed(2)
    query, keys, values = random(1, 32, 1, 128), packed(MXINT4, 1, 8, 5000, 128), packed(MXINT8, 1, 8, 5000, 128)
    config = Config(splits, 64, 4, 3, dependent=torch.cuda.get_device_capability() >= (9, 0))
    y = packed_attention.attend(query, keys, values, None, 0.1, config)
    assert relative(y, definition.attend_packed(query, keys, values, None, 0.1)) <= 5e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed_attention.attend(query, keys, values, None, 0.1, config)
    for _ in range(3):
        captured.fill_(1)
        graph.replay()
        assert torch.equal(captured, y)
