"""Attention over a cache in MX formats: one call over a text equals generation token by token."""

import pytest
import torch
from torch import Tensor

from mxcompile.errors import ArgumentError, MXCompileError, UnknownNameError
from mxcompile.formats import FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule
from mxcompile.numerics.cache_format import CacheFormat, head_rotation
from mxcompile.numerics.cached_attention import cached_attention, rounded_keys, rounded_values
from mxcompile.numerics.hadamard import rotate_input
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.ops import DEQUANTIZE, QUANTIZE

CAUSAL = {"mask": None, "scale": 0.125, "is_causal": True}
TEXTS = [
    "key=mxint8,value=mxint8",
    "key=mxint8,value=mxint4,window=32",
    "key=none,value=mxfp4,sink=4",
    "key=mxint4:16,value=none,window=8,sink=2,rotate=head",
    "key=mxint4,value=mxint8,rotate=head,shift=mean",
]


def states(tokens: int = 40, heads: int = 6, kv_heads: int = 2, size: int = 64, value_size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size))
    return [torch.randn(2, count, tokens, width, generator=generator) for count, width in shapes]


@pytest.mark.parametrize("text", TEXTS)
def test_text_form(text):
    assert str(CacheFormat.parse(text)) == text
    assert CacheFormat.parse(str(CacheFormat.parse(text))) == CacheFormat.parse(text)


def test_text_form_leaves_out_defaults():
    assert CacheFormat.parse("mxint4") == CacheFormat(MXINT4, MXINT4)
    assert CacheFormat.parse("window=32") == CacheFormat(MXINT8, MXINT8, 32)
    assert CacheFormat() == CacheFormat(MXINT8, MXINT8)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("keys=mxint8", UnknownNameError, "part of a cache format"),
        ("key=mxint8,key=mxint4", MXCompileError, "every part once"),
        ("key=mxint9", MXCompileError, "2 to 8 bits"),
        ("window=-1", MXCompileError, "window is a number of tokens"),
        ("rotate=all", UnknownNameError, "rotation of a cache"),
        ("shift=max", UnknownNameError, "shift of a cache"),
        ("key=mxfp8_e4m3+aligned", MXCompileError, "not aligned"),
    ],
)
def test_wrong_texts_are_named(text, error, message):
    with pytest.raises(error, match=message):
        CacheFormat.parse(text)


def test_wrong_values_are_named():
    with pytest.raises(ArgumentError, match="window is a bool"):
        CacheFormat(window=True)
    with pytest.raises(MXCompileError, match="sink is a number of tokens, 0 or more, not -1"):
        CacheFormat(sink=-1)


def test_scale_rules_are_the_formats_own():
    rules = {fmt: CacheFormat(fmt, fmt).key_rule for fmt in (MXINT8, MXFP8_E4M3, MXFP4)}
    assert rules == {MXINT8: ScaleRule.FLOOR, MXFP8_E4M3: ScaleRule.RCEIL, MXFP4: ScaleRule.T725}
    assert CacheFormat(None, MXINT4).key_rule is None
    assert CacheFormat(MXINT4, None).value_rule is None


@pytest.mark.parametrize(
    ("text", "size", "count"),
    [("none", 128, 8 * 2 * 256), ("mxint8", 128, 8 * 2 * 132), ("mxint4", 128, 8 * 2 * 68), ("mxint8", 80, 8 * 2 * 99)],
)
def test_bytes_of_a_token(text, size, count):
    """132 bytes for a head of 128 in 8 bits against 256 in half precision; 80 channels are padded to 3 blocks."""
    assert CacheFormat.parse(text).bytes_per_token(8, size, size) == count


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_rounding_is_that_of_the_packed_layout(fmt, size):
    """What `mx::quantize` packs for `[batch, kv heads, tokens, head_dim]`, one token at a time or all at once."""
    key = states(5, size=size)[1]
    cache = CacheFormat(fmt, fmt)
    packed = QUANTIZE(key, str(fmt), str(cache.key_rule))
    assert packed[0].shape == (2, 2, 5, fmt.blocks(size) * fmt.block_bytes)
    assert packed[1].shape == (2, 2, 5, fmt.blocks(size))
    assert torch.equal(DEQUANTIZE(*packed, str(fmt), size, torch.float32), rounded_keys(key, cache))
    tokens = [rounded_values(token, cache) for token in key.split(1, dim=2)]
    assert torch.equal(torch.cat(tokens, 2), rounded_values(key, cache))


def test_a_rotation_of_keys_rounds_the_rotated_head():
    key = states(5, size=96)[1]
    key[..., 3] *= 50  # an outlier that costs its block all precision
    assert head_rotation(96) == 32
    rotated, plain = (rounded_keys(key, CacheFormat(MXINT4, None, rotate=on)) for on in (True, False))
    expected = rounded_keys(rotate_input(key, 32), CacheFormat(MXINT4, None))
    torch.testing.assert_close(rotate_input(rotated, 32), expected, rtol=1e-5, atol=1e-5)
    others = [i for i in range(96) if i != 3]
    assert sqnr_db(key[..., others], rotated[..., others]) > sqnr_db(key[..., others], plain[..., others]) + 3
    assert torch.equal(rounded_values(key, CacheFormat(None, MXINT4, rotate=True)), plain)


