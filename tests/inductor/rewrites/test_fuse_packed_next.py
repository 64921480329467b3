"""One token's attention in a static cache of packed keys and values as one operator, and what stays two or more."""

import pytest
import torch
from fused_steps import compiled

from mxcompile.inductor import why_no_inductor
from mxcompile.ops import ATTEND_PACKED, ATTEND_PACKED_NEXT, QUANTIZE, QUANTIZE_DEQUANTIZE, ROTATE

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")
BATCH, HEADS, SHARED, TOKENS, SIZE, SCALE = 2, 4, 2, 24, 64, 0.2
OURS = (ATTEND_PACKED, ATTEND_PACKED_NEXT, QUANTIZE, QUANTIZE_DEQUANTIZE, ROTATE)


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def heads(*parts):
    return tuple(part.view(BATCH, 1, -1, SIZE).transpose(1, 2) for part in parts)


def written(cache, parts, place, formats=("mxint8", "mxint4")):
    for i, (part, fmt) in enumerate(zip(parts, formats, strict=True)):
        for into, rows in zip(cache[2 * i : 2 * i + 2], QUANTIZE(part, fmt, "floor"), strict=True):
            into.index_copy_(2, place, rows)


def step(q, k, v, *rest, turn=lambda x: x):
    """As an MXCache in a model of transformers does it."""
    *cache, length, cos, sin, mask = rest
    q, k, v = heads(q, k, v)
    q, k = (rotated(part, cos.unsqueeze(1), sin.unsqueeze(1)) for part in (q, k))
    place = torch.arange(1) + length
    length.add_(1)
    written(cache, (turn(k), v), place)
    y = ATTEND_PACKED(turn(q), *cache, mask, SCALE, "mxint8", "mxint4", SIZE)
    return QUANTIZE_DEQUANTIZE(y.transpose(1, 2).reshape(BATCH, 1, -1), "mxint8", "floor")


def given():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(BATCH, 1, n * SIZE, generator=generator) for n in (HEADS, SHARED, SHARED)]
    states = torch.randn(BATCH, SHARED, TOKENS, SIZE, generator=generator)
    cache = [part for fmt in ("mxint8", "mxint4") for part in QUANTIZE(states, fmt, "floor")]
    angles = torch.randn(1, 1, SIZE // 2, generator=generator).repeat(1, 1, 2)
    return [*tensors, *cache, torch.tensor(7), angles.cos(), angles.sin(), torch.arange(TOKENS) <= 7]


def assert_same_step(function, calls_expected):
    """A few rounded results differ, by a step; and bytes of the token by one step of an element."""
    compiled_args, eager_args = given(), given()
    result, calls = compiled(function, *compiled_args)
    assert [call for call in calls if call in OURS] == calls_expected
    expected = function(*eager_args)
    largest = expected.abs().max().item()
    assert ((result - expected).abs() > 1e-6 * largest).double().mean() <= 0.02
    torch.testing.assert_close(result, expected, rtol=0, atol=largest * 2**-6)
    for actual, wanted in zip(compiled_args, eager_args, strict=True):
        if actual.dtype == torch.uint8:
            assert (actual != wanted).double().mean() <= 0.001
            assert torch.equal(actual[:, :, :7], wanted[:, :, :7])
        else:
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


def test_all_of_it_is_one_operator():
    assert_same_step(step, [ATTEND_PACKED_NEXT])


def test_rotated_keys_are_rounded_as_they_are():
    def turned(*args):
        return step(*args, turn=lambda x: ROTATE(x, SIZE))

    assert_same_step(turned, [ROTATE, ROTATE, ATTEND_PACKED_NEXT])


def another_reader(q, k, v, *rest):
    *cache, length, _, _, mask = rest
    before = cache[0].sum()
    q, k, v = heads(q, k, v)
    written(cache, (k, v), length.reshape(1))
    return ATTEND_PACKED(q, *cache, mask, SCALE, "mxint8", "mxint4", SIZE) + before


def two_places(q, k, v, *rest):
    *cache, length, _, _, mask = rest
    q, k, v = heads(q, k, v)
    written(cache[:2], (k,), length.reshape(1), ("mxint8",))
    written(cache[2:], (v,), length.reshape(1) + 1, ("mxint4",))
    return ATTEND_PACKED(q, *cache, mask, SCALE, "mxint8", "mxint4", SIZE)


def scales_of_others(q, k, v, *rest):
    *cache, length, _, _, mask = rest
    q, k, v = heads(q, k, v)
    elements, _ = QUANTIZE(k, "mxint8", "floor")
    _, scales = QUANTIZE(k * 2, "mxint8", "floor")
    cache[0].index_copy_(2, length.reshape(1), elements)
    cache[1].index_copy_(2, length.reshape(1), scales)
    written(cache[2:], (v,), length.reshape(1), ("mxint4",))
    return ATTEND_PACKED(q, *cache, mask, SCALE, "mxint8", "mxint4", SIZE)


@pytest.mark.parametrize("other", [another_reader, two_places, scales_of_others], ids=lambda f: f.__name__)
def test_what_is_written_or_read_otherwise_is_left(other):
    assert_same_step(other, [ATTEND_PACKED])
