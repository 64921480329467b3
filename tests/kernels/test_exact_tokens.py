"""triton/attention/exact_tokens.py in Triton's interpreter, against float64."""

from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.formats import MXINT4, MXINT8, MXFormat, activation_rule
from mxcompile.numerics.exact_tokens import ExactTokens, attend_packed_exact
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import QUANTIZE

BATCH, HEADS, SHARED, SIZE = 2, 6, 2, 64


def packed(states: Tensor, fmt: MXFormat) -> PackedStates:
    return PackedStates(*QUANTIZE(states, str(fmt), str(activation_rule(fmt))), fmt, states.shape[-1])


def held_by_a_ring(states: Tensor, position: int, room: int) -> tuple[Tensor, Tensor]:
    """The tokens before `position` in a ring, and their places."""
    newest, held = (
        torch.full((*states.shape[:2], room, states.shape[3]), torch.nan, dtype=states.dtype),
        torch.full((room,), -1),
    )
    for place in range(max(0, position - room), position):
        newest[:, :, place % room], held[place % room] = states[:, :, place], place
    return newest, held


PLACES = [(90, 70, 32, 4), (90, 2, 32, 4), (90, 0, 32, 0), (40, 39, 1, 0), (200, 150, 0, 40), (90, 33, 33, 8)]
PLACES += [(70, 3, 0, 5), (11, 10, 32, 2), (70, 69, 32, 0)]
"""Tokens, position, window, sink."""


@pytest.mark.parametrize(
    ("place", "mask", "key_format"), crossed(PLACES, ["heads", "", "left"], [MXINT4, MXINT8]), ids=str
)
def test_values_are_those_of_the_definition(
    interpreted: SimpleNamespace, place: tuple[int, int, int, int], mask: str, key_format: MXFormat
) -> None:
    tokens, position, window, sink = place
    generator = torch.Generator().manual_seed(tokens + position)
    key, value = (torch.randn(BATCH, SHARED, tokens, SIZE, generator=generator).bfloat16() for _ in range(2))
    query, turned = (torch.randn(BATCH, HEADS, 1, SIZE, generator=generator).bfloat16() for _ in range(2))
    # Packed states have other values than exact ones, so that a token of the wrong kind shows.
    keys, values = packed(-2 * key, key_format), packed(3 * value, MXINT4)
    held, exact = torch.zeros(0, dtype=torch.int64), []
    for states in (key, value):
        newest = None
        if window > 1:
            newest, held = held_by_a_ring(states, position, window - 1 + 5)
        exact.append(ExactTokens(states[:, :, position : position + 1], newest, states[:, :, :sink] if sink else None))
    if window > 8 and position > 8:
        held[(position - 8) % len(held)] = position + 1  # that token and those before are read as they were rounded
    given = None
    if mask:
        given = torch.rand(BATCH, HEADS if mask == "heads" else 1, 1, tokens, generator=generator) < 0.6
        given[..., position] = True
        given = torch.where(given, 0.5, -torch.inf).bfloat16() if mask == "heads" else given
    at, module = torch.tensor([position]), interpreted.packed_attention
    y = module.attend(
        turned, keys, values, given, 0.1, position=at, exact=module.Exact(query, exact[0], exact[1], held, window)
    )
    doubled = [ExactTokens(*(x if x is None else x.clone() for x in vars(part).values())) for part in exact]
    expected = attend_packed_exact(
        query, turned, (keys, values), (doubled[0], doubled[1]), held, at, window, given, 0.1
    )
    assert ((y - expected).float().norm() / expected.float().norm()).item() <= 5e-3


@pytest.mark.parametrize("fmt", [MXINT4, pytest.param(MXINT8, marks=pytest.mark.slow)], ids=str)
def test_compiles_for_hopper(fmt: MXFormat) -> None:
    pytest.importorskip("triton")
    from sass import SHARED_BYTES, packed_attention_report

    report, config = packed_attention_report(fmt, (32, 4, 63, 32, True))
    assert report.spilled_bytes == 0
    assert report.registers <= 65536 // (32 * config.warps * 2)
    assert report.shared_bytes <= SHARED_BYTES // 2
