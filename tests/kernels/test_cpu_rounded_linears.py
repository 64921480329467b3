"""CPU matmuls that quantize their input: equal to matmuls of reference-quantized inputs up to accumulation order.

Blocks are accumulated as integers or, with AVX-512, bfloat16 pairs. Compiling without AVX-512, and without AVX2, builds
the kernels of other processors.
"""

import pytest
import torch
from cpu_kernels import building_in, needs_compiler, packed
from crossed import crossed

from mxcompile.formats import FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule, parse_format
from mxcompile.kernels.cpu import linears
from mxcompile.numerics import packing, reference

PAIRS = [(weight, activation) for weight in FORMATS for activation in FORMATS]
PAIRS += [("mxint4:16", "mxint8:16"), ("mxint4:64", "mxint6:64"), ("mxint4:128", "mxint8:128"), ("mxint4:64", "mxint8")]
PAIRS += [("mxint8:16", "mxint8:16"), ("mxint8:64", "mxint4:64"), ("mxint8:128", "mxint8:128")]
PAIRS += [("mxfp4:16", "mxfp8_e4m3:16"), ("mxfp4:64", "mxfp8_e5m2:64"), ("mxfp4:128", "mxfp6_e2m3:128")]
OTHERS = (("mxint8", "mxint8"), ("mxfp4", "mxfp8_e4m3"), ("mxint4:16", "mxint8:16"), ("mxfp4:128", "mxfp6_e2m3:128"))
FLOOR = ScaleRule.FLOOR


@pytest.fixture(scope="module", params=["", "-mno-avx512f", "-mno-avx2"], ids=["all", "no AVX-512", "no AVX2"])
def instructions(request, tmp_path_factory):
    """Build the libraries under test without some of the processor's instructions."""
    if not request.param:
        yield
        return
    folder = tmp_path_factory.mktemp("cpu")
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {request.param}\n')
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(compiler))
        with building_in(folder):
            yield


def check(weight_name, activation_name, tokens, dtype, error_over_bound):
    fmt, activation = parse_format(weight_name), parse_format(activation_name)
    generator = torch.Generator().manual_seed(tokens)
    for rows, size, has_bias in ((13, 160, True), (5, 77, False), (4, 300, True)):
        elements, scales, _ = packed(fmt, rows, size)
        weight = linears.decode(elements, scales, fmt, size, dtype)
        spread = torch.exp2(torch.randint(-6, 6, (tokens, size), generator=generator))
        x = (torch.randn(tokens, size, generator=generator) * spread).to(dtype)
        x[:, :40] = 0
        bias = torch.randn(rows, generator=generator).to(dtype) if has_bias else None
        y = linears.linears(x, [(elements, scales, bias)], fmt, (activation, FLOOR))[0]
        assert y.dtype == dtype
        assert error_over_bound(y, reference.quantize_dequantize(x, activation, FLOOR), weight, bias) <= 1


@needs_compiler
@pytest.mark.parametrize(("pair", "dtype"), crossed(PAIRS, [torch.float32, torch.bfloat16, torch.float16]))
def test_products_are_within_the_bound(pair, dtype, error_over_bound):
    for tokens in (1, 2, 3, 4):
        check(*pair, tokens, dtype, error_over_bound)


@needs_compiler
@pytest.mark.parametrize(
    ("weight", "activation"),
    [("mxint4", "mxint8"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)],
)
def test_on_other_processors(weight, activation, error_over_bound, instructions):
    check(weight, activation, 1, torch.float32, error_over_bound)
    check(weight, activation, 3, torch.bfloat16, error_over_bound)


@needs_compiler
@pytest.mark.parametrize(
    ("fmt", "activation", "largest"), [(MXINT4, MXINT8, 127 / 64), (MXINT8, MXINT8, 127 / 64), (MXFP4, MXFP8_E4M3, 448)]
)
def test_the_largest_sums_of_products_are_exact(fmt, activation, largest, instructions):
    """Rows of one code each, times inputs of one magnitude: what 16 bits could not hold, float32 still holds."""
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)[:, None].expand(-1, 64)
    scales = torch.full((len(codes), 2), 127, dtype=torch.uint8)
    x = largest * torch.tensor([[1.0], [-1.0], [1.0]]).repeat(1, 64)
    x[2, ::2] *= -1
    y = linears.linears(x, [(packing.pack(codes, fmt), scales, None)], fmt, (activation, FLOOR))[0]
    weight = reference.dequantize(codes, scales, fmt, 64, torch.float64)
    assert torch.equal(y.double(), x.double() @ weight.T)


@needs_compiler
@pytest.mark.parametrize(("fmt", "activation"), [(MXINT4, MXINT8), (MXINT8, MXINT8), (MXFP4, MXFP8_E4M3)])
def test_what_is_not_finite_spoils_its_token_alone(fmt, activation, instructions):
    weights = [(*packed(fmt, 6, 160)[:2], None)]
    clean = torch.randn(3, 160, generator=torch.Generator().manual_seed(0))
    expected = linears.linears(clean, weights, fmt, (activation, FLOOR))[0]
    for at in (0, 31, 70, 159):
        for value in (float("nan"), float("inf"), -float("inf")):
            x = clean.clone()
            x[1, at] = value
            y = linears.linears(x, weights, fmt, (activation, FLOOR))[0]
            assert y[1].isnan().all()
            assert torch.equal(y[::2], expected[::2])


@needs_compiler
@pytest.mark.parametrize(("fmt", "activation"), [(MXINT4, MXINT8), (MXINT8, MXINT8), (MXFP4, MXFP8_E4M3)])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
def test_every_scale_byte(fmt, activation, size, instructions):
    """From the smallest scale to the largest and NaN, with inputs as small and as large as float32 allows."""
    elements, _, _ = packed(fmt, 256, 32)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    x = size * torch.linspace(-1, 1, 32)[None]
    y = linears.linears(x, [(elements, scales, None)], fmt, (activation, FLOOR))[0][0]
    weight = linears.decode(elements, scales, fmt, 32, torch.float32).double()
    rounded = reference.quantize_dequantize(x, activation, FLOOR).double()[0]
    exact, all_of_it = weight @ rounded, weight.abs() @ rounded.abs()
    assert y[-1].isnan()
    fits = all_of_it < 1e38
    assert ((y.double() - exact).abs() <= 1e-6 * all_of_it + 1e-43)[fits].all()
    assert fits.sum() > 40
