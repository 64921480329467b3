"""Other projects' experts get the same weights as ours, in their own order."""

import pytest
import torch

pytest.importorskip("triton")

from experts_peers import marlin_order, marlin_parts, marlin_scales, marlin_words
from experts_timing import SHAPES, Layer, make_layer
from gemm_peers import in_a_row, stored

from mxcompile.formats import MXFP4, MXINT4, MXFormat
from mxcompile.numerics.reference import decode, scale_values


@pytest.fixture(params=[MXFP4, MXINT4], ids=str)
def layer(request: pytest.FixtureRequest) -> Layer:
    fmt: MXFormat = request.param
    return make_layer(SHAPES["small-gpt-oss"], fmt, "cpu")


def test_marlin_words_are_the_fragments_of_each_lane() -> None:
    """A lane of a 16 x 8 x 16 matmul has rows 2 * (lane % 4) + (0, 1, 8, 9) of column lane / 4, in two blocks."""
    codes = torch.randint(16, (2, 128, 32), dtype=torch.uint8)
    words = marlin_words(codes)
    assert words.shape == (2, 2, 256)
    for expert, k_tile, block, lane, tile in [(0, 0, 0, 0, 0), (1, 1, 1, 31, 3), (0, 1, 0, 13, 2)]:
        rows = [16 * k_tile + 2 * (lane % 4) + i for i in (0, 1, 8, 9)]
        columns = [64 * block + 16 * tile + lane // 4 + 8 * half for half in (0, 1)]
        fragment = [int(codes[expert, column, row]) for column in columns for row in rows]
        word = int(words[expert, k_tile, 128 * block + 4 * lane + tile]) & 0xFFFFFFFF
        assert [(word >> (4 * i)) & 15 for i in range(8)] == [fragment[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_marlin_orders_lose_nothing() -> None:
    assert sorted(marlin_order().tolist()) == list(range(1024))
    scales = torch.arange(2 * 64 * 4).view(2, 64, 4)
    ordered = marlin_scales(scales)
    assert ordered.shape == (2, 4, 64)
    assert ordered[1, 3].tolist() == [int(scales[1, i + 8 * j, 3]) for i in range(8) for j in range(8)]


def test_marlin_pads_with_zero_weights(layer: Layer) -> None:
    words, scales, bias = marlin_parts(layer.down, 256, 256)
    assert words.shape == (4, 16, 512)
    assert scales.shape == (4, 8, 256)
    assert bias is not None
    zero = 0x88888888 if layer.fmt == MXINT4 else 0
    assert ((words[:, 12:].long() & 0xFFFFFFFF) == zero).all()  # rows 192 to 255 of the input
    assert layer.down.bias is not None
    assert bias.float().sum().item() == pytest.approx(layer.down.bias.float().sum().item(), rel=1e-3)


def test_codes_of_experts_are_the_weights(layer: Layer) -> None:
    codes, steps = stored(layer.up)
    assert codes.shape == layer.up.values.shape
    elements = codes.float() - 8 if layer.fmt == MXINT4 else decode(codes, layer.fmt)
    assert torch.equal(elements * scale_values(steps).repeat_interleave(32, dim=-1), layer.up.values.float())


def test_bytes_of_experts_hold_two_codes_the_lower_first(layer: Layer) -> None:
    codes, _ = stored(layer.down)
    packed = in_a_row(codes, 4)
    assert torch.equal(torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2), codes)
