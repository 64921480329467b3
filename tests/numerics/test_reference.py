"""Properties of the reference that hold for every format, scale rule and block size, and its numbers written down.

Agreement with other implementations is in test_oracles.py; here is what must hold whatever the oracle: idempotence,
exact scaling by powers of two, NaN staying in its block, padding, the error bound, exactness in bfloat16.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from mxcompile.formats import BLOCK_SIZES, FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXINT6, MXINT8, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.reference import dequantize, quantize, quantize_dequantize

FLOOR, EVEN, RCEIL, CEIL, T725, MSE = ScaleRule
FLOAT32_MAX = torch.finfo(torch.float32).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, SIZE = 8, 256

# From the table of formats in the OCP specification (MXINT6 and MXINT4: arXiv 2405.07135).
ELEMENTS = {  # largest, least normal, least subnormal
    "mxfp8_e5m2": (57344, 2.0**-14, 2.0**-16),
    "mxfp8_e4m3": (448, 2.0**-6, 2.0**-9),
    "mxfp6_e3m2": (28, 0.25, 0.0625),
    "mxfp6_e2m3": (7.5, 1, 0.125),
    "mxfp4": (6, 1, 0.5),
    "mxint8": (127 / 64, 1, 2.0**-6),
    "mxint6": (31 / 16, 1, 2.0**-4),
    "mxint4": (7 / 4, 1, 0.25),
}

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
examples = settings(derandomize=True, deadline=None, database=None, max_examples=5)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are small: on a busy machine torch's threads wait for each other, at twenty times the cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(fmt: MXFormat) -> list[tuple[MXFormat, ScaleRule]]:
    """Every block size and rule; 7.25 is a rule of MXFP4 alone."""
    rules = [rule for rule in ScaleRule if rule is not T725 or fmt == MXFP4]
    return [(fmt.with_block(block), rule) for block in BLOCK_SIZES for rule in rules]


@st.composite
def rows(draw: st.DrawFn, low: int = -149, high: int = 128) -> Tensor:
    """float32 `[ROWS, SIZE]`, every row of its own magnitude and tail, with a few arbitrary values put in."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    normal = torch.randn(2, ROWS, SIZE, generator=generator, dtype=torch.float64)
    spread = torch.randint(0, 5, (ROWS, 1), generator=generator)
    exponent = torch.randint(low, high, (ROWS, 1), generator=generator).double()
    x = normal[0] * torch.exp(spread * normal[1]) * torch.exp2(exponent)
    x = x.clamp(-FLOAT32_MAX, FLOAT32_MAX).float()
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    for index, value in draw(st.lists(st.tuples(st.integers(0, ROWS * SIZE - 1), finite), max_size=8)):
        x.view(-1)[index] = value
    return x


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.is_floating_point():
        a, b = (t.view({2: torch.int16, 4: torch.int32}[t.element_size()]) for t in (a, b))
    assert torch.equal(a, b)


def decoded(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    return dequantize(*quantize(x, fmt, rule), fmt, x.shape[-1], x.dtype)


@each_dtype
@each_format
def test_shapes_and_dtypes(fmt, dtype):
    for f, rule in cases(fmt):
        x = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
        codes, scales = quantize(x, f, rule)
        blocks = math.ceil(100 / f.block_size)
        assert (codes.dtype, scales.dtype) == (torch.uint8, torch.uint8)
        assert (codes.shape, scales.shape) == ((2, 3, blocks * f.block_size), (2, 3, blocks))
        assert codes.int().max() < 2**f.bits
        assert decoded(x, f, rule).shape == x.shape
        assert quantize_dequantize(x, f, rule).dtype == dtype


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,), (1,)], ids=str)
def test_tensors_with_nothing_or_one_value(shape):
    assert_same_bits(decoded(torch.ones(shape), MXFP4, FLOOR), torch.ones(shape))


def test_strided_input():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(quantize(x.T, MXINT4, MSE), quantize(x.T.contiguous(), MXINT4, MSE), strict=True):
        assert torch.equal(got, expected)


@each_format
@given(x=rows())
@examples
def test_quantize_dequantize_is_both_steps(fmt, x):
    for f, rule in cases(fmt):
        for dtype in DTYPES:
            note(f"{f} {rule} {dtype}")
            limit = torch.finfo(dtype).max
            y = x.clamp(-limit, limit).to(dtype)
            assert_same_bits(quantize_dequantize(y, f, rule), decoded(y, f, rule))


@pytest.mark.parametrize("fmt", [MXINT8, MXINT6, MXINT4], ids=str)
def test_integer_formats_have_one_zero(fmt):
    x = torch.tensor([1.0, -0.001, -0.0])
    assert_same_bits(quantize_dequantize(x, fmt, FLOOR), decoded(x, fmt, FLOOR))


