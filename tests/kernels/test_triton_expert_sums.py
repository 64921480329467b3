"""triton/expert_sums.py against float64 in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from grouped import choose, make_experts, several_tiles, sum_over_bound, tokens

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXFP4, MXFP6_E2M3, MXINT8, MXFormat


@pytest.fixture
def kernels(interpreted: SimpleNamespace) -> SimpleNamespace:
    return interpreted.expert_sums


SUMS = [
    (2, {"out": 64, "slices": 2}),
    (4, {"out": 16, "slices": 8, "parts": 2, "held": 2, "decoded": True}),
    (4, {"out": 16, "slices": 8, "parts": 2}),
    (3, {"out": 32, "slices": 4}),
    (6, {"out": 32, "slices": 4}),
    (1, {"out": 128, "slices": 4, "parts": 4}),
    (4, {"out": 16, "slices": 8, "parts": 2, "held": 2}),
    (3, {"out": 8, "slices": 4, "held": 2}),
    (4, {"out": 8, "slices": 8, "parts": 2, "held": 1, "decoded": True}),
    (6, {"out": 32, "slices": 4, "held": 1}),
]


@pytest.mark.parametrize(
    ("slots", "options", "fmt"),
    [
        *((*each, MXFP4) for each in SUMS),
        *((*each, fmt) for each in SUMS[:2] for fmt in (MXINT8, MXFP6_E2M3)),
    ],
    ids=str,
)
def test_multiply_and_sum(kernels: SimpleNamespace, slots: int, options: dict[str, int], fmt: MXFormat) -> None:
    out = several_tiles(options["out"])
    down, experts = make_experts(fmt, 5, out, 360, with_bias=slots % 2 == 0), choose(5, slots, 5)
    h = tokens(5 * slots, 360)
    if slots > 1:
        experts[0], experts[2, 1], experts[4] = -1, 5, torch.arange(slots) + 2**33
        h[~down.chosen(experts)[0]] = torch.nan  # such rows are never written
    weights = torch.randn(5, slots, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = kernels.multiply_and_sum(h, experts, weights, down.stack(kernels), kernels.Config(**options))
    assert (y.shape, y.dtype) == ((5, out), torch.bfloat16)
    assert sum_over_bound(y, h, experts, weights, down) <= 1


def test_any_stride_and_no_rows(kernels: SimpleNamespace) -> None:
    down, h = make_experts(MXFP4, 3, 64, 77), tokens(12, 200)[:, 5:82]
    stack, config = down.stack(kernels), kernels.Config()
    weights, experts = torch.rand(3, 6).T[:, :2], choose(2, 6, 3).T
    y = kernels.multiply_and_sum(h, experts, weights, stack, config)
    assert sum_over_bound(y, h, experts, weights, down) <= 1
    assert kernels.multiply_and_sum(h[:0], experts[:0], weights[:0], stack, config).shape == (0, 64)
    assert not kernels.multiply_and_sum(h[:0], experts[:, :0], weights[:, :0], stack, config).any()


def test_what_does_not_fit(kernels: SimpleNamespace) -> None:
    stack, experts, weights = make_experts(MXFP4, 2, 64, 64).stack(kernels), choose(2, 1, 2), torch.ones(2, 1)
    with pytest.raises(MXCompileError, match="cannot take"):
        kernels.multiply_and_sum(tokens(2, 65), experts, weights, stack, kernels.Config())
    refused = ({"choices": 2}, {"slices": 4, "parts": 3}, {"out": 8}, {"out": 4, "held": 1}, {"decoded": True})
    for options in refused:
        with pytest.raises(MXCompileError, match="takes no Config"):
            kernels.multiply_and_sum(tokens(2, 64), experts, weights, stack, kernels.Config(**options))


@pytest.mark.parametrize(("tokens_", "slots", "size"), [(1, 1, 64), (3, 8, 1100), (2, 5, 512), (0, 2, 64), (2, 0, 64)])
def test_weighted_sum(kernels: SimpleNamespace, tokens_: int, slots: int, size: int) -> None:
    rows, weights = tokens(tokens_ * slots, size), torch.randn(slots, tokens_).T
    y = kernels.weighted_sum(rows, weights)
    exact = (rows.double().unflatten(0, (tokens_, slots)) * weights.double()[..., None]).sum(1)
    lost = (rows.double().unflatten(0, (tokens_, slots)) * weights.double()[..., None]).abs().sum(1) * slots * 2.0**-23
    assert (y.shape, y.dtype) == ((tokens_, size), torch.bfloat16)
    assert ((y.double() - exact).abs() <= lost + 2.0**-8 * (exact.abs() + lost) + 2.0**-134).all()
