"""One token's attention in a static cache as one operator: RoPE, the write, attention, rounding; and what stays."""

import pytest
import torch
from fused_steps import compiled

from mxcompile.inductor import why_no_inductor
from mxcompile.ops import ATTEND, ATTEND_NEXT, QUANTIZE_DEQUANTIZE

pytestmark = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")
aten = torch.ops.aten
BATCH, HEADS, SHARED, KEYS, SIZE, SCALE = 2, 4, 2, 24, 32, 0.2
OURS = (ATTEND, ATTEND_NEXT, QUANTIZE_DEQUANTIZE)


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def step(q, k, v, keys, values, length, cos, sin, mask, rope=rotated):
    """As in transformers: `[batch, 1, heads * size]` of linears, a StaticLayer's update, the result to be rounded."""
    q, k, v = (part.view(BATCH, 1, -1, SIZE).transpose(1, 2) for part in (q, k, v))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    place = torch.arange(1) + length
    length.add_(1)
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v)
    y = ATTEND(q, keys, values, mask, SCALE).transpose(1, 2).reshape(BATCH, 1, -1)
    return QUANTIZE_DEQUANTIZE(y, "mxint8", "floor")


def given(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [(BATCH, 1, n * SIZE) for n in (HEADS, SHARED, SHARED)] + [(BATCH, SHARED, KEYS, SIZE)] * 2
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    angles = torch.randn(1, 1, SIZE // 2, generator=generator).repeat(1, 1, 2)
    mask = torch.arange(KEYS).expand(BATCH, 1, 1, KEYS) <= 7
    mask = mask & (torch.arange(KEYS) >= torch.tensor([0, 3])[:, None, None, None])
    return [*tensors, torch.tensor(7), angles.cos().to(dtype), angles.sin().to(dtype), mask]


def assert_same_step(function, calls_expected, tolerance=2**-6):
    """Of rounded results a few differ, by a step; and what the function writes to is the same."""
    compiled_args, eager_args = given(), given()
    result, calls = compiled(function, *compiled_args)
    assert [call for call in calls if call in OURS] == calls_expected
    expected = function(*eager_args)
    largest = expected.abs().max().item()
    assert ((result - expected).abs() > 1e-6 * largest).double().mean() <= 0.02
    torch.testing.assert_close(result, expected, rtol=0, atol=largest * tolerance)
    for actual, wanted in zip(compiled_args, eager_args, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


def test_all_of_it_is_one_operator():
    """The cache and its length are written to as before; rows behind the written one are masked, and kept."""
    assert_same_step(step, [ATTEND_NEXT])


def test_without_rope_or_with_another_one():
    def interleaved(x, cos, sin):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    def none(x, cos, sin):
        return x

    def partial(x, cos, sin):
        return torch.cat([rotated(x[..., :16], cos[..., :16], sin[..., :16]), x[..., 16:]], -1)

    for rope in (interleaved, none, partial):
        assert_same_step(lambda *args, rope=rope: step(*args, rope=rope), [ATTEND_NEXT])


def test_queries_and_keys_that_rotate_differently():
    def rope(x, cos, sin):
        return rotated(x, cos, sin if x.shape[1] == HEADS else -sin)

    assert_same_step(lambda *args: step(*args, rope=rope), [ATTEND_NEXT])


def test_a_result_that_is_not_rounded_or_in_other_blocks():
    def scaled(q, k, v, keys, values, length, cos, sin, mask):
        q, k, v = (part.view(BATCH, 1, -1, SIZE).transpose(1, 2) for part in (q, k, v))
        place = length.reshape(1)
        keys.index_copy_(2, place, k)
        values.index_copy_(2, place, v)
        y = ATTEND(q, keys, values, mask, SCALE)
        return QUANTIZE_DEQUANTIZE((y * 2).transpose(1, 2).reshape(BATCH, 1, -1), "mxint8", "floor")

    assert_same_step(scaled, [ATTEND_NEXT, QUANTIZE_DEQUANTIZE])


def another_reader(q, k, v, keys, values, length, cos, sin, mask):
    q, k, v = (part.view(BATCH, 1, -1, SIZE).transpose(1, 2) for part in (q, k, v))
    before = keys.sum()
    keys.index_copy_(2, length.reshape(1), k)
    values.index_copy_(2, length.reshape(1), v)
    return ATTEND(q, keys, values, mask, SCALE) + before


def two_places(q, k, v, keys, values, length, cos, sin, mask):
    q, k, v = (part.view(BATCH, 1, -1, SIZE).transpose(1, 2) for part in (q, k, v))
    keys.index_copy_(2, length.reshape(1), k)
    values.index_copy_(2, length.reshape(1) + 1, v)
    return ATTEND(q, keys, values, mask, SCALE)


def keys_alone(q, k, v, keys, values, length, cos, sin, mask):
    q, k, v = (part.view(BATCH, 1, -1, SIZE).transpose(1, 2) for part in (q, k, v))
    keys.index_copy_(2, length.reshape(1), k)
    return ATTEND(q, keys, values, mask, SCALE)


def rolled(q, k, v, keys, values, length, cos, sin, mask):
    """A sliding window that is full."""
    q, k, v = (part.view(BATCH, 1, -1, SIZE).transpose(1, 2) for part in (q, k, v))
    keys.copy_(torch.cat([keys[:, :, 1:], k], 2))
    values.copy_(torch.cat([values[:, :, 1:], v], 2))
    return ATTEND(q, keys, values, mask, SCALE)


@pytest.mark.parametrize("other", [another_reader, two_places, keys_alone, rolled])
def test_other_steps_stay(other):
    assert_same_step(other, [ATTEND], tolerance=1e-6)
