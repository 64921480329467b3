"""attention/append_packed.py in Triton's interpreter: the bits of rotation, `mx::quantize` and a copy to the cache."""

from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXFP4, MXINT8, MXFormat, ScaleRule, activation_rule
from mxcompile.numerics.next_token import rotate
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import QUANTIZE

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def empty(batch: int, kv_heads: int, tokens: int, size: int, fmt: MXFormat) -> PackedStates:
    blocks = fmt.blocks(size)
    sizes = (blocks * fmt.block_bytes, blocks)
    elements, scales = (torch.full((batch, kv_heads, tokens, n), 77, dtype=torch.uint8) for n in sizes)
    return PackedStates(elements, scales, fmt, size)


def written(states: PackedStates, new: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Elements and scales after the reference's write."""
    expected = states.elements.clone(), states.scales.clone()
    packed = QUANTIZE(new, str(states.fmt), str(activation_rule(states.fmt)))
    for part, rows in zip(expected, packed, strict=True):
        part[:, :, place] = rows[:, :, 0]
    return expected


@pytest.mark.parametrize(
    ("fmt", "shape", "turns"),
    crossed(FORMATS.values(), [(2, 3, 1, 80), (1, 8, 2, 128), (2, 4, 4, 64)], [True, False]),
    ids=str,
)
def test_bit_for_bit(interpreted: SimpleNamespace, fmt: MXFormat, shape: tuple[int, ...], turns: bool) -> None:
    batch, heads, kv_heads, size = shape
    generator = torch.Generator().manual_seed(size)
    for dtype in DTYPES:
        query, key, value = (
            (torch.randn(batch, 1, n, size, generator=generator) * 3).to(dtype).transpose(1, 2)
            for n in (heads, kv_heads, kv_heads)
        )
        angles = 6 * torch.rand(1, 1, 1, size // 2, generator=generator).repeat(batch, 1, 1, 2)
        rotation = (angles.cos().to(dtype), angles.sin().to(dtype)) if turns else None
        states = (empty(batch, kv_heads, 9, size, fmt), empty(batch, kv_heads, 9, size, MXINT8))
        rules = (activation_rule(fmt), ScaleRule.FLOOR)
        keys = key if rotation is None else interpreted_rotation(key, rotation)
        expected = [written(side, part, 5) for side, part in zip(states, (keys, value), strict=True)]
        append = interpreted.append_packed.append
        turned = append(query, (key, value), states, rules, torch.tensor([5]), rotation)
        for side, parts in zip(states, expected, strict=True):
            assert torch.equal(side.elements, parts[0])
            assert torch.equal(side.scales, parts[1])
        exact = query if rotation is None else interpreted_rotation(query, rotation)
        assert torch.equal(turned, exact)


def interpreted_rotation(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """The kernel adds the products in the order of the definition, each rounded to float32."""
    return rotate(x, *rotation)


@pytest.mark.filterwarnings("ignore:invalid value")  # NaN as an integer, in the interpreter of Triton 3.6
def test_values_of_every_kind(interpreted: SimpleNamespace, nasty_blocks: ...) -> None:
    """Thresholds of the rules, subnormals, Inf and NaN, in states of 32 blocks."""
    append, size = interpreted.append_packed.append, 32 * 32
    for fmt in FORMATS.values():
        blocks = nasty_blocks(fmt, torch.float32)
        blocks = torch.cat([blocks, blocks[: -len(blocks) % 32]])
        key = blocks.reshape(-1, 1, 1, size)
        for rules in ((ScaleRule.FLOOR, ScaleRule.EVEN), (ScaleRule.RCEIL, activation_rule(fmt))):
            states = (empty(len(key), 1, 1, size, fmt), empty(len(key), 1, 1, size, fmt))
            append(torch.zeros_like(key), (key, key), states, rules, torch.tensor(0), None)
            for side, rule in zip(states, rules, strict=True):
                expected = QUANTIZE(key, str(fmt), str(rule))
                assert torch.equal(side.scales, expected[1]), (fmt, rule)
                assert torch.equal(side.elements, expected[0]), (fmt, rule)


def test_nothing_is_written_outside(interpreted: SimpleNamespace) -> None:
    part = torch.ones(1, 2, 1, 64)
    for place in (9, -1):
        states = (empty(1, 2, 9, 64, MXFP4), empty(1, 2, 9, 64, MXINT8))
        rules = (ScaleRule.FLOOR, ScaleRule.FLOOR)
        interpreted.append_packed.append(part, (part, part), states, rules, torch.tensor(place), None)
        for side in states:
            assert (side.elements == 77).all()
            assert (side.scales == 77).all()


def test_shapes_that_do_not_fit(interpreted: SimpleNamespace) -> None:
    part, states = torch.ones(1, 2, 1, 64), (empty(1, 2, 9, 64, MXINT8), empty(1, 2, 9, 64, MXINT8))
    append, rules = interpreted.append_packed.append, (ScaleRule.FLOOR, ScaleRule.FLOOR)
    with pytest.raises(MXCompileError, match="cannot be written"):
        append(part, (part, part[:, :1]), states, rules, torch.tensor(0), None)
    with pytest.raises(MXCompileError, match="the position one number"):
        append(part, (part, part), states, rules, torch.arange(2), None)
    with pytest.raises(MXCompileError, match="cos and sin"):
        append(part, (part, part), states, rules, torch.tensor(0), (part, part))
    assert "mse" in interpreted.append_packed.supports(part, states[0], ScaleRule.MSE)
    assert "need a CUDA device" in interpreted.append_packed.supports(part, states[0], ScaleRule.FLOOR)
