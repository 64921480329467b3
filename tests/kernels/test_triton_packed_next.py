"""attention/packed_attention.py with a new token, in Triton's interpreter: what is written has the bits of rotation,
`mx::quantize` and a copy to the cache, and the result is that of attention over it."""

from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXFP4, MXINT8, MXFormat, ScaleRule, activation_rule, parse_format
from mxcompile.numerics import packed_attention as definition
from mxcompile.numerics.next_token import rotate
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import QUANTIZE

ROUNDING = (MXINT8, ScaleRule.FLOOR)


def packed(states: Tensor, fmt: MXFormat) -> PackedStates:
    return PackedStates(*QUANTIZE(states, str(fmt), str(activation_rule(fmt))), fmt, states.shape[-1])


def copied(side: PackedStates) -> PackedStates:
    return PackedStates(side.elements.clone(), side.scales.clone(), side.fmt, side.size)


def same_bytes(first: PackedStates, second: PackedStates) -> bool:
    return torch.equal(first.elements, second.elements) and torch.equal(first.scales, second.scales)


@pytest.mark.parametrize(
    ("fmt", "shape", "place"),
    crossed(
        FORMATS.values(),
        [(2, 3, 1, 80), (1, 8, 2, 128), (2, 4, 4, 64), (1, 8, 4, 256), (1, 2, 1, 32)],
        [0, 31, 32, 69],
    ),
    ids=str,
)
def test_the_step_is_that_of_the_definition(
    interpreted: SimpleNamespace, fmt: MXFormat, shape: tuple[int, ...], place: int
) -> None:
    """Bytes bit for bit; the result is what the kernel gives for the rotated query and the written cache."""
    batch, heads, kv_heads, size = shape
    kernel, config = interpreted.packed_attention, interpreted.one_token.Config
    generator = torch.Generator().manual_seed(size + place)

    def random(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * 3).bfloat16()

    query, key, value = (random(batch, 1, n, size).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
    angles = 6 * torch.rand(batch, 1, 1, size // 2, generator=generator).repeat(1, 1, 1, 2)
    states = [packed(random(batch, kv_heads, 70, size), each) for each in (fmt, MXINT8)]
    rules = (activation_rule(fmt), ScaleRule.FLOOR)
    mask, at = torch.rand(batch, 1, 1, 70, generator=generator) < 0.8, torch.tensor([place])
    rotated = angles.cos().bfloat16(), angles.sin().bfloat16()
    for rotation, all_splits in ((rotated, (1, 3)), (None, (3,))):
        expected = [copied(side) for side in states]
        turned = definition.append_packed(query, (key, value), (expected[0], expected[1]), rules, at, rotation)
        assert rotation is None or torch.equal(turned, rotate(query, *rotation))
        assert kernel.why_not_written(query, (key, value), states, rules, rotation) is None
        for splits in all_splits:
            held = [copied(side) for side in states]
            new = kernel.Next(key, value, rules, rotation)
            y = kernel.attend(query, *held, mask, 0.2, config(splits, 32), ROUNDING, at, new=new)
            assert all(map(same_bytes, held, expected))
            again = kernel.attend(turned, *expected, mask, 0.2, config(splits, 32), ROUNDING, at)
            assert torch.equal(y, again), (rotation is None, splits)


@pytest.mark.filterwarnings("ignore:overflow")  # values of 3e38 are attended to
@pytest.mark.filterwarnings("ignore:invalid value")  # NaN as an integer, in the interpreter of Triton 3.6
@pytest.mark.parametrize("rules", [(ScaleRule.FLOOR, ScaleRule.EVEN), (ScaleRule.RCEIL, ScaleRule.FLOOR)], ids=str)
@pytest.mark.parametrize(
    "fmt", [pytest.param(fmt, marks=[] if fmt in (MXFP4, MXINT8) else [pytest.mark.slow]) for fmt in FORMATS.values()]
)
def test_values_of_every_kind(
    interpreted: SimpleNamespace, nasty_blocks: ..., fmt: MXFormat, rules: tuple[ScaleRule, ScaleRule]
) -> None:
    """Thresholds of the rules, subnormals, Inf and NaN, eight blocks a head."""
    blocks, kernel = nasty_blocks(fmt, torch.bfloat16), interpreted.packed_attention
    key = torch.cat([blocks, blocks[: -len(blocks) % 8]]).reshape(-1, 1, 1, 256)
    states, new = [packed(torch.ones_like(key), fmt) for _ in range(2)], kernel.Next(key, key, rules, None)
    kernel.attend(torch.zeros_like(key), *states, None, 0.2, position=torch.tensor(0), new=new)
    for side, rule in zip(states, rules, strict=True):
        expected = QUANTIZE(key, str(fmt), str(rule))
        assert torch.equal(side.scales, expected[1])
        assert torch.equal(side.elements, expected[0])


@pytest.mark.parametrize("place", [9, -1])
def test_nothing_is_written_outside(interpreted: SimpleNamespace, place: int) -> None:
    kernel, ones = interpreted.packed_attention, torch.ones(1, 2, 1, 64).bfloat16()
    states = [packed(torch.zeros(1, 2, 9, 64).bfloat16(), fmt) for fmt in (MXFP4, MXINT8)]
    before = [copied(side) for side in states]
    new = kernel.Next(ones, ones, (ScaleRule.FLOOR, ScaleRule.FLOOR), None)
    y = kernel.attend(ones, *states, None, 0.2, position=torch.tensor(place), new=new)
    assert all(map(same_bytes, states, before))
    assert (y == 0).all()


def test_what_cannot_be_written(interpreted: SimpleNamespace) -> None:
    kernel, ones, at = interpreted.packed_attention, torch.ones(1, 2, 1, 64).bfloat16(), torch.tensor(0)
    states, rules = [packed(torch.ones(1, 2, 9, 64).bfloat16(), MXINT8)] * 2, (ScaleRule.FLOOR, ScaleRule.FLOOR)
    for key, rotation, position, message in (
        (ones[:, :1], None, at, "cannot be written"),
        (ones.float(), None, at, "cannot be written"),
        (ones, None, torch.arange(2), "one position"),
        (ones, None, None, "one position"),
        (ones, (ones, ones), at, "cos and sin"),
    ):
        new = kernel.Next(key, ones, rules, rotation)
        with pytest.raises(MXCompileError, match=message):
            kernel.attend(ones, *states, None, 0.2, position=position, new=new)
    shifted = [PackedStates(torch.zeros(1, 2, 9, 65).byte()[..., 1:], side.scales, MXINT8, 64) for side in states]
    assert "mse" in kernel.why_not_written(ones, (ones, ones), states, (ScaleRule.FLOOR, ScaleRule.MSE), None)
    assert "must be torch.bfloat16" in kernel.why_not_written(ones, (ones, ones.float()), states, rules, None)
    assert "not aligned" in kernel.why_not_written(ones, (ones, ones), shifted, rules, None)


@pytest.mark.parametrize("name", ["mxint8", pytest.param("mxint4", marks=pytest.mark.slow)])
def test_compiles_for_hopper(name: str) -> None:
    """Nothing spills, and two programs share a multiprocessor."""
    pytest.importorskip("triton")
    from sass import SHARED_BYTES, packed_attention_report

    report, _ = packed_attention_report(parse_format(name), next_token=True)
    assert report.spilled_bytes == 0
    assert report.registers <= 255
    assert report.count("BAR.SYNC") == 2
    assert report.shared_bytes * 2 <= SHARED_BYTES
