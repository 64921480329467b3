"""triton/routing.py in Triton's interpreter, against a sort in plain Python."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxcompile.errors import MXCompileError


def sorted_choices(experts: Tensor, count: int, tile: int) -> tuple[list[int], list[int], list[int]]:
    """choices (up to the last block in use), block_experts in use, and position, as in routing.py."""
    flat = experts.flatten().tolist()
    choices, block_experts, position = [], [], [-1] * len(flat)
    for expert in range(count):
        chosen = [choice for choice, number in enumerate(flat) if number == expert]
        for rank, choice in enumerate(chosen):
            position[choice] = len(choices) + rank
        blocks = -(-len(chosen) // tile)
        choices += chosen + [-1] * (blocks * tile - len(chosen))
        block_experts += [expert] * blocks
    return choices, block_experts, position


def check(interpreted: SimpleNamespace, experts: Tensor, count: int, tile: int) -> None:
    routing = interpreted.routing.route(experts, count, tile)
    choices, block_experts, position = sorted_choices(experts, count, tile)
    blocks = interpreted.routing.most_blocks(experts.numel(), count, tile)
    assert routing.used.tolist() == [len(block_experts)]
    assert len(block_experts) <= blocks
    assert (len(routing.block_experts), routing.slots) == (blocks, blocks * tile)
    assert routing.block_experts.tolist() == block_experts + [-1] * (blocks - len(block_experts))
    held = [sum(choice >= 0 for choice in choices[i * tile : (i + 1) * tile]) for i in range(blocks)]
    assert routing.block_tokens.tolist() == held
    assert routing.choices.tolist() == choices + [-1] * (blocks * tile - len(choices))
    assert routing.position.shape == experts.shape
    assert routing.position.flatten().tolist() == position


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 90),
    k=st.integers(1, 9),
    count=st.integers(1, 140),
    tile=st.sampled_from([16, 64, 128]),
    skew=st.sampled_from([0.2, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_sorts_by_expert(
    interpreted: SimpleNamespace, tokens: int, k: int, count: int, tile: int, skew: float, seed: int
) -> None:
    """Also uneven choices, and numbers that are not those of an expert."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, k, generator=generator)
    check(interpreted, (uniform**skew * (count + 2)).to(torch.int64) - 1, count, tile)


def test_many_choices(interpreted: SimpleNamespace) -> None:
    """More than one step in a chunk; all choices of one expert; none of any; strides; 32 bits."""
    experts = torch.randint(0, 8, (6000, 3), generator=torch.Generator().manual_seed(0))
    check(interpreted, experts, 8, 64)
    check(interpreted, experts.clamp(max=0), 8, 64)
    check(interpreted, experts[:50] + 8, 8, 64)
    check(interpreted, experts.T[:2, :50], 8, 64)
    check(interpreted, experts[:50].int(), 8, 64)


def test_numbers_beyond_32_bits_are_those_of_no_expert(interpreted: SimpleNamespace) -> None:
    check(interpreted, torch.tensor([[2**32 + 1, -(2**63)], [1, 2**63 - 1]]), 4, 16)


@pytest.mark.parametrize("size", [8, 1000, 1025])
def test_rows_there_and_back(interpreted: SimpleNamespace, accesses: ..., size: int) -> None:
    routing, generator = interpreted.routing, torch.Generator().manual_seed(size)
    experts = torch.randint(-1, 6, (9, 3), generator=generator)
    x = torch.randn(9, 2 * size, generator=generator).to(torch.bfloat16)[:, :size]
    routed = routing.route(experts, 5, 16)
    rows = routing.gather(x, routed)
    filled = routed.choices >= 0
    assert torch.equal(rows[filled], x[routed.choices[filled] // 3])
    rows[~filled] = torch.nan
    inside = ((experts >= 0) & (experts < 5))[..., None]
    back = routing.ungather(rows, routed).view(9, 3, size)
    assert torch.equal(back, torch.where(inside, x[:, None], 0))
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.rand(3, 9, generator=generator).to(dtype).T
        accesses.loads.clear()
        accesses.stores.clear()
        total = routing.weighted_sum(rows, routed, weights, torch.bfloat16)
        accesses.assert_within([rows, routed.position, weights], total)
        expected = (torch.where(inside, x[:, None], 0).double() * weights[..., None].double()).sum(1)
        error = (3 + 1) * 2.0**-24 * (x[:, None].double().abs() * weights[..., None].double() * inside).sum(1)
        assert ((total.double() - expected).abs() <= error * 1.01 + 2.0**-8 * expected.abs()).all()
        assert (total.dtype, total.shape) == (torch.bfloat16, (9, size))


def test_refuses_what_is_no_table_of_choices(interpreted: SimpleNamespace) -> None:
    with pytest.raises(MXCompileError, match="cannot be sorted"):
        interpreted.routing.route(torch.zeros(4, dtype=torch.int64), 4, 16)
