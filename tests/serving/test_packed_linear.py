"""Matmuls on packed tensors: equal to an MXWeight's, also in shares; planar parts; what is compiled beforehand."""

from dataclasses import replace

import pytest
import torch
from served import Spec, mx_weight
from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXINT4, parse_format
from mxcompile.kernels import dispatch
from mxcompile.serving import packed_linear, warm_up
from mxcompile.serving.packed_linear import PackedPart
from mxcompile.tensor.weight import MXWeight

SPECS = {
    "w4a8": Spec(),
    "aligned": Spec("mxfp4", "mxfp8_e4m3+aligned"),
    "prepared": Spec("mxfp8_e4m3", "mxfp8_e4m3", rotation=64, multiplier=1),
    "weight-only": Spec("mxint6", None),
    "matrices": Spec("mxfp4", "mxfp4", multiplier=1, run=32),
}
ROW_PARALLEL = ["w4a8", "prepared", "matrices"]
TOKENS = 5
SUM_TOLERANCE = 2e-6  # of the largest output, in float32: the order of 256 additions


def part(weight: MXWeight) -> PackedPart:
    return PackedPart(weight.elements, weight.scales)


def example(spec: Spec, dtype: torch.dtype = torch.float32, out: int = 192) -> tuple[Tensor, MXWeight, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, values, bias = (torch.randn(*shape, generator=generator) for shape in ((TOKENS, 256), (out, 256), (out,)))
    return x.to(dtype), mx_weight(values.to(dtype), spec), bias.to(dtype)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_weights_own_matmul(spec, dtype):
    x, weight, bias = example(spec, dtype)
    y = packed_linear.linear(x, weight.layout_, weight.multiplier, [part(weight)], bias)
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rows_of_column_parallel_shares_are_rows_of_the_whole(spec):
    x, weight, bias = example(spec)
    whole = packed_linear.linear(x, weight.layout_, weight.multiplier, [part(weight)], bias)
    parts = [PackedPart(*pair) for pair in zip(weight.elements.split(64), weight.scales.split(64), strict=True)]
    shares = [
        packed_linear.linear(x, weight.layout_, weight.multiplier, [each], some)
        for each, some in zip(parts, bias.split(64), strict=True)
    ]
    together = packed_linear.linear(x, weight.layout_, weight.multiplier, parts, bias)
    largest = whole.abs().max()
    assert (torch.cat(shares, -1) - whole).abs().max() <= SUM_TOLERANCE * largest
    assert (together - whole).abs().max() <= SUM_TOLERANCE * largest


@pytest.mark.parametrize("spec", [SPECS[name] for name in ROW_PARALLEL], ids=ROW_PARALLEL)
def test_row_parallel_shares_add_up_to_the_whole(spec):
    x, weight, _ = example(spec)
    whole = packed_linear.linear(x, weight.layout_, weight.multiplier, [part(weight)], None)
    fmt, total, size = parse_format(spec.weight), torch.zeros_like(whole), 128
    for start in range(0, 256, size):
        blocks = slice(start // fmt.block_size, (start + size) // fmt.block_size)
        elements = weight.elements.unflatten(1, (-1, fmt.block_bytes))[:, blocks].flatten(1)
        share = PackedPart(elements, weight.scales[:, blocks])
        multiplier = weight.multiplier
        if multiplier is not None:
            multiplier = multiplier.chunk(256 // size)[start // size]
        layout = replace(weight.layout_, size=size)
        total += packed_linear.linear(x[:, start : start + size], layout, multiplier, [share], None)
    assert (total - whole).abs().max() <= SUM_TOLERANCE * whole.abs().max()


def test_on_a_cpu_nothing_is_planar():
    _, weight, _ = example(Spec())
    with pytest.raises(MXCompileError, match="runs on a GPU"):
        packed_linear.to_planes(part(weight), weight.layout_, torch.bfloat16, [192])


@pytest.fixture
def planes_anywhere(monkeypatch):
    """The conversion does not depend on the device: only the kernels do."""
    monkeypatch.setattr(dispatch, "choices", lambda *_: {"planes": None})


@pytest.mark.usefixtures("planes_anywhere")
def test_planar_parts_hold_the_same_values():
    x, weight, bias = example(Spec(), torch.bfloat16)
    parts = packed_linear.to_planes(part(weight), weight.layout_, torch.bfloat16, [64, 128])
    assert len(parts) == 1
    assert parts[0].planes is not None
    y = packed_linear.linear(x, weight.layout_, None, parts, bias)
    assert torch.equal(y, packed_linear.linear(x, weight.layout_, None, [part(weight)], bias))


@pytest.mark.usefixtures("planes_anywhere")
def test_layers_whose_scales_are_far_apart_are_parts_of_their_own():
    x, weight, bias = example(Spec("mxint4", "mxint8"), torch.bfloat16)
    weight.scales[:64] -= 30  # one layer's weights are 2**30 times smaller than the others'
    whole = part(weight)
    parts = packed_linear.to_planes(whole, weight.layout_, torch.bfloat16, [64, 64, 64])
    assert [len(each.elements) for each in parts] == [64, 64, 64]
    y = packed_linear.linear(x, weight.layout_, None, parts, bias)
    assert torch.equal(y, packed_linear.linear(x, weight.layout_, None, [whole], bias))


@pytest.mark.usefixtures("planes_anywhere")
def test_rows_that_do_not_fill_tiles_stay_with_the_reason():
    _, weight, _ = example(Spec(), out=96)
    with pytest.raises(MXCompileError, match="the planar layout needs a multiple of 64 outputs, not 96"):
        packed_linear.to_planes(part(weight), weight.layout_, torch.bfloat16, [96])


def test_each_kernel_is_compiled_once_for_each_number_of_tokens_that_needs_its_own(monkeypatch):
    monkeypatch.setattr(warm_up, "token_counts", lambda *_: [4, 16, 4096])
    monkeypatch.setattr(warm_up, "_warm", set())
    ran: list[tuple[int, ...]] = []

    def run(x: Tensor) -> Tensor:
        ran.append(tuple(x.shape))
        return x

    device = torch.device("cpu")
    assert warm_up.warm_up(run, "a layer", MXINT4, 64, device, most=2048) == 5
    assert ran == [(1, 64), (4, 64), (16, 64), (512, 64), (2048, 64)]
    assert warm_up.warm_up(run, "a layer", MXINT4, 64, device, most=2048) == 0
    assert warm_up.warm_up(run, "another", MXINT4, 64, device, most=16) == 3