@each_format
@given(x=rows())
@examples
def test_quantize_on_its_own_scales_gives_its_codes(fmt, x):
    for f, rule in cases(fmt):
        note(f"{f} {rule}")
        codes, scales = quantize(x, f, rule)
        assert torch.equal(reference.quantize_on_scales(x, scales, f), codes)


@each_format
@given(x=rows())
@examples
def test_decoded_values_quantize_to_themselves(fmt, x):
    for f, rule in cases(fmt):
        note(f"{f} {rule}")
        once = decoded(x, f, rule)
        assert_same_bits(decoded(once, f, rule), once)


@each_format
@given(x=rows())
@examples
def test_error_is_half_a_step_unless_saturated(fmt, x):
    for f, rule in cases(fmt):
        note(f"{f} {rule}")
        codes, scales = quantize(x, f, rule)
        scale = torch.exp2(scales.double() - 127).repeat_interleave(f.block_size, -1)
        v, element = x.double() / scale, reference.decode(codes, f).double()
        exponent = torch.frexp(v).exponent - 1
        step = torch.exp2(exponent.clamp(f.emin, f.emax).double() - f.mantissa_bits)
        near = (v - element).abs() <= step / 2
        saturated = (v.abs() > f.max_value) & (element == f.max_value * v.sign())
        assert (near | saturated).all()


@each_format
@given(x=rows())
@examples
def test_rounding_is_monotonic(fmt, x):
    for f, rule in cases(fmt):
        note(f"{f} {rule}")
        increasing = x.unflatten(-1, (-1, f.block_size)).sort(-1).values.flatten(-2)
        y = decoded(increasing, f, rule).unflatten(-1, (-1, f.block_size))
        assert (y.diff(dim=-1) >= 0).all()


@each_format
@given(x=rows(low=-10, high=10), shift=st.integers(-60, 90))
@examples
def test_a_power_of_two_moves_the_scale_and_nothing_else(fmt, x, shift):
    x = torch.where((x.abs() > 2.0**-30) & (x.abs() < 2.0**30), x, 1.0)  # stays normal, and far from E8M0's ends
    for f, rule in cases(fmt):
        note(f"{f} {rule}")
        codes, scales = quantize(x, f, rule)
        shifted_codes, shifted_scales = quantize(x * 2.0**shift, f, rule)
        assert torch.equal(shifted_codes, codes)
        assert torch.equal(shifted_scales.int(), scales.int() + shift)


@each_format
@given(x=rows(), size=st.integers(1, SIZE))
@examples
def test_odd_sizes_are_padded_with_zeros(fmt, x, size):
    for f, rule in cases(fmt):
        note(f"{f} {rule}")
        padded = torch.zeros(ROWS, f.blocks(size) * f.block_size)
        padded[:, :size] = x[:, :size]
        for got, expected in zip(quantize(x[:, :size], f, rule), quantize(padded, f, rule), strict=True):
            assert_same_bits(got, expected)
        assert_same_bits(decoded(x[:, :size], f, rule), decoded(padded, f, rule)[:, :size])
        assert_same_bits(quantize_dequantize(x[:, :size], f, rule), quantize_dequantize(padded, f, rule)[:, :size])


@each_format
@given(x=rows(), index=st.integers(0, SIZE - 1), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
@examples
def test_nan_and_inf_spoil_their_own_block_only(fmt, x, index, bad):
    for f, rule in cases(fmt):
        note(f"{f} {rule}")
        spoiled = x.clone()
        spoiled[0, index] = bad
        block = index // f.block_size
        expected = decoded(x, f, rule)
        expected[0, block * f.block_size : (block + 1) * f.block_size] = math.nan
        codes, scales = quantize(spoiled, f, rule)
        assert (scales == 255).nonzero().tolist() == [[0, block]]
        assert not codes.unflatten(-1, (-1, f.block_size))[0, block].any()
        for got in (decoded(spoiled, f, rule), quantize_dequantize(spoiled, f, rule)):
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))


@each_format
@given(x=rows())
@examples
def test_mse_is_never_worse_than_floor(fmt, x):
    """Per block; the search itself sums in float32, hence one part in a million."""
    for f in (fmt.with_block(block) for block in BLOCK_SIZES):
        note(str(f))
        assert (block_errors(x, f, MSE) <= block_errors(x, f, FLOOR) * (1 + 1e-6)).all()


def block_errors(x: Tensor, fmt: MXFormat, rule: ScaleRule) -> Tensor:
    """Squared error of each block in float64, with the block's maximum scaled to about 1."""
    blocks = reference.to_blocks(x, fmt).double()
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent
    error = reference.to_blocks(decoded(x, fmt, rule), fmt).double() - blocks
    return torch.ldexp(error, -exponent).square().sum(-1)


