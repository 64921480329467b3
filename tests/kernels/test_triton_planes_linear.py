"""triton/planes_linear.py against float64 and reference.dequantize in Triton's interpreter; its PTX is emulated."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from planar import tokens, weight
from ptx import execute, join, pairs

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXFP4, MXFP6_E3M2, MXFP8_E4M3, MXINT4, MXINT6, MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import plane_layout, to_planes
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack

ErrorOverBound = Callable[..., float]


@pytest.mark.parametrize(
    ("fmt", "case"),
    crossed(
        FORMATS.values(),
        [
            (1, {"rows": 8, "out": 32, "joined": False}),
            (3, {"rows": 16, "out": 64, "split": 3}),
            (17, {"rows": 16, "out": 128, "split": 2, "joined": False, "group": 1}),
        ],
    ),
    ids=str,
)
def test_every_format(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, fmt: MXFormat, case: tuple[int, dict[str, int]]
) -> None:
    rows, options = case
    config = interpreted.planes.Config(**options)
    planes, w = weight(fmt, 70, 600)
    x, bias = tokens(rows, 600), tokens(1, 70)[0] if rows != 3 else None
    counters = torch.zeros(interpreted.planes.counters_needed(rows, planes, config), dtype=torch.int32)
    y = interpreted.planes.linear(x, planes, bias, config, counters)
    assert (y.shape, y.dtype) == ((rows, 70), torch.bfloat16)
    assert error_over_bound(y, x, w, bias) <= 1
    assert not counters.any()
    assert torch.equal(interpreted.planes.linear(x, planes, bias, config), y)


@pytest.mark.parametrize(("out", "size"), [(1, 1), (64, 128), (130, 257)])
@pytest.mark.parametrize("fmt", [MXFP8_E4M3, MXFP6_E3M2, MXINT4], ids=str)
def test_any_size_in_bounds(
    interpreted: SimpleNamespace,
    error_over_bound: ErrorOverBound,
    accesses: ...,
    fmt: MXFormat,
    out: int,
    size: int,
) -> None:
    planes, w = weight(fmt, out, size)
    x, bias = tokens(5, size), tokens(1, out)[0]
    y = interpreted.planes.linear(x, planes, bias, interpreted.planes.Config(16, 128, split=8 if size == 1 else 1))
    assert error_over_bound(y, x, w, bias) <= 1
    accesses.assert_within([x, planes.words, planes.scales, bias], y)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("outs", [(64, 128), (128, 64, 64)])
def test_weights_side_by_side(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, outs: tuple[int, ...], split: int, with_bias: bool
) -> None:
    planes, w = weight(MXFP4, sum(outs), 300)
    x, config = tokens(3, 300), interpreted.planes.Config(8, 64, split)
    biases = [tokens(1, out)[0] if with_bias else None for out in outs]
    ys = interpreted.planes.linears(x, planes, outs, biases, config)
    for y, part, bias, out in zip(ys, w.split(outs), biases, outs, strict=True):
        assert (y.shape, y.is_contiguous()) == ((3, out), True)
        assert error_over_bound(y, x, part, bias) <= 1


def test_weights_that_one_launch_cannot_take(interpreted: SimpleNamespace) -> None:
    planes, _ = weight(MXFP4, 256, 64)
    linears, config, x = interpreted.planes.linears, interpreted.planes.Config(8, 64), tokens(3, 64)
    for outs, biases, problem in (
        ([96, 160], [None, None], "not divisible into tiles of 64"),
        ([64] * 4, [None] * 4, "up to 3 weights"),
        ([128, 128], [None, tokens(1, 128)[0]], "all with a bias or all without"),
        ([128, 64], [None, None], "cannot take"),
        ([256], [tokens(1, 64)[0]], "a bias of shape"),
    ):
        with pytest.raises(MXCompileError, match=problem):
            linears(x, planes, outs, biases, config)


def test_any_shape_and_stride(interpreted: SimpleNamespace, error_over_bound: ErrorOverBound) -> None:
    planes, w = weight(MXFP4, 20, 77)
    x = tokens(100, 154)
    config = interpreted.planes.Config(8, 64)
    for view in (x[:, ::2], x[:6, 3:80], x[:6, :77].unflatten(0, (3, 2)).transpose(0, 1), x[0, :77], x[:0, :77]):
        y = interpreted.planes.linear(view, planes, None, config)
        assert y.shape == (*view.shape[:-1], 20)
        assert error_over_bound(y.reshape(-1, 20), view.reshape(-1, 77), w, None) <= 1
    with pytest.raises(MXCompileError, match="cannot take"):
        interpreted.planes.linear(x, planes, None, config)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_dequantize_exactly(interpreted: SimpleNamespace, fmt: MXFormat) -> None:
    planes, w = weight(fmt.with_block(64), 70, 300)
    assert torch.equal(interpreted.dequantize.dequantize(planes), w)


def test_lifted_scales(interpreted: SimpleNamespace, error_over_bound: ErrorOverBound) -> None:
    codes, scales = reference.quantize(torch.randn(40, 128), MXFP4, ScaleRule.FLOOR)
    scales += 20
    planes = to_planes(pack(codes, MXFP4), scales, MXFP4, 128)
    w = reference.dequantize(codes, scales, MXFP4, 128, torch.bfloat16)
    assert planes.lift > 0
    assert torch.equal(interpreted.dequantize.dequantize(planes), w)
    y = interpreted.planes.linear(tokens(3, 128), planes, None, interpreted.planes.Config(8, 64))
    assert error_over_bound(y, tokens(3, 128), w, None) <= 1


def test_supports_says_why_not(interpreted: SimpleNamespace) -> None:
    assert "the activation is float16" in interpreted.planes.supports(torch.zeros(2, 32, dtype=torch.float16))
    assert "need a CUDA device" in interpreted.planes.supports(torch.zeros(2, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_assembly_decodes_every_code_in_every_plane(interpreted: SimpleNamespace, fmt: MXFormat) -> None:
    table = reference.element_table(fmt)
    held = [code for code, v in enumerate(table) if abs(v) <= fmt.max_value or (fmt is MXINT4 or fmt is MXINT6)]
    layout = plane_layout(fmt)
    codes = torch.tensor(held, dtype=torch.uint8)[:, None].repeat(1, layout.columns)
    codes[:, 1::2] = codes[:, 1::2].flip(0)
    scales = torch.full((len(held), layout.planes), 120, dtype=torch.uint8)
    planes = to_planes(pack(codes, fmt), scales, fmt, layout.columns)
    expected = reference.dequantize(codes, scales, fmt, layout.columns, torch.float32)
    assembly = interpreted.planes.layout_constants(fmt)["ASSEMBLY"]
    registers = join(planes.words[:, 0].unflatten(-1, (-1, 2)), 16).unbind(1)
    for plane in range(layout.planes):
        bytes_ = planes.scales[:, 0, plane // 4].long() & 0xFFFFFFFF
        scale = ((bytes_ << 7 if plane % 2 == 0 else bytes_ >> 1) & 0x7F807F80).unsqueeze(-1)
        addend = execute(assembly[-1], {"$1": scale}) if layout.offset else scale
        words = {"$1": registers[layout.fields[plane][0].word], "$2": registers[-1]}
        result = pairs(execute(assembly[plane], {**words, "$3": scale, "$5": addend}), torch.bfloat16)
        result = result.flatten(2).flatten(0, 1)[: len(held)]
        assert torch.equal(result.float(), expected[:, plane * 32 : plane * 32 + 32]), plane