def test_a_shift_takes_out_what_all_keys_share():
    """The same up to a number for each query, which its softmax does not see; the mean is that of the prompt."""
    query, key, value = states(40)
    offset = torch.linspace(-30, 30, 64)
    plain, shifted = CacheFormat(MXINT4, None), CacheFormat(MXINT4, None, shift=True)
    errors = [sqnr_db(key + offset, rounded_keys(key + offset, cache)) for cache in (plain, shifted)]
    assert errors[1] > errors[0] + 15
    expected = cached_attention(query, key, value, cache=shifted, **CAUSAL)
    actual = cached_attention(query, key + offset, value, cache=shifted, **CAUSAL)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    of_prompt = rounded_keys(key, shifted, 10)
    wanted = rounded_keys(key - key[:, :, :10].mean(2, keepdim=True), plain)
    torch.testing.assert_close(of_prompt - key[:, :, :10].mean(2, keepdim=True), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4, 64, 64), (6, 2, 80, 80), (8, 1, 128, 64)], ids=str)
def test_a_float_cache_is_plain_attention(shape):
    query, key, value = states(300, *shape)
    repeated = (part.repeat_interleave(shape[0] // shape[1], 1) for part in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.125)
    actual = cached_attention(query, key, value, cache=CacheFormat(None, None), **CAUSAL)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def generated(states: list[Tensor], cache: CacheFormat, prompt_length: int) -> Tensor:
    """Attention of a prompt and then of one token at a time, each of which sees a list of what it may read."""
    query, key, value = (part.double() for part in states)
    group = query.shape[1] // key.shape[1]
    stored = [rounded_keys(states[1], cache, prompt_length).double(), rounded_values(states[2], cache).double()]
    outputs = []
    for i in range(query.shape[2]):
        exact = [i < prompt_length or i - j < cache.window or j < cache.sink for j in range(i + 1)]
        keys, values = (
            torch.stack([(part if e else low)[:, :, j] for j, e in enumerate(exact)], 2).repeat_interleave(group, 1)
            for part, low in zip((key, value), stored, strict=True)
        )
        weights = (query[:, :, i : i + 1] @ keys.mT * 0.125).softmax(-1)
        outputs.append(weights @ values)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("text", [*TEXTS, "mxint4", "key=mxint4,value=mxint4,window=1"])
@pytest.mark.parametrize("prompt_length", [0, 17])
def test_one_call_is_generation_token_by_token(text, prompt_length):
    cache, given = CacheFormat.parse(text), states()
    actual = cached_attention(*given, cache=cache, prompt_length=prompt_length, **CAUSAL)
    torch.testing.assert_close(
        actual.double(), generated(given, cache, prompt_length), rtol=2e-5, atol=2e-6, check_dtype=False
    )


def test_the_last_queries_alone_give_the_last_rows():
    """As in a decode step, whose query is behind all keys; and at a place of its own, as in a static cache."""
    cache, (query, key, value) = CacheFormat.parse("key=mxint4,value=mxint4,window=8,sink=2"), states(40)
    whole = cached_attention(query, key, value, cache=cache, **CAUSAL)
    last = cached_attention(query[:, :, -3:], key, value, cache=cache, **CAUSAL)
    torch.testing.assert_close(last, whole[:, :, -3:], rtol=1e-5, atol=1e-6)
    longer = [torch.nn.functional.pad(part, (0, 0, 0, 9), value=7.0) for part in (key, value)]
    placed = cached_attention(query[:, :, -3:], *longer, cache=cache, first_query=37, **CAUSAL)
    torch.testing.assert_close(placed, last, rtol=1e-5, atol=1e-6)


def test_masks_hide_keys_and_a_query_that_sees_none_is_zero():
    query, key, value = states(300)
    cache = CacheFormat(MXINT4, MXINT4, window=4)
    visible = torch.ones(300, 300, dtype=torch.bool).tril().expand(2, 1, 300, 300).clone()
    visible[1, :, :, :5] = False
    plain = {"scale": 0.125, "is_causal": False, "cache": cache}
    hidden = cached_attention(query, key, value, visible, **plain)
    added = cached_attention(query, key, value, torch.where(visible, 0.0, -torch.inf), **plain)
    assert torch.equal(hidden, added)
    assert torch.equal(hidden[1, :, :5], torch.zeros(6, 5, 64))
    causal = cached_attention(query, key, value, cache=cache, **CAUSAL)
    torch.testing.assert_close(hidden[0], causal[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_query(dtype):
    given = [part.to(dtype) for part in states()]
    cache = CacheFormat(MXINT8, MXINT8, window=4)
    actual = cached_attention(*given, cache=cache, **CAUSAL)
    expected = cached_attention(*(part.float() for part in given), cache=cache, **CAUSAL)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))
