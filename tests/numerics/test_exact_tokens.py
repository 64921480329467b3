"""numerics/exact_tokens.py, and its operators, against attention over decoded states."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import MXINT4, MXINT8
from mxcompile.numerics.exact_tokens import ExactTokens, attend_packed_exact, put_exact
from mxcompile.numerics.packed_attention import PackedStates
from mxcompile.ops import ATTEND_PACKED_EXACT, QUANTIZE, READ_CACHE, ROTATE

POSITION, WINDOW, SIZE = torch.tensor([20]), 8, 32


def cache(seed: int, fmt: str) -> tuple[list[Tensor], ExactTokens]:
    """Packed states of 2 x 2 x 30 tokens; and exact ones of others, so that they differ."""
    generator = torch.Generator().manual_seed(seed)
    states, others = (torch.randn(2, 2, 30, SIZE, generator=generator) for _ in range(2))
    newest = torch.randn(2, 2, WINDOW + 3, SIZE, generator=generator)
    return [*QUANTIZE(states, fmt, "floor")], ExactTokens(others[:, :, :1], newest, others[:, :, 1:4])


def held() -> Tensor:
    places = torch.full((WINDOW + 3,), -1)
    for place in range(20 - WINDOW - 2, 20):
        places[place % (WINDOW + 3)] = place
    places[16 % (WINDOW + 3)] = 27
    return places


def operands(window: int = WINDOW) -> tuple[list[Tensor | None], tuple[ExactTokens, ExactTokens], list[Tensor]]:
    (keys, exact_keys), (values, exact_values) = cache(0, "mxint8"), cache(1, "mxint4")
    pairs = zip(*((part.own, part.newest, part.first) for part in (exact_keys, exact_values)), strict=True)
    return [part for pair in pairs for part in pair], (exact_keys, exact_values), [*keys, *values]


@pytest.mark.parametrize("block", [1, 16, SIZE])
def test_attention_reads_what_the_cache_gives(block: int) -> None:
    exact_parts, exact, packed = operands()
    query = torch.randn(2, 4, 1, SIZE, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(30) != 5
    read = [
        READ_CACHE(*packed[2 * i : 2 * i + 2], *vars(exact[i]).values(), held(), POSITION, fmt, turn, WINDOW)
        for i, (fmt, turn) in enumerate((("mxint8", block), ("mxint4", 1)))
    ]
    turned = query if block == 1 else ROTATE(query, block) * (1 if block.bit_length() % 2 else 2)
    args = (query, turned, *packed, *exact_parts, held(), POSITION, mask, 0.3, "mxint8", "mxint4", WINDOW)
    torch.library.opcheck(ATTEND_PACKED_EXACT, args, test_utils=("test_schema", "test_faketensor"))
    key, value = (states[:, :, :21].repeat_interleave(2, 1) for states in read)
    scores = (query @ key.mT * 0.3).masked_fill(~mask[:21], -torch.inf)
    torch.testing.assert_close(ATTEND_PACKED_EXACT(*args), scores.softmax(-1) @ value, rtol=1e-5, atol=1e-5)


def test_which_tokens_are_exact() -> None:
    _, exact, packed = operands()
    args = (*packed[:2], *vars(exact[0]).values(), held(), POSITION, "mxint8", 1, WINDOW)
    torch.library.opcheck(READ_CACHE, args, test_utils=("test_schema", "test_faketensor"))
    decoded = PackedStates(packed[0], packed[1], MXINT8, SIZE).values(torch.float32)
    changed = (READ_CACHE(*args) != decoded).any(-1).all((0, 1)).nonzero().flatten().tolist()
    assert changed == [0, 1, 2, 17, 18, 19, 20]  # 16 has left the ring
    rounded = put_exact(decoded.clone(), replace(exact[0], newest=None, first=None), held()[:0], POSITION, 0, False)
    assert torch.equal(rounded, decoded)


def test_shapes_that_do_not_fit_are_refused() -> None:
    _, exact, packed = operands()
    states = (PackedStates(packed[0], packed[1], MXINT8, SIZE), PackedStates(packed[2], packed[3], MXINT4, SIZE))
    query = torch.randn(2, 4, 1, SIZE)
    for wrong in (
        replace(exact[1], own=exact[1].own.repeat(1, 1, 2, 1)),
        replace(exact[1], newest=torch.randn(2, 2, 5, SIZE)),
        replace(exact[1], first=torch.randn(2, 2, 31, SIZE)),
    ):
        with pytest.raises(MXCompileError, match=r"the exact \w+ states \[.*\] do not fit a cache of \[2, 2, 30, 32\]"):
            attend_packed_exact(query, query, states, (exact[0], wrong), held(), POSITION, WINDOW, None, 1.0)
