"""CPU matmuls that quantize their input: equal to matmuls of reference-quantized inputs up to accumulation order.

On processors with AVX-512 dot products, blocks are accumulated as integers or bfloat16 pairs; compiling without these
instructions builds the kernels of other processors.
"""

import pytest
import torch
from cpu_kernels import building_in, needs_compiler, packed
from crossed import crossed

from mxcompile.formats import FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule, parse_format
from mxcompile.kernels.cpu import linears
from mxcompile.numerics import reference

PAIRS = [(weight, activation) for weight in FORMATS for activation in FORMATS]
PAIRS += [("mxint4:16", "mxint8:16"), ("mxint4:64", "mxint6:64"), ("mxint4:128", "mxint8:128"), ("mxint4:64", "mxint8")]
PAIRS += [("mxint8:16", "mxint8:16"), ("mxint8:64", "mxint4:64"), ("mxint8:128", "mxint8:128")]
PAIRS += [("mxfp4:16", "mxfp8_e4m3:16"), ("mxfp4:64", "mxfp8_e5m2:64"), ("mxfp4:128", "mxfp6_e2m3:128")]
INTEGER_AND_FLOAT = (("mxint8", "mxint8"), ("mxfp4", "mxfp8_e4m3"))
FLOOR = ScaleRule.FLOOR


@pytest.fixture(scope="module", params=["all instructions", "no dot products"])
def instructions(request, tmp_path_factory):
    """Compiler options of the libraries under test."""
    if request.param == "all instructions":
        yield
        return
    folder = tmp_path_factory.mktemp("cpu")
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -mno-avx512vnni\n')
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
    [("mxint4", "mxint8"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in INTEGER_AND_FLOAT)],
)
def test_on_processors_without_dot_products(weight, activation, error_over_bound, instructions):
    check(weight, activation, 1, torch.float32, error_over_bound)
    check(weight, activation, 3, torch.bfloat16, error_over_bound)


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