@each_dtype
@each_format
def test_powers_of_two_are_exact_down_to_the_end_of_e8m0(fmt, dtype):
    """Subnormals included; a value below the least element of the least scale becomes zero."""
    info = torch.finfo(dtype)
    least = ELEMENTS[fmt.name][2] * 2.0**-127
    subnormal, largest = info.smallest_normal * info.eps, 2.0 ** math.floor(math.log2(info.max))
    for value in (0.0, subnormal, info.smallest_normal, 1.0, largest):
        x = torch.full((SIZE,), value, dtype=dtype)
        expected = x if value >= least else torch.zeros_like(x)
        for f, rule in cases(fmt):
            assert_same_bits(decoded(x, f, rule), expected)
            assert torch.equal(decoded(-x, f, rule), -expected)
        assert torch.equal(quantize(x, fmt, MSE)[1], quantize(x, fmt, FLOOR)[1])  # no gain elsewhere: floor stays


@each_dtype
@each_format
def test_finite_never_decodes_to_infinity(fmt, dtype):
    """128 numbers from the dtype's largest down through its last binade, each the maximum of a block."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    step = int(2.0**-7 / torch.finfo(dtype).eps)
    top = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(bits)
    maxima = (top - step * torch.arange(128, dtype=bits)).view(dtype)
    for f, rule in cases(fmt):
        x = torch.zeros(128, f.block_size, dtype=dtype)
        x[:, 0], x[:, 1] = maxima, -maxima
        assert decoded(x, f, rule).isfinite().all()
        assert quantize_dequantize(x, f, rule).isfinite().all()


@each_format
def test_float64_is_rounded_to_float32_first(fmt):
    x = torch.randn(4, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for f, rule in cases(fmt):
        for got, expected in zip(quantize(x, f, rule), quantize(x.float(), f, rule), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(quantize_dequantize(x, f, rule), quantize_dequantize(x.float(), f, rule).double())


# The least scale exponent at which the last bit of every element is still a bfloat16 (2**-133 is its least number).
BFLOAT16_EXACT_FROM = {"mxfp8_e4m3": -124, "mxfp8_e5m2": -117}  # the others: -127, all of E8M0


@each_format
def test_every_element_at_every_scale_is_exact_in_bfloat16(fmt):
    """In float32 with no limit; in bfloat16 down to a stated scale, below which subnormal elements may be lost."""
    codes = torch.arange(2**fmt.bits).to(torch.uint8).repeat_interleave(fmt.block_size)
    scales = torch.arange(255).to(torch.uint8)
    codes = codes.expand(255, -1)
    every_scale = scales[:, None].expand(-1, 2**fmt.bits)
    in_float32, in_bfloat16, in_float64 = (
        dequantize(codes, every_scale, fmt, codes.shape[-1], dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    )
    exact = reference.decode(codes, fmt).double() * torch.exp2(scales.double() - 127)[:, None]
    exact = torch.where(exact.abs() >= 2.0**128, exact.sign() * math.inf, exact)
    assert torch.equal(in_float32.double().nan_to_num(7.0), exact.nan_to_num(7.0))
    assert torch.equal(in_float64.nan_to_num(7.0), exact.nan_to_num(7.0))
    first = 127 + BFLOAT16_EXACT_FROM.get(fmt.name, -127)
    assert_same_bits(in_bfloat16[first:].float().nan_to_num(7.0), in_float32[first:].nan_to_num(7.0))
    assert first == 0 or not torch.equal(in_bfloat16[first - 1].float().nan_to_num(7.0), in_float32[first - 1])


@each_format
def test_element_tables(fmt):
    largest, least_normal, least = ELEMENTS[fmt.name]
    table, half = reference.element_table(fmt), 2 ** (fmt.bits - 1)
    positive = [v for v in table[:half] if math.isfinite(v)]
    assert positive == sorted(positive)
    assert (positive[0], positive[1], positive[-1]) == (0, least, largest)
    assert positive[2**fmt.mantissa_bits] == least_normal
    assert (fmt.max_value, fmt.max_code) == (largest, positive.index(largest))
    negative = [-v for v in positive]
    assert list(table[half : half + len(positive)]) == ([-2, *negative[:0:-1]] if fmt.is_integer else negative)


def test_the_elements_of_mxfp4():
    assert reference.element_table(MXFP4) == (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@each_format
def test_every_element_encodes_to_its_code(fmt):
    """Except -2.0 of the integers, which `quantize` never makes, and Inf and NaN."""
    codes = torch.arange(2**fmt.bits).to(torch.uint8)
    values = reference.decode(codes, fmt)
    used = values.abs() <= fmt.max_value
    assert_same_bits(reference.round_elements(values, fmt)[used], values[used])
    assert torch.equal(reference.encode(values[used], fmt), codes[used])


@pytest.mark.parametrize(
    ("fmt", "value", "expected"),
    [
        (MXFP4, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9], [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]),
        (MXFP8_E4M3, [2.0**-10, 3 * 2.0**-10, 17.0, 19.0, 432.0, 464.0], [0.0, 2.0**-8, 16.0, 20.0, 448.0, 448.0]),
        (MXINT4, [0.125, 0.375, 1.625, 1.875, 3.0], [0.0, 0.5, 1.5, 1.75, 1.75]),
    ],
    ids=str,
)
def test_ties_go_to_even_and_large_values_saturate(fmt, value, expected):
    assert_same_bits(reference.round_elements(torch.tensor(value), fmt), torch.tensor(expected))
    assert torch.equal(reference.round_elements(-torch.tensor(value), fmt), -torch.tensor(expected))


@pytest.mark.parametrize(
    ("fmt", "rule", "threshold", "inclusive"),
    [
        (MXFP4, FLOOR, 8, True),
        (MXFP4, T725, 7.25, False),
        (MXFP4, EVEN, 7, True),
        (MXFP4, RCEIL, 6, False),
        (MXFP4, CEIL, 4, False),
        (MXFP8_E4M3, FLOOR, 512, True),
        (MXFP8_E4M3, EVEN, 496, True),
        (MXFP8_E4M3, RCEIL, 448, False),
        (MXINT8, RCEIL, 127 / 64, False),
    ],
    ids=str,
)
def test_thresholds_of_the_scale_rules(fmt, rule, threshold, inclusive):
    """T: the largest maximum that scale 1 serves."""
    at = torch.tensor(threshold, dtype=torch.float32)
    below, above = torch.nextafter(at, torch.tensor(0.0)), torch.nextafter(at, torch.tensor(math.inf))
    exponents = reference.scale_exponents(torch.stack([below, at, above]), fmt, rule)
    assert exponents.tolist() == [0, int(inclusive), 1]


# Signal to quantization noise, dB, of 2**14 standard normal values at block 32; measured once, written down.
SQNR = {
    "mxint8": {FLOOR: 41.71, EVEN: 41.67, RCEIL: 41.65, CEIL: 35.66, MSE: 41.76},
    "mxint6": {FLOOR: 29.62, EVEN: 29.51, RCEIL: 29.36, CEIL: 23.59, MSE: 29.78},
    "mxint4": {FLOOR: 17.59, EVEN: 17.27, RCEIL: 16.91, CEIL: 11.61, MSE: 18.26},
    "mxfp8_e4m3": {FLOOR: 30.59, EVEN: 31.22, RCEIL: 31.44, CEIL: 31.44, MSE: 31.44},
    "mxfp8_e5m2": {FLOOR: 25.31, EVEN: 25.51, RCEIL: 25.51, CEIL: 25.51, MSE: 25.51},
    "mxfp6_e3m2": {FLOOR: 25.31, EVEN: 25.51, RCEIL: 25.51, CEIL: 25.51, MSE: 25.51},
    "mxfp6_e2m3": {FLOOR: 30.86, EVEN: 30.91, RCEIL: 30.90, CEIL: 28.74, MSE: 30.92},
    "mxfp4": {FLOOR: 18.79, EVEN: 19.00, RCEIL: 18.73, CEIL: 16.83, T725: 19.02, MSE: 19.03},
}


@each_format
def test_signal_to_noise(fmt):
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rule, expected in SQNR[fmt.name].items():
        noise = quantize_dequantize(x, fmt, rule) - x
        sqnr = 10 * math.log10(x.square().sum() / noise.square().sum())
        assert sqnr == pytest.approx(expected, abs=0.05, rel=0), rule


@pytest.mark.parametrize("bias", [None, torch.arange(5.0)], ids=["plain", "bias"])
def test_linear_is_a_product_with_the_decoded_weight(bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 100, generator=generator), torch.randn(5, 100, generator=generator)
    codes, scales = quantize(weight, MXFP8_E4M3, RCEIL)
    expected = torch.nn.functional.linear(x, decoded(weight, MXFP8_E4M3, RCEIL), bias)
    assert torch.equal(reference.linear(x, codes, scales, bias, MXFP8_E4M3), expected)


def test_formats_may_be_text():
    x = torch.randn(3, 64)
    codes, scales = reference.quantize(x, "mxint4", "floor")
    expected = reference.quantize_dequantize(x, MXINT4, ScaleRule.FLOOR)
    assert torch.equal(reference.dequantize(codes, scales, "mxint4", 64, x.dtype), expected)
    assert torch.equal(reference.quantize_dequantize(x, "mxint4", "floor"), expected)
