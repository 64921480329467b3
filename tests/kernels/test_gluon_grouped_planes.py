"""Experts for many tokens with the Gluon kernel: compiled for Hopper without a GPU, and its results on a Hopper GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT4, MXINT8, MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import to_planes
from mxcompile.numerics import reference
from mxcompile.numerics.experts import grouped_linear as reference_grouped_linear
from mxcompile.numerics.gates import Gate
from mxcompile.numerics.packing import pack

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon", reason="this version of Triton has no Gluon")

ErrorOverBound = Callable[..., float]
TILES = ((64, 256), (32, 256), (128, 256), (256, 128))
"""Tokens and outputs; the first three are those of `config_for`."""
PRODUCTS = (MXFP4, MXINT4, MXFP6_E2M3, MXFP8_E4M3)
"""One format of each kind of layout, those that compile fastest first."""
GATES = (Gate(), Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True))
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def stack(fmt: MXFormat, count: int, out: int, size: int, device: str, bias: bool = True) -> tuple[Any, Tensor]:
    """Random experts (a `Stack`), and their values `[count, out, size]`."""
    from mxcompile.kernels.triton.expert_slices import Stack

    generator = torch.Generator().manual_seed(out + size)
    codes, scales = reference.quantize(torch.randn(count * out, size, generator=generator), fmt, ScaleRule.FLOOR)
    dense = reference.dequantize(codes, scales, fmt, size, torch.bfloat16).to(device)
    planes = to_planes(pack(codes, fmt).to(device), scales.to(device), fmt, size)
    biases = torch.randn(count, out, generator=generator).to(torch.bfloat16).to(device) if bias else None
    return Stack(planes, count, biases), dense.view(count, out, size)


def chosen(tokens: int, k: int, count: int, device: str) -> Tensor:
    """Uneven choices: expert 1 has none, expert 0 many; a few numbers are those of no expert."""
    generator = torch.Generator().manual_seed(tokens)
    numbers = (torch.rand(tokens, k, generator=generator) ** 2 * (count + 1)).to(torch.int64)
    numbers[numbers == 1] = 0
    numbers[: tokens // 50, -1] = -3
    return numbers.to(device)


@pytest.mark.parametrize(
    ("fmt", "rows", "gate", "rounding"),
    [
        (MXFP4, 64, None, None),
        pytest.param(MXINT4, 128, None, None, marks=pytest.mark.slow),
        pytest.param(MXFP8_E4M3, 32, None, None, marks=pytest.mark.slow),
        pytest.param(MXFP4, 128, GATES[0], (MXFP4, ScaleRule.FLOOR), marks=pytest.mark.slow),
        pytest.param(MXINT8, 128, GATES[1], None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_for_hopper(
    fmt: MXFormat, rows: int, gate: Gate | None, rounding: tuple[MXFormat, ScaleRule] | None
) -> None:
    """wgmma is not serialized, and most of a K-step is decoded while it runs."""
    from sass import SHARED_BYTES, gluon_report

    from mxcompile.kernels.gluon.grouped_planes import stages_that_fit
    from mxcompile.kernels.gluon.planes_linear import Config

    config = Config(rows, 256, stages_that_fit(fmt, rows, 256))
    report = gluon_report(fmt, config, has_bias=True, grouped=True, gate=gate, rounding=rounding)
    assert not report.serialized
    assert report.overwritten == []
    assert report.spilled_bytes == 0
    assert report.shared_bytes <= SHARED_BYTES
    assert (report.count("HGMMA"), report.waits) == (16, 4)
    overlapped, decode = report.decoding
    assert overlapped > 0.6 * decode


def test_says_what_it_does_not_serve() -> None:
    from mxcompile.kernels.gluon.grouped_planes import experts, grouped_linear, supports

    up, _ = stack(MXINT4, 3, 128, 96, "cpu")
    x, numbers, weights = torch.zeros(4, 96, dtype=torch.bfloat16), torch.zeros(4, 2).long(), torch.ones(4, 2)
    assert "CUDA" in (supports(x) or "")
    with pytest.raises(MXCompileError, match="cannot take"):
        grouped_linear(x[:, :64], numbers, up)
    with pytest.raises(MXCompileError, match="belong to"):
        grouped_linear(x, numbers[:3], up)
    with pytest.raises(MXCompileError, match="cannot take"):
        grouped_linear(x, numbers, replace(up, count=4, bias=None))
    with pytest.raises(MXCompileError, match="cannot feed"):
        experts(x, numbers, weights, up, up, Gate(), None)


def test_tiles_follow_the_tokens_of_an_expert() -> None:
    from mxcompile.kernels.gluon.grouped_planes import config_for

    weight, _ = stack(MXINT4, 8, 64, 64, "cpu")
    assert [config_for(weight, choices).rows for choices in (1, 8, 300, 1000, 100_000)] == [32, 32, 64, 128, 128]


@on_hopper
@pytest.mark.parametrize(("fmt", "tile"), crossed(PRODUCTS, TILES), ids=str)
def test_products(error_over_bound: ErrorOverBound, fmt: MXFormat, tile: tuple[int, int]) -> None:
    """Against float64, with and without bias; bit-identical on repeat."""
    from mxcompile.kernels.gluon.grouped_planes import Config, grouped_linear, stages_that_fit

    config = Config(*tile, stages_that_fit(fmt, *tile))
    for count, out, size in ((7, 320, 576), (3, 64, 1000)):
        weight, dense = stack(fmt, count, out, size, "cuda")
        for tokens, k in ((1, 3), (21, 2), (130, 5), (700, 4)):
            x = torch.randn(tokens, size, device="cuda").to(torch.bfloat16)
            numbers = chosen(tokens, k, count, "cuda")
            for each in (weight, replace(weight, bias=None)):
                y = grouped_linear(x, numbers, each, config)
                check(y, x, numbers, each.bias, dense, error_over_bound)
                for _ in range(3):
                    assert torch.equal(grouped_linear(x, numbers, each, config), y), f"{tokens} tokens: repeated"


def check(
    y: Tensor, x: Tensor, numbers: Tensor, bias: Tensor | None, dense: Tensor, error_over_bound: ErrorOverBound
) -> None:
    flat, repeated = numbers.flatten(), x.repeat_interleave(numbers.shape[1], 0)
    assert not y[(flat < 0) | (flat >= len(dense))].any()
    for expert in range(len(dense)):
        mine = flat == expert
        added = None if bias is None else bias[expert]
        assert error_over_bound(y[mine], repeated[mine], dense[expert], added) <= 1, f"expert {expert}"


@on_hopper
def test_all_choices_of_one_expert_and_none_of_any(error_over_bound: ErrorOverBound) -> None:
    from mxcompile.kernels.gluon.grouped_planes import grouped_linear

    weight, dense = stack(MXFP4, 5, 128, 256, "cuda")
    x = torch.randn(500, 256, device="cuda").to(torch.bfloat16)
    for number in (0, 4, 5):
        numbers = torch.full((500, 2), number, device="cuda", dtype=torch.int32)
        check(grouped_linear(x, numbers, weight), x, numbers, weight.bias, dense, error_over_bound)
    assert grouped_linear(x[:0], numbers[:0], weight).shape == (0, 128)


@on_hopper
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gate_after_the_matmul(assert_same_bits: Callable[..., None], gate: Gate, rows: int) -> None:
    """In one launch with the matmul: the gate within a step of bfloat16 of that in two, its rounding bit for bit."""
    from mxcompile.kernels.gluon.grouped_planes import Config, gated_multiply, multiply, stages_that_fit
    from mxcompile.kernels.triton import gate_rows, routing

    for fmt, bias in ((MXFP4, True), (MXINT8, False)):
        up, _ = stack(fmt, 5, 2 * 320, 384, "cuda", bias=bias)
        x = (torch.randn(333, 384, device="cuda") / 8).to(torch.bfloat16)
        routed = routing.route(chosen(333, 3, 5, "cuda"), 5, rows)
        gathered, filled = routing.gather(x, routed), routed.choices >= 0
        config = Config(rows, 256, stages_that_fit(fmt, rows, 256))
        h = gated_multiply(gathered, up, routed, config, gate, None)[filled]
        both = multiply(gathered, up, routed, config)
        separate = gate_rows.gate_rows(both, routed.used, rows, gate, None)[filled].double()
        assert ((h.double() - separate).abs() <= 2.0**-7 * separate.abs() + 2.0**-120).all()
        for rounding in ((MXFP4, ScaleRule.EVEN), (MXINT8.with_block(64), ScaleRule.FLOOR)):
            rounded = gated_multiply(gathered, up, routed, config, gate, rounding)[filled]
            assert_same_bits(rounded.cpu(), reference.quantize_dequantize(h.cpu(), *rounding))


ROUNDINGS = (None, (MXFP4, ScaleRule.EVEN), (MXINT8, ScaleRule.FLOOR), (MXFP8_E4M3.with_alignment(), ScaleRule.FLOOR))


@on_hopper
@pytest.mark.parametrize(("rounding", "gate"), crossed(ROUNDINGS, GATES), ids=str)
def test_experts(rounding: tuple[MXFormat, ScaleRule] | None, gate: Gate) -> None:
    """Against float64, rounded to bfloat16 after either matmul and the gate; capturable, bit-identical on repeat."""
    from mxcompile.kernels.gluon.grouped_planes import experts

    up, up_dense = stack(MXFP4, 6, 2 * 192, 256, "cuda")
    down, down_dense = stack(MXINT8, 6, 320, 192, "cuda")
    x = (torch.randn(300, 256, device="cuda") / 16).to(torch.bfloat16)
    numbers, weights = chosen(300, 4, 6, "cuda"), torch.rand(300, 4, device="cuda")
    y = experts(x, numbers, weights, up, down, gate, rounding)
    up_products = reference_grouped_linear(x.double(), numbers, 6, 384, _multiplied(up_dense, up.bias))
    hidden = gate(up_products.to(torch.bfloat16).double()).to(torch.bfloat16)
    if rounding is not None:
        hidden = reference.quantize_dequantize(hidden, *rounding)
    choices = numbers.reshape(-1, 1)
    products = reference_grouped_linear(hidden.double(), choices, 6, 320, _multiplied(down_dense, down.bias))
    products = products.to(torch.bfloat16).double()
    expected = (products.view(300, 4, 320) * weights[..., None]).sum(1)
    # The last rounding to bfloat16; rounding to an element turns differences of 2**-8 into whole steps of a few.
    assert (y.double() - expected).norm() <= (0.004 if rounding is None else 0.03) * expected.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(x, numbers, weights, up, down, gate, rounding)
    for _ in range(3):
        captured.fill_(1)
        graph.replay()
        assert torch.equal(captured, y)


def _multiplied(dense: Tensor, bias: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    """In float64."""

    def multiply(rows: Tensor, expert: int) -> Tensor:
        added = None if bias is None else bias[expert].double()
        return torch.nn.functional.linear(rows, dense[expert].double(), added)

    return multiply
