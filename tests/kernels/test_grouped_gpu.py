"""gpu_experts.py and its Triton kernels compiled, on a real GPU. Compiling takes longest: with xdist, use -n 8."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossed import crossed
from grouped import (
    Experts,
    choose,
    gated_over_bound,
    linear_over_bound,
    make_experts,
    sum_over_bound,
    tokens,
)
from torch import Tensor

from mxcompile.formats import FORMATS, MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT4, MXINT8, MXFormat, activation_rule
from mxcompile.kernels.layout.planes import PlanarScaling, to_bytes
from mxcompile.numerics import reference
from mxcompile.numerics.gates import Gate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPT_OSS = Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
GATES = [Gate(), GPT_OSS, Gate("gelu"), Gate("gelu_tanh", interleaved=True), Gate("relu", limit=1.0, shift=0.5)]
SameBits = Callable[[Tensor, Tensor], None]
SIZES = [(16, 1536, 2048), (8, 576, 1000), (4, 64, 96)]
"""Experts, outputs, inputs."""


def with_numbers_of_none(experts: Tensor, count: int) -> Tensor:
    changed = experts.clone()
    changed.view(-1)[::7] = count
    changed.view(-1)[::9] = -(2**33) + 1
    return changed


def packed(layer: Experts) -> tuple[Any, MXFormat, PlanarScaling]:
    """As gpu_experts.py takes them."""
    planes, count = layer.planes, len(layer.values)
    elements, scales = (part.unflatten(0, (count, -1)) for part in to_bytes(planes))
    return (elements, scales, layer.bias), planes.fmt, PlanarScaling(planes.lift, planes.top)


@pytest.mark.parametrize("rows", [1, 40, 80])
@pytest.mark.parametrize(("fmt", "size"), crossed(FORMATS.values(), SIZES), ids=str)
def test_grouped_linear(fmt: MXFormat, size: tuple[int, int, int], rows: int) -> None:
    """Also bit-identical on repeat."""
    from mxcompile.kernels import gpu_experts

    layer = make_experts(fmt, *size, with_bias=rows != 40, device="cuda")
    x, experts = tokens(rows, size[2], "cuda"), with_numbers_of_none(choose(rows, 3, size[0], "cuda"), size[0])
    assert gpu_experts.supports(x) is None
    y = gpu_experts.grouped_linear(x, experts, *packed(layer))
    assert linear_over_bound(y, x, experts, layer) <= 1
    assert all(torch.equal(gpu_experts.grouped_linear(x, experts, *packed(layer)), y) for _ in range(3))


@pytest.mark.parametrize(("gate", "choices"), crossed(GATES, [1, 8, 16]), ids=str)
def test_gates(gate: Gate, choices: int) -> None:
    from mxcompile.kernels.triton import grouped_planes as kernels

    up, x, experts = (
        make_experts(MXFP4, 8, 576, 500, True, "cuda"),
        0.2 * tokens(5, 500, "cuda"),
        choose(5, 4, 8, "cuda"),
    )
    for out, slices, held in ((64, 4, 0), (32, 1, 0), (64, 4, 1), (32, 2, 2)):
        config = kernels.Config(choices, out, slices, held=held)
        h = kernels.gated_linear(x, experts, up.stack(kernels), gate, None, config)
        assert gated_over_bound(h, x, experts, up, gate) <= 1


@pytest.mark.parametrize(
    ("fmt", "block", "gate", "choices"),
    crossed(FORMATS.values(), [32, 64, 128], [Gate(), GPT_OSS], [1, 8]),
    ids=str,
)
def test_rounds_as_the_reference(
    assert_same_bits: SameBits, fmt: MXFormat, block: int, gate: Gate, choices: int
) -> None:
    from mxcompile.kernels.triton import grouped_planes as kernels

    up, x, experts = make_experts(MXFP4, 4, 576, 500, device="cuda"), tokens(5, 500, "cuda"), choose(5, 2, 4, "cuda")
    fmt, stack = fmt.with_block(block), up.stack(kernels)
    config = kernels.Config(choices, max(64, 2 * block), 4)
    h = kernels.gated_linear(x, experts, stack, gate, None, config)
    rounded = kernels.gated_linear(x, experts, stack, gate, (fmt, activation_rule(fmt)), config)
    assert_same_bits(rounded.cpu(), reference.quantize_dequantize(h.cpu(), fmt, activation_rule(fmt)))


@pytest.mark.parametrize(("fmt", "slots"), crossed(FORMATS.values(), [8, 1, 3, 10]), ids=str)
def test_multiply_and_sum(fmt: MXFormat, slots: int) -> None:
    from mxcompile.kernels.triton import expert_sums as kernels

    down = make_experts(fmt, 12, 192, 1000, with_bias=slots % 2 == 0, device="cuda")
    experts = with_numbers_of_none(choose(3, slots, 12, "cuda"), 12)
    h, weights = tokens(3 * slots, 1000, "cuda"), torch.rand(3, slots, device="cuda").to(torch.bfloat16)
    h[~down.chosen(experts)[0]] = torch.nan
    for out, slices, parts, held in ((16, 8, 1, 0), (64, 4, 4, 0), (16, 8, 1, 8), (16, 8, 2, 2)):
        config = kernels.Config(1, out, slices, parts, held=held)
        y = kernels.multiply_and_sum(h, experts, weights, down.stack(kernels), config)
        assert sum_over_bound(y, h, experts, weights, down) <= 1


def composed(x: Tensor, experts: Tensor, weights: Tensor, up: Experts, down: Experts, rounding: Any, gate: Gate) -> Any:
    """The layer out of the kernels that the other tests check, single and without any overlap of launches."""
    from mxcompile.kernels.triton import grouped_planes as kernels

    config = kernels.Config(1, 64 if rounding is None else 2 * rounding[0].block_size, 4)
    h = kernels.gated_linear(x, experts, up.stack(kernels), gate, rounding, config)
    y = kernels.linear(h, experts.reshape(-1, 1), down.stack(kernels), kernels.Config(1, 64, 4))
    exact = (y.double() * weights.double().reshape(-1, 1)).unflatten(0, experts.shape)
    return exact.sum(1), exact.abs().sum(1)


@pytest.mark.parametrize("count", [1, 5, 100])
@pytest.mark.parametrize(
    ("fmt", "activation", "gate"),
    [
        (MXFP4, None, Gate()),
        (MXFP4, MXFP8_E4M3, GPT_OSS),
        (MXINT4, MXINT8, Gate()),
        (MXFP6_E2M3, MXFP4.with_block(64), Gate("gelu")),
        (MXINT8, None, GPT_OSS),
    ],
    ids=str,
)
def test_experts(
    monkeypatch: pytest.MonkeyPatch, fmt: MXFormat, activation: MXFormat | None, gate: Gate, count: int
) -> None:
    """Against its parts, since a rounding of the middle may differ in an element for a last bit before; in a CUDA
    graph, which overlaps launches, and bit-identical on repeat. As on GPUs that have no kernel for sorted choices."""
    from mxcompile.kernels import gpu_experts

    monkeypatch.setattr(gpu_experts.gluon_grouped, "supports", lambda x: "not here")

    up, down = (make_experts(fmt, 16, *size, gate.interleaved, "cuda") for size in ((768, 640), (640, 384)))
    x, experts = 0.1 * tokens(count, 640, "cuda"), with_numbers_of_none(choose(count, 4, 16, "cuda"), 16)
    check_experts(x, experts, up, down, activation, gate)


@pytest.mark.parametrize(
    ("fmt", "activation"),
    [
        *((fmt, None) for fmt in FORMATS.values()),
        *((fmt, activation) for fmt in (MXFP4, MXINT4) for activation in (MXFP8_E4M3, MXINT8, MXFP4, MXINT4)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("gate", "hidden", "inner", "slots"), [(Gate(), 2048, 768, 8), (GPT_OSS, 2880, 2880, 4)], ids=["qwen3", "gpt-oss"]
)
def test_one_token_of_real_models(
    fmt: MXFormat, activation: MXFormat | None, gate: Gate, hidden: int, inner: int, slots: int
) -> None:
    """Qwen3-30B-A3B and gpt-oss, but for the number of experts: the configs that decode uses, one for each format."""
    sizes = ((2 * inner, hidden), (hidden, inner))
    up, down = (make_experts(fmt, 3, *size, gate.interleaved, "cuda") for size in sizes)
    check_experts(0.1 * tokens(1, hidden, "cuda"), choose(1, slots, 3, "cuda"), up, down, activation, gate)


def check_experts(
    x: Tensor, experts: Tensor, up: Experts, down: Experts, activation: MXFormat | None, gate: Gate
) -> None:
    """`gpu_experts.experts` against its parts; in a CUDA graph, and without one, its bits are equal on repeat."""
    from mxcompile.kernels import gpu_experts

    weights = torch.rand(experts.shape, device="cuda")
    rounding = None if activation is None else (activation, activation_rule(activation))
    assert gpu_experts.supports(x, rounding) is None

    def call() -> Tensor:
        return gpu_experts.experts(x, experts, weights, packed(up), packed(down), gate, rounding)

    y = call()
    assert all(torch.equal(call(), y) for _ in range(3))
    exact, magnitude = composed(x, experts, weights, up, down, rounding, gate)
    assert ((y.double() - exact).norm(dim=1) <= 2.0**-5 * magnitude.norm(dim=1)).all()
    assert ((y.double() - exact).norm() <= 2.0**-7 * magnitude.norm()).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for _ in range(4)]
    for _ in range(3):
        for result in results:
            result.fill_(1)
        graph.replay()
        assert all(torch.equal(result, y) for result in results)
