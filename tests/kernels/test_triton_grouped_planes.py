"""triton/grouped_planes.py against float64 and reference.py in Triton's interpreter."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from grouped import choose, gated_over_bound, linear_over_bound, make_experts, several_tiles, tokens
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import (
    FORMATS,
    MXFP4,
    MXFP6_E2M3,
    MXFP8_E4M3,
    MXINT4,
    MXINT8,
    MXFormat,
    ScaleRule,
    activation_rule,
)
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate

GPT_OSS = Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
GATES = [Gate(), GPT_OSS, Gate("gelu"), Gate("gelu_tanh", interleaved=True), Gate("relu", limit=1.0, shift=0.5)]
NO_EXPERTS = [-1, 5, 2**33 + 1, -(2**33)]
"""Numbers that are not in [0, 5); two of them are, if cut to 32 bits."""
SameBits = Callable[[Tensor, Tensor], None]


@pytest.fixture
def kernels(interpreted: SimpleNamespace) -> SimpleNamespace:
    return interpreted.grouped_planes


def some_of_none(experts: Tensor) -> Tensor:
    """The same choices with numbers of no expert among them."""
    changed = experts.clone()
    changed.view(-1)[: 2 * len(NO_EXPERTS) : 2] = torch.tensor(NO_EXPERTS)
    return changed


@pytest.mark.parametrize(
    ("fmt", "options"),
    crossed(
        FORMATS.values(),
        [
            {"out": 64, "slices": 2},
            {"choices": 8, "out": 32, "slices": 4},
            {"choices": 4, "out": 128, "slices": 1},
            {"out": 32, "slices": 4, "held": 2},
            {"choices": 8, "out": 64, "slices": 2, "held": 1},
        ],
    ),
    ids=str,
)
def test_every_format(kernels: SimpleNamespace, fmt: MXFormat, options: dict[str, int]) -> None:
    out = several_tiles(options["out"])
    rows = 9 if "choices" in options else 4
    layer, x = make_experts(fmt, 5, out, 600, with_bias=True), tokens(rows, 600)
    experts = some_of_none(choose(rows, 3, 5))
    if "held" in options and fmt.bits == 6:
        with pytest.raises(MXCompileError, match="cannot be held in registers"):
            kernels.linear(x, experts, layer.stack(kernels), kernels.Config(**options))
        return
    y = kernels.linear(x, experts, layer.stack(kernels), kernels.Config(**options))
    assert (y.shape, y.dtype) == ((3 * rows, out), torch.bfloat16)
    assert linear_over_bound(y, x, experts, layer) <= 1
    assert not y[~layer.chosen(experts)[0]].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("slots", [1, 2, 7])
def test_one_expert_for_more_choices_than_a_program_takes(
    kernels: SimpleNamespace, slots: int, dtype: torch.dtype
) -> None:
    layer, x = make_experts(MXFP4, 3, 64, 128), tokens(7, 128)
    experts = torch.full((7, slots), 2, dtype=dtype)
    experts[3:5, 0] = 1
    y = kernels.linear(x, experts, layer.stack(kernels), kernels.Config(choices=4, slices=1))
    assert linear_over_bound(y, x, experts, layer) <= 1


@pytest.mark.parametrize("size", [1, 32, 128, 257, 2880 // 4])
@pytest.mark.parametrize("fmt", [MXFP8_E4M3, MXFP6_E2M3, MXINT4], ids=str)
def test_any_size_in_bounds(kernels: SimpleNamespace, accesses: ..., fmt: MXFormat, size: int) -> None:
    layer, x, experts = make_experts(fmt, 3, 64, size, with_bias=True), tokens(3, size), choose(3, 2, 3)
    assert layer.bias is not None
    y = kernels.linear(x, experts, layer.stack(kernels), kernels.Config(choices=2, out=128, slices=4))
    assert linear_over_bound(y, x, experts, layer) <= 1
    accesses.assert_within([x, experts, layer.planes.words, layer.planes.scales, layer.bias], y)


@pytest.mark.parametrize("block", [64, 128])
def test_larger_blocks_and_lifted_scales(kernels: SimpleNamespace, block: int) -> None:
    layer = make_experts(MXFP4.with_block(block), 2, 64, 300, lift=20)
    assert layer.planes.lift > 0
    x, experts = tokens(4, 300), choose(4, 1, 2)
    y = kernels.linear(x, experts, layer.stack(kernels), kernels.Config(choices=2))
    assert linear_over_bound(y, x, experts, layer) <= 1


def table(kernels: SimpleNamespace, experts: Tensor, count: int, size: int) -> object:
    """Choices sorted by expert in blocks of `size`, and two blocks that are not used."""
    choices: list[int] = []
    numbers: list[int] = []
    for expert in range(count):
        chosen = (experts.flatten() == expert).nonzero().flatten().tolist()
        blocks = -(-len(chosen) // size)
        choices += chosen + [-1] * (blocks * size - len(chosen))
        numbers += [expert] * blocks
    unused = [-1] * 2
    return kernels.Table(
        torch.tensor(choices + unused * size, dtype=torch.int32), torch.tensor(numbers + unused, dtype=torch.int32)
    )


@pytest.mark.parametrize("choices", [2, 16])
def test_table_instead_of_ranks(kernels: SimpleNamespace, choices: int) -> None:
    layer, x, experts = make_experts(MXINT4, 5, 128, 200, with_bias=True), tokens(9, 200), some_of_none(choose(9, 3, 5))
    config, stack = kernels.Config(choices=choices, slices=2), layer.stack(kernels)
    ranked, blocks = kernels.linear(x, experts, stack, config), table(kernels, experts, 5, choices)
    assert torch.equal(kernels.linear(x, experts, stack, config, blocks), ranked)
    h = kernels.gated_linear(x, experts, stack, Gate(), None, config, blocks)
    valid = layer.chosen(experts)[0]
    assert torch.equal(h[valid], kernels.gated_linear(x, experts, stack, Gate(), None, config)[valid])


@pytest.mark.parametrize(("gate", "choices"), crossed(GATES, [1, 8]), ids=str)
def test_gates(kernels: SimpleNamespace, gate: Gate, choices: int) -> None:
    up, x, experts = make_experts(MXFP4, 5, 192, 200, with_bias=True), tokens(5, 200), choose(5, 2, 5)
    config = kernels.Config(choices=choices, out=64 if choices == 1 else 128, slices=2)
    h = kernels.gated_linear(0.2 * x, experts, up.stack(kernels), gate, None, config)
    assert (h.shape, h.dtype) == ((10, 96), torch.bfloat16)
    assert gated_over_bound(h, 0.2 * x, experts, up, gate) <= 1


@pytest.mark.parametrize(
    ("fmt", "rule", "gate"),
    [
        *((fmt, activation_rule(fmt), Gate()) for fmt in FORMATS.values()),
        *((fmt, rule, GPT_OSS) for fmt in (MXINT8, MXFP8_E4M3) for rule in (ScaleRule.RCEIL, ScaleRule.EVEN)),
        (MXFP4.with_block(64), ScaleRule.FLOOR, GPT_OSS),
        (MXFP4.with_block(16), ScaleRule.T725, Gate()),
    ],
    ids=str,
)
def test_rounds_as_the_reference(
    kernels: SimpleNamespace, assert_same_bits: SameBits, fmt: MXFormat, rule: ScaleRule, gate: Gate
) -> None:
    """Bit for bit what the reference makes of the result without rounding; 96 channels, so a block of 64 is cut."""
    up, x, experts = make_experts(MXFP4, 3, 192, 100), tokens(4, 100), choose(4, 2, 3)
    stack, config = up.stack(kernels), kernels.Config(choices=4, out=128, slices=2)
    h = kernels.gated_linear(x, experts, stack, gate, None, config)
    rounded = kernels.gated_linear(x, experts, stack, gate, (fmt, rule), config)
    assert_same_bits(rounded, reference.quantize_dequantize(h, fmt, rule))


def test_rounding_that_is_not_fused(kernels: SimpleNamespace) -> None:
    assert kernels.why_not_rounded((MXFP4.with_block(64), ScaleRule.FLOOR), 128) is None
    assert "blocks of 64 do not fit" in kernels.why_not_rounded((MXFP4.with_block(64), ScaleRule.FLOOR), 64)
    assert "a kernel of its own" in kernels.why_not_rounded((MXFP4, ScaleRule.MSE), 128)
    assert "a kernel of its own" in kernels.why_not_rounded((MXFP8_E4M3.with_alignment(True), ScaleRule.FLOOR), 128)
    assert kernels.why_not_rounded((MXINT8, ScaleRule.T725), 128)
    up, rounding = make_experts(MXFP4, 2, 64, 32).stack(kernels), (MXFP4.with_block(128), ScaleRule.FLOOR)
    with pytest.raises(MXCompileError, match="blocks of 128"):
        kernels.gated_linear(tokens(1, 32), choose(1, 1, 2), up, Gate(), rounding, kernels.Config())


def test_any_stride_and_no_rows(kernels: SimpleNamespace) -> None:
    layer, x = make_experts(MXFP4, 3, 64, 77), tokens(6, 200)
    stack, config = layer.stack(kernels), kernels.Config(choices=2)
    experts = choose(2, 6, 3).T
    for view in (x[:, 3:80], x[:, :154:2]):
        y = kernels.linear(view, experts, stack, config)
        assert linear_over_bound(y, view, experts, layer) <= 1
    for rows, slots in ((0, 2), (2, 0)):
        none = choose(rows, slots, 3)
        assert kernels.linear(x[:rows, :77], none, stack, config).shape == (0, 64)


def test_what_does_not_fit(kernels: SimpleNamespace) -> None:
    layer, config = make_experts(MXFP4, 2, 64, 64, with_bias=True), kernels.Config(choices=2)
    stack = layer.stack(kernels)
    with pytest.raises(MXCompileError, match="cannot take"):
        kernels.linear(tokens(2, 65), choose(2, 1, 2), stack, config)
    with pytest.raises(MXCompileError, match="need a table"):
        kernels.linear(tokens(257, 64), choose(257, 1, 2), stack, config)
    wrong = kernels.Stack(layer.planes, 2, torch.zeros(64, dtype=torch.bfloat16))
    with pytest.raises(MXCompileError, match="a bias of shape"):
        kernels.linear(tokens(2, 64), choose(2, 1, 2), wrong, config)
