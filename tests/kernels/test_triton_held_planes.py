"""triton/held_planes.py against float64 and planes_linear.py in Triton's interpreter, and compiled for Hopper."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from planar import tokens, weight

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXFP4, MXFP6_E2M3, MXINT4, MXINT8, MXFormat

ErrorOverBound = Callable[..., float]


@pytest.mark.parametrize(
    ("fmt", "case"),
    crossed(
        FORMATS.values(),
        [
            (1, 1024, {"warps": 4, "held": 1}),
            (1, 2200, {"out": 32, "warps": 2, "held": 8}),
            (5, 600, {"rows": 8, "warps": 2, "held": 2}),
            (17, 600, {"rows": 8, "out": 64, "warps": 2}),
        ],
    ),
    ids=str,
)
def test_every_format(
    interpreted: SimpleNamespace,
    error_over_bound: ErrorOverBound,
    fmt: MXFormat,
    case: tuple[int, int, dict[str, int]],
) -> None:
    rows, size, options = case
    planes, w = weight(fmt, 70, size)
    x, bias = tokens(rows, size), tokens(1, 70)[0] if rows != 5 else None
    config = interpreted.held_planes.Config(**options)
    y = interpreted.held_planes.linear(x, planes, bias, config)
    assert (y.shape, y.dtype) == ((rows, 70), torch.bfloat16)
    assert error_over_bound(y, x, w, bias) <= 1
    assert torch.equal(interpreted.held_planes.linear(x, planes, bias, config), y)


@pytest.mark.parametrize(("out", "size"), [(1, 1), (64, 128), (130, 257)])
def test_any_size_in_bounds(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, accesses: ..., out: int, size: int
) -> None:
    planes, w = weight(MXINT4, out, size)
    x, bias = tokens(3, size), tokens(1, out)[0]
    held = interpreted.held_planes
    y = held.linear(x, planes, bias, held.for_k_steps(held.Config(rows=8, warps=2), planes.words.shape[1]))
    assert error_over_bound(y, x, w, bias) <= 1
    accesses.assert_within([x, planes.words, planes.scales, bias], y)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outs", [(64, 128), (128, 64, 64)])
def test_weights_side_by_side(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, outs: tuple[int, ...], with_bias: bool
) -> None:
    planes, w = weight(MXFP4, sum(outs), 300)
    x, config = tokens(1, 300), interpreted.held_planes.Config(warps=2)
    biases = [tokens(1, out)[0] if with_bias else None for out in outs]
    ys = interpreted.held_planes.linears(x, planes, outs, biases, config)
    for y, part, bias, out in zip(ys, w.split(outs), biases, outs, strict=True):
        assert (y.shape, y.is_contiguous()) == ((1, out), True)
        assert error_over_bound(y, x, part, bias) <= 1


def test_more_warps_than_k_steps_are_refused(interpreted: SimpleNamespace) -> None:
    planes, _ = weight(MXFP4, 64, 300)
    with pytest.raises(MXCompileError, match="3 K-steps cannot be divided among 4 warps"):
        interpreted.held_planes.linear(tokens(1, 300), planes, None, interpreted.held_planes.Config(warps=4))
    with pytest.raises(MXCompileError, match="cannot take"):
        interpreted.held_planes.linear(tokens(1, 299), planes, None, interpreted.held_planes.Config(warps=2))


@pytest.mark.parametrize(("k_steps", "warps"), [(1, 1), (5, 4), (8, 8), (32, 8), (128, 8), (129, 16), (1000, 16)])
def test_warps_for_other_shapes(interpreted: SimpleNamespace, k_steps: int, warps: int) -> None:
    assert interpreted.held_planes.for_k_steps(interpreted.held_planes.Config(), k_steps).warps == warps


@pytest.mark.parametrize("fmt", [MXINT4, pytest.param(MXINT8, marks=pytest.mark.slow), MXFP6_E2M3], ids=str)
def test_weights_go_from_memory_to_registers(fmt: MXFormat) -> None:
    """In loads of 16 bytes, before anything waits; only x, 8 KB of it, goes through shared memory."""
    from sass import held_report

    from mxcompile.kernels.triton.held_planes import Config

    report = held_report(fmt, 4096, Config(out=16, warps=8, held=4))
    loads = 4096 * 16 * fmt.bits // 8 // (8 * 32 * 16)
    before_waiting = report.sass.split("BAR.SYNC")[0]
    assert before_waiting.count("LDG.E.EF.128") == report.sass.count("LDG.E.EF.128") == loads
    assert report.spilled_bytes == 0
    assert report.shared_bytes <= 8192
