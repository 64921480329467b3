"""CPU kernels: rounding and decoding match the reference bit for bit, matmuls within the float32 accumulation bound."""

from pathlib import Path

import pytest
import torch
from cpu_kernels import building_in, needs_compiler, packed
from crossed import crossed

from mxcompile.formats import FORMATS, MXFP4, MXINT4, MXINT8, ScaleRule, parse_format
from mxcompile.kernels import dispatch
from mxcompile.kernels.cpu import build, linears
from mxcompile.numerics import packing, reference

FORMAT_NAMES = [*FORMATS, "mxint4:16", "mxfp4:64", "mxint6:16", "mxfp6_e3m2:128", "mxfp8_e5m2:64", "mxint8:128"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "rule"),
    crossed(FORMAT_NAMES, DTYPES, [ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.RCEIL, ScaleRule.CEIL]),
)
def test_rounding_is_the_references(name, dtype, rule, nasty_blocks, assert_same_bits):
    fmt = parse_format(name)
    x = nasty_blocks(fmt, dtype)
    x = x[: len(x) // 4 * 4].reshape(-1, 128)
    assert linears.supports_rounding(x, fmt, rule) is None
    assert_same_bits(linears.quantize_dequantize(x, fmt, rule), reference.quantize_dequantize(x, fmt, rule))


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 5, 33), (1, 1), (2, 31), (0, 64), (7, 100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_odd_shapes_and_strides(shape, dtype, assert_same_bits):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in (x, x.transpose(0, -1)):
        given = linears.quantize_dequantize(value, MXFP4, ScaleRule.T725)
        assert_same_bits(given, reference.quantize_dequantize(value, MXFP4, ScaleRule.T725).contiguous())


@needs_compiler
@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_decodes_to_the_references_value(name, dtype, assert_same_bits):
    """All codes at all positions of a block (including Inf and NaN of 8-bit floats), with every scale byte."""
    fmt = parse_format(name)
    codes = (torch.arange(256)[:, None] + torch.arange(fmt.block_size)) % 2**fmt.bits
    elements, scales = packing.pack(codes.to(torch.uint8), fmt), torch.arange(256, dtype=torch.uint8)[:, None]
    for size in (fmt.block_size, fmt.block_size - 3):
        expected = reference.dequantize(codes.to(torch.uint8), scales, fmt, size, dtype)
        assert_same_bits(linears.decode(elements, scales, fmt, size, dtype), expected)


@needs_compiler
@pytest.mark.parametrize(("tokens", "name", "dtype"), crossed([1, 2, 3, 4, 5, 9], FORMAT_NAMES, DTYPES))
def test_products_are_within_the_bound(name, tokens, dtype, error_over_bound):
    fmt = parse_format(name)
    generator = torch.Generator().manual_seed(tokens)
    for rows, size, has_bias in ((48, 96, True), (33, 77, False)):
        elements, scales, _ = packed(fmt, rows, size)
        weight = linears.decode(elements, scales, fmt, size, dtype)
        x = torch.randn(tokens, size, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype) if has_bias else None
        assert error_over_bound(linears.linears(x, [(elements, scales, bias)], fmt)[0], x, weight, bias) <= 1


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weights_on_an_input_rounded_once(tokens, dtype):
    """The same bits as separate calls on a rounded input, also for sizes that leave a block partly empty."""
    x = torch.randn(tokens, 2, 80, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 0]
    weights = [(*packed(MXINT4, rows, 80, rows)[:2], bias) for rows, bias in ((24, None), (7, torch.ones(7).to(dtype)))]
    rounded = reference.quantize_dequantize(x, MXINT8, ScaleRule.FLOOR)
    given = linears.linears(x, weights, MXINT4, (MXINT8, ScaleRule.FLOOR))
    for y, weight in zip(given, weights, strict=True):
        assert torch.equal(y, linears.linears(rounded, [weight], MXINT4)[0])


@needs_compiler
def test_many_threads_compute_the_same_bits():
    """The accumulation of a row does not depend on how rows are divided among threads."""
    elements, scales, _ = packed(MXINT4, 999, 1024)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        results = [
            (torch.set_num_threads(count), linears.linears(x, [(elements, scales, None)], MXINT4)[0])[1]
            for count in (1, 2, 3)
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_compiler
def test_leading_dimensions_strides_and_nothing():
    elements, scales, weight = packed(MXINT8, 16, 64)
    x = torch.randn(64, 3, 1, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    y = linears.linears(x, [(elements, scales, None)], MXINT8)[0]
    assert y.shape == (3, 1, 16)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-3 * weight.abs().max().item())
    assert linears.linears(torch.empty(2, 0, 64), [(elements, scales, None)], MXINT8)[0].shape == (2, 0, 16)


@needs_compiler
def test_a_result_is_not_changed_by_the_next_call():
    """The buffer for decoded weights is reused; results are not stored in it."""
    first, second = (packed(MXINT4, 32, 64, seed) for seed in (0, 1))
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    y = linears.linears(x, [(*first[:2], None)], MXINT4)[0]
    kept = y.clone()
    linears.linears(x, [(*second[:2], None)], MXINT4)
    assert torch.equal(y, kept)


@needs_compiler
def test_dispatch_takes_it():
    x = torch.randn(2, 64)
    assert dispatch.choices(x, MXINT4, 64)["cpu"] is None
    assert "float64" in str(linears.supports(x.double(), MXINT4))
    assert dispatch.quantize_dequantize(x.double(), MXINT8, ScaleRule.FLOOR).dtype == torch.float64
    assert "mse" in str(linears.supports_rounding(x, MXINT4, ScaleRule.MSE))
    assert "mxfp4" in str(linears.supports_rounding(x, MXINT4, ScaleRule.T725))


@pytest.fixture(name="elsewhere")
def built_elsewhere(tmp_path):
    with building_in(tmp_path):
        yield tmp_path


def test_without_a_compiler_the_reference_serves_and_the_reason_is_known(elsewhere, monkeypatch):
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("CXX", raising=False)
    x = torch.randn(2, 64)
    elements, scales, weight = packed(MXINT4, 16, 64)
    assert dispatch.choices(x, MXINT4, 64)["cpu"] == (
        "there is no C++ compiler (g++ or clang++) to build the CPU kernels with"
    )
    assert torch.equal(dispatch.linear(x, elements, scales, None, MXINT4), torch.nn.functional.linear(x, weight))
    rounded = dispatch.quantize_dequantize(x, MXINT8, ScaleRule.FLOOR)
    assert torch.equal(rounded, reference.quantize_dequantize(x, MXINT8, ScaleRule.FLOOR))


def test_a_compiler_that_fails_is_named(elsewhere, monkeypatch):
    broken = elsewhere / "broken"
    broken.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert build.why_not(MXINT4) == f"{broken} cannot build the CPU kernels: error: no such thing"
    assert {path.suffix for path in (elsewhere / "cpu").glob("*")} <= {".lock"}  # no library, and no part of one


@needs_compiler
def test_built_once_and_found_again(elsewhere):
    build.library(MXINT4)
    (path,) = (elsewhere / "cpu").glob("*.so")
    made = path.stat().st_mtime_ns
    build.library.cache_clear()
    build.library(MXINT4)
    assert [path.stat().st_mtime_ns for path in (elsewhere / "cpu").glob("*.so")] == [made]


@needs_compiler
def test_a_damaged_library_is_built_again(elsewhere, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ctypes.CDLL", str)  # built, but not loaded: the loader would remember it by its path
        path = Path(str(build.library(MXINT4)))
    path.write_bytes(b"\x7fELF")
    build.library.cache_clear()
    build.library(MXINT4)
    assert path.stat().st_size > 4
