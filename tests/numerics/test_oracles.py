"""reference.py computes what independent implementations compute, bit for bit: scales, element codes, decoded values.

Oracles: (1) the definition X = 2**ceil(log2(amax / T)) in float64 with ml_dtypes' element casts, or torch's integer
fake-quantization for MXINT; (2) gfloat; (3) torchao's `to_mx`, which has no MXINT. What an oracle is known to do
differently is left out by `agrees_with_torchao` and `without_minus_two`, and `DIFFERENCES` proves each at one input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import formats as gfloat_formats

from mxcompile.formats import BLOCK_SIZES, FORMATS, MXFP8_E4M3, MXFP8_E5M2, MXFormat, ScaleRule
from mxcompile.numerics import reference

FLOOR, EVEN, RCEIL, CEIL, T725, MSE = ScaleRule
INF, NAN = float("inf"), float("nan")
FLOAT32_MAX = float(np.finfo(np.float32).max)

# T of every rule in units of the element, written out: not computed from the formats under test.
THRESHOLDS = {
    "mxfp8_e4m3": {FLOOR: 512, EVEN: 496, RCEIL: 448, CEIL: 256},
    "mxfp8_e5m2": {FLOOR: 65536, EVEN: 61440, RCEIL: 57344, CEIL: 32768},
    "mxfp6_e3m2": {FLOOR: 32, EVEN: 30, RCEIL: 28, CEIL: 16},
    "mxfp6_e2m3": {FLOOR: 8, EVEN: 7.75, RCEIL: 7.5, CEIL: 4},
    "mxfp4": {FLOOR: 8, EVEN: 7, RCEIL: 6, CEIL: 4, T725: 7.25},
    "mxint8": {FLOOR: 2, EVEN: 255 / 128, RCEIL: 127 / 64, CEIL: 1},
    "mxint6": {FLOOR: 2, EVEN: 63 / 32, RCEIL: 31 / 16, CEIL: 1},
    "mxint4": {FLOOR: 2, EVEN: 15 / 8, RCEIL: 7 / 4, CEIL: 1},
}
ML_DTYPES = {
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
}
GFLOAT = {
    "mxfp8_e4m3": gfloat_formats.format_info_ocp_e4m3,
    "mxfp8_e5m2": gfloat_formats.format_info_ocp_e5m2,
    "mxfp6_e3m2": gfloat_formats.format_info_ocp_e3m2,
    "mxfp6_e2m3": gfloat_formats.format_info_ocp_e2m3,
    "mxfp4": gfloat_formats.format_info_ocp_e2m1,
    "mxint8": gfloat_formats.format_info_ocp_int8,
    "mxint6": replace(gfloat_formats.format_info_ocp_int8, name="int6", k=6, precision=6),
    "mxint4": replace(gfloat_formats.format_info_ocp_int8, name="int4", k=4, precision=4),
}
CASES = [
    pytest.param(fmt.with_block(block), rule, id=f"{fmt.name}-{block}-{rule}")
    for fmt in FORMATS.values()
    for block in BLOCK_SIZES
    for rule in THRESHOLDS[fmt.name]
]
BLOCKS = [pytest.param(f.with_block(block), id=f"{f.name}-{block}") for f in FORMATS.values() for block in BLOCK_SIZES]
TORCHAO_CASES = [case for case in CASES if not case.values[0].is_integer and case.values[1] is not T725]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are small: on a busy machine torch's threads wait for each other, at twenty times the cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Quantized(NamedTuple):
    scales: np.ndarray  # uint8 [rows, blocks]
    codes: np.ndarray  # uint8 [rows, size]
    values: np.ndarray  # float32 [rows, size]


def ours(x: np.ndarray, fmt: MXFormat, rule: ScaleRule) -> Quantized:
    codes, scales = reference.quantize(torch.from_numpy(x), fmt, rule)
    values = reference.dequantize(codes, scales, fmt, x.shape[-1], torch.float32)
    return Quantized(scales.numpy(), codes.numpy(), values.numpy())


def block_maxima(x: np.ndarray, fmt: MXFormat) -> np.ndarray:
    return np.abs(x.reshape(len(x), -1, fmt.block_size).astype(np.float64)).max(-1)


def definition_exponent(amax: np.ndarray, fmt: MXFormat, rule: ScaleRule) -> np.ndarray:
    """Exact: amax has 24 bits, so amax / T is a power of two or at least 2**-25 (relative) away from one.

    FLOOR and EVEN give the larger scale at T itself, the others only beyond it.
    """
    with np.errstate(divide="ignore"):
        log = np.maximum(np.log2(amax / THRESHOLDS[fmt.name][rule]), -1000)
    exponent = np.floor(log) + 1 if rule in (FLOOR, EVEN) else np.ceil(log)
    return np.clip(exponent, -127, 127 - fmt.emax).astype(int)  # the upper end: see DIFFERENCES, "top of E8M0"


def rounded_by_cast(v: np.ndarray, fmt: MXFormat) -> tuple[np.ndarray, np.ndarray]:
    """Codes and element values (float64) of scaled values."""
    if not fmt.is_integer:
        dtype = ML_DTYPES[fmt.name]
        limit = float(ml_dtypes.finfo(dtype).max)
        elements = np.clip(v, -limit, limit).astype(dtype)
        return elements.view(np.uint8), elements.astype(np.float64)
    step, largest = 2.0 ** (2 - fmt.bits), 2 ** (fmt.bits - 1) - 1
    fake = torch.fake_quantize_per_tensor_affine(torch.from_numpy(v.astype(np.float32)), step, 0, -largest, largest)
    integers = (fake.numpy() / step).astype(int)
    return (integers % 2**fmt.bits).astype(np.uint8), integers * step


def by_definition(x: np.ndarray, fmt: MXFormat, rule: ScaleRule) -> Quantized:
    exponent = definition_exponent(block_maxima(x, fmt), fmt, rule)
    blocks = x.reshape(len(x), -1, fmt.block_size).astype(np.float64)
    codes, elements = rounded_by_cast(np.ldexp(blocks, -exponent[..., None]), fmt)
    values = np.ldexp(elements, exponent[..., None]).astype(np.float32)
    return Quantized((exponent + 127).astype(np.uint8), codes.reshape(x.shape), values.reshape(x.shape))


def by_gfloat(x: np.ndarray, fmt: MXFormat, rule: ScaleRule = FLOOR) -> Quantized:
    """gfloat's OCP scale, its vectorised rounding and its encoder."""
    assert rule is FLOOR
    info, scale_info = GFLOAT[fmt.name], gfloat_formats.format_info_ocp_e8m0
    blocks = x.reshape(-1, fmt.block_size).astype(np.float64)
    scale = np.array([gfloat.compute_scale_amax(info.emax, block) for block in blocks])
    elements = gfloat.round_ndarray(info, blocks / scale[:, None], sat=True)
    codes = gfloat.encode_ndarray(info, elements)
    scales = np.array([gfloat.encode_float(scale_info, s) for s in scale])
    with np.errstate(over="ignore"):
        values = (gfloat.decode_ndarray(info, codes.astype(int)) * scale[:, None]).astype(np.float32)
    return Quantized(
        scales.astype(np.uint8).reshape(len(x), -1), codes.astype(np.uint8).reshape(x.shape), values.reshape(x.shape)
    )


def by_torchao(x: np.ndarray | torch.Tensor, fmt: MXFormat, rule: ScaleRule) -> Quantized:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    dtypes = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e3m2": mx.DTYPE_FP6_E3M2,
        "mxfp6_e2m3": mx.DTYPE_FP6_E2M3,
        "mxfp4": torch.float4_e2m1fn_x2,
    }
    dtype, x = dtypes[fmt.name], torch.as_tensor(x)
    scales, data = mx.to_mx(x, dtype, fmt.block_size, mx.ScaleCalculationMode(rule.value))
    values = mx.to_dtype(data, scales, dtype, fmt.block_size, torch.float32)
    codes = mx.unpack_uint4(data) if fmt.bits == 4 else data.view(torch.uint8)
    return Quantized(scales.view(torch.uint8).numpy(), codes.numpy(), values.numpy())


@cache
def edge_rows(fmt: MXFormat) -> np.ndarray:
    """Every element, every midpoint, and the float32 neighbours of both, at scales from below E8M0 to the top of it.

    Every 16th value is 2**emax, which fixes the (FLOOR) scale for blocks of any size.
    """
    magnitudes = [abs(v) for v in reference.element_table(fmt) if np.isfinite(v)]
    magnitudes = np.unique(np.array([*magnitudes, 2.0 ** (fmt.emax + 1)], np.float32))
    points = np.concatenate([magnitudes[:-1], (magnitudes[1:] + magnitudes[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(INF)), np.nextafter(points, np.float32(-INF))])
    points = np.concatenate([points, -points])
    points = np.append(points, np.zeros(-len(points) % 120, np.float32)).reshape(-1, 15)
    anchored = np.insert(points, 0, 2.0**fmt.emax, axis=1).astype(np.float64).reshape(-1, 128)
    shifts = (-149, -128, -127, -126, -125, -60, 0, 60, 127 - fmt.emax)
    return np.concatenate([np.ldexp(anchored, shift).astype(np.float32) for shift in shifts])


@cache
def random_rows() -> np.ndarray:
    """Gaussian, heavy-tailed, uniform, sparse, any finite bit pattern, huge, subnormal, powers of two, constant."""
    rng = np.random.default_rng(20240507)
    normal = rng.standard_normal((4, 128))
    any_bits = rng.integers(0, 0x7F800000, (8, 128)).astype(np.int32).view(np.float32)
    rows = [
        normal,
        normal * np.exp(3 * rng.standard_normal((4, 128))),
        rng.standard_cauchy((4, 128)),
        rng.uniform(-1, 1, (4, 128)),
        normal * (rng.random((4, 128)) < 0.05),
        any_bits * rng.choice([-1, 1], (8, 128)),
        rng.uniform(-FLOAT32_MAX, FLOAT32_MAX, (4, 128)),
        normal * 1e-38,
        normal * 1e-43,
        2.0 ** rng.integers(-149, 128, (4, 128)),
        np.repeat([[0.0], [-0.0], [FLOAT32_MAX], [2.0**-149]], 128, axis=1),
    ]
    return np.concatenate(rows).astype(np.float32)


@cache
def threshold_rows(fmt: MXFormat) -> np.ndarray:
    """Every 16th value, the largest of its block, is a T or a float32 neighbour of it, at three scales."""
    thresholds = np.ldexp([*THRESHOLDS[fmt.name].values()], [[-100], [0], [90]]).astype(np.float32).ravel()
    up, down = np.nextafter(thresholds, np.float32(INF)), np.nextafter(thresholds, np.float32(0))
    maxima = np.concatenate([thresholds, up, down])[:, None]
    rows = np.random.default_rng(6).uniform(-0.9, 0.9, (len(maxima), 128)).astype(np.float32) * maxima
    rows[:, ::16] = maxima
    return rows


def data(fmt: MXFormat) -> np.ndarray:
    return np.concatenate([edge_rows(fmt), threshold_rows(fmt), random_rows()])


def assert_same(got: Quantized, expected: Quantized, compared: np.ndarray, fmt: MXFormat) -> None:
    """Bit equality of everything in the `[rows, blocks]` that are compared."""
    assert compared.mean() > 0.4  # the left-out blocks stay the exception
    np.testing.assert_array_equal(got.scales[compared], expected.scales[compared])
    elements = np.repeat(compared, fmt.block_size, axis=-1)
    np.testing.assert_array_equal(got.codes[elements], expected.codes[elements])
    np.testing.assert_array_equal(got.values[elements].view(np.uint32), expected.values[elements].view(np.uint32))


@pytest.mark.parametrize(("fmt", "rule"), CASES)
def test_quantize_follows_the_definition(fmt, rule):
    x = data(fmt)
    assert_same(ours(x, fmt, rule), by_definition(x, fmt, rule), block_maxima(x, fmt) > 0, fmt)


@pytest.mark.parametrize("fmt", BLOCKS)
def test_quantize_equals_gfloat(fmt):
    x = data(fmt)
    expected = by_gfloat(x, fmt)
    if fmt.is_integer:
        expected = without_minus_two(expected, fmt)
    assert_same(ours(x, fmt, FLOOR), expected, block_maxima(x, fmt) > 0, fmt)


def without_minus_two(q: Quantized, fmt: MXFormat) -> Quantized:
    """The code of -2.0 becomes that of the symmetric minimum: see DIFFERENCES, "symmetric"."""
    lowest = 2 ** (fmt.bits - 1)
    scale = np.repeat(np.ldexp(1.0, q.scales.astype(int) - 127), fmt.block_size, axis=-1)
    values = np.where(q.codes == lowest, -fmt.max_value * scale, q.values).astype(np.float32)
    return Quantized(q.scales, np.where(q.codes == lowest, lowest + 1, q.codes), values)


@pytest.mark.parametrize("info", gfloat_formats.all_block_formats, ids=lambda info: info.name)
def test_quantize_equals_gfloat_block_by_block(info):
    fmt = FORMATS[info.name.removesuffix("_e2m1")]
    x = random_rows()[:16].reshape(-1, info.k).clip(-1.99, 1.99)
    got = ours(x, fmt, FLOOR).values.astype(np.float64)
    for row, block in zip(got, x.astype(np.float64), strict=True):
        np.testing.assert_array_equal(row, gfloat.quantize_block(info, block, gfloat.compute_scale_amax))


@pytest.mark.parametrize(("fmt", "rule"), TORCHAO_CASES)
def test_quantize_equals_torchao(fmt, rule):
    x = data(fmt)
    got = ours(x, fmt, rule)
    assert_same(got, by_torchao(x, fmt, rule), agrees_with_torchao(x, got.scales, fmt, rule), fmt)


def agrees_with_torchao(x: np.ndarray, scales: np.ndarray, fmt: MXFormat, rule: ScaleRule) -> np.ndarray:
    """Leaves out, by the names in DIFFERENCES: zero block, bottom and top of E8M0, rceil by log2."""
    amax = block_maxima(x, fmt)
    threshold = THRESHOLDS[fmt.name][rule]
    agrees = (amax > 0) & (scales > 0)
    if rule is not FLOOR:
        agrees &= amax < np.ldexp(threshold, 127 - fmt.emax)
    if rule is RCEIL:
        beyond = 2 * np.frexp(amax / threshold)[0] - 1
        agrees &= ~((beyond > 0) & (beyond < 2.0**-16))
    return agrees


@pytest.mark.parametrize(("fmt", "rule"), TORCHAO_CASES)
def test_bfloat16_input_equals_torchao(fmt, rule):
    x = torch.from_numpy(random_rows()[:16]).bfloat16()
    codes, scales = reference.quantize(x, fmt, rule)
    got = Quantized(scales.numpy(), codes.numpy(), reference.dequantize(codes, scales, fmt, 128, torch.float32).numpy())
    agrees = agrees_with_torchao(x.float().numpy(), got.scales, fmt, rule)
    assert_same(got, by_torchao(x, fmt, rule), agrees, fmt)


@pytest.mark.parametrize("fmt", BLOCKS)
def test_mse_picks_the_best_exponent(fmt):
    """Against a float64 search; where two exponents tie to 1e-6, either is right."""
    x = random_rows()
    blocks = x.reshape(len(x), -1, fmt.block_size).astype(np.float64)
    floor = definition_exponent(block_maxima(x, fmt), fmt, FLOOR)
    picked = ours(x, fmt, MSE).scales.astype(int) - 127

    def error(exponent: np.ndarray) -> np.ndarray:
        e = exponent[..., None]
        elements = rounded_by_cast(np.ldexp(blocks, -e), fmt)[1].reshape(blocks.shape)
        return np.ldexp(np.ldexp(elements, e) - blocks, -floor[..., None]) ** 2

    candidates = [np.clip(floor + offset, -127, 127 - fmt.emax) for offset in (-1, 0, 1)]
    least = np.min([error(c).sum(-1) for c in candidates], axis=0)
    seen = block_maxima(x, fmt) > 0
    assert (np.abs(picked - floor) <= 1)[seen].all()
    assert (error(picked).sum(-1) <= least * (1 + 1e-6))[seen].all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_element_tables(fmt):
    """Every code, Inf and NaN included."""
    table, codes = np.array(reference.element_table(fmt)), np.arange(2**fmt.bits)
    np.testing.assert_array_equal(table, gfloat.decode_ndarray(GFLOAT[fmt.name], codes))
    decoded = reference.decode(torch.from_numpy(codes.astype(np.uint8)), fmt)
    np.testing.assert_array_equal(decoded, table.astype(np.float32))
    if fmt.name in ML_DTYPES:
        np.testing.assert_array_equal(table, codes.astype(np.uint8).view(ML_DTYPES[fmt.name]).astype(np.float64))


def test_scale_values():
    """All 256 E8M0 bytes."""
    scales = torch.arange(256).to(torch.uint8)
    values = reference.scale_values(scales).numpy()
    np.testing.assert_array_equal(values, scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    np.testing.assert_array_equal(values, scales.view(torch.float8_e8m0fnu).float().numpy())
    info = gfloat_formats.format_info_ocp_e8m0
    np.testing.assert_array_equal(values.astype(np.float64), [gfloat.decode_float(info, i).fval for i in range(256)])


@pytest.mark.parametrize(("fmt", "rule"), TORCHAO_CASES)
def test_nan_blocks_equal_torchao(fmt, rule):
    x = random_rows()[:1].copy()
    x[0, 40] = NAN
    got, expected = ours(x, fmt, rule), by_torchao(x, fmt, rule)
    np.testing.assert_array_equal(got.scales, expected.scales)
    np.testing.assert_array_equal(got.values, expected.values)
    assert got.scales[0, 40 // fmt.block_size] == 255
    assert np.isnan(got.values).sum() == fmt.block_size


@pytest.mark.parametrize("fmt", BLOCKS)
def test_nan_scale_equals_gfloat(fmt):
    block = np.full((1, fmt.block_size), NAN, np.float32)
    scale = gfloat.compute_scale_amax(fmt.emax, block.astype(np.float64))
    assert ours(block, fmt, FLOOR).scales.item() == gfloat.encode_float(gfloat_formats.format_info_ocp_e8m0, scale)


@dataclass(frozen=True)
class Difference:
    """One block, zero except for its first value: the scale byte and decoded first value here and there."""

    name: str
    reason: str
    oracle: Callable[[np.ndarray, MXFormat, ScaleRule], Quantized]
    fmt: str
    rule: ScaleRule
    value: float
    ours: tuple[int, float]
    theirs: tuple[int, float]


SIX = 6 * 2.0**100
ABOVE_SIX = float(np.nextafter(np.float32(SIX), np.float32(INF)))

ZERO = "any scale decodes a block of zeros; ours is what frexp(0) gives, theirs the least"
BOTTOM = "torchao divides by at least 2**-126 but stores byte 0 (2**-127): such blocks decode to half their value"
UNSCALED = "torchao's RCEIL does not scale a block at all when its byte is 0"
LOG2 = "torchao takes ceil(log2(amax / max)) in float32: a hair above a power of two is lost, and the block saturates"
TOP = "we stop at 2**(127 - emax), so that nothing finite decodes to infinity; torchao lets the maximum round up to it"
INFINITE = "we make the whole block NaN, torchao keeps a number as its scale"
CLIPPED = "gfloat clips the scale of an Inf block to 2**127 and saturates"
SYMMETRIC = "gfloat uses the code of -2.0, which OCP allows to leave out; we do, for symmetry"

DIFFERENCES = [
    Difference("zero block", ZERO, by_torchao, "mxfp4", FLOOR, 0.0, (124, 0.0), (0, 0.0)),
    Difference("zero block", ZERO, by_gfloat, "mxfp8_e4m3", FLOOR, 0.0, (118, 0.0), (0, 0.0)),
    Difference("zero block", ZERO, by_gfloat, "mxint8", FLOOR, 0.0, (126, 0.0), (0, 0.0)),
    Difference("bottom of E8M0", BOTTOM, by_torchao, "mxfp4", FLOOR, 2.0**-125, (0, 2.0**-125), (0, 2.0**-126)),
    Difference("bottom of E8M0", BOTTOM, by_torchao, "mxfp8_e4m3", EVEN, 2.0**-119, (0, 2.0**-119), (0, 2.0**-120)),
    Difference("bottom of E8M0", BOTTOM, by_torchao, "mxfp6_e2m3", CEIL, 2.0**-125, (0, 2.0**-125), (0, 2.0**-126)),
    Difference("bottom, rceil", UNSCALED, by_torchao, "mxfp4", RCEIL, 6 * 2.0**-127, (0, 6 * 2.0**-127), (0, 0.0)),
    Difference("rceil by log2", LOG2, by_torchao, "mxfp4", RCEIL, ABOVE_SIX, (228, SIX), (227, SIX)),
    Difference("top of E8M0", TOP, by_torchao, "mxfp8_e4m3", RCEIL, FLOAT32_MAX, (246, 448 * 2.0**119), (247, INF)),
    Difference("top of E8M0", TOP, by_torchao, "mxfp4", EVEN, FLOAT32_MAX, (252, 6 * 2.0**125), (253, INF)),
    Difference("top of E8M0", TOP, by_torchao, "mxfp6_e3m2", CEIL, FLOAT32_MAX, (250, 28 * 2.0**123), (251, INF)),
    Difference("infinity", INFINITE, by_torchao, "mxfp4", FLOOR, INF, (255, NAN), (253, INF)),
    Difference("infinity", INFINITE, by_torchao, "mxfp8_e4m3", RCEIL, INF, (255, NAN), (254, INF)),
    Difference("infinity", CLIPPED, by_gfloat, "mxint8", FLOOR, INF, (255, NAN), (254, 127 * 2.0**121)),
    Difference("symmetric", SYMMETRIC, by_gfloat, "mxint8", FLOOR, -1.995, (127, -127 / 64), (127, -2.0)),
    Difference("symmetric", SYMMETRIC, by_gfloat, "mxint4", FLOOR, -1.9, (127, -7 / 4), (127, -2.0)),
]


@pytest.mark.parametrize("d", DIFFERENCES, ids=lambda d: f"{d.name}-{d.oracle.__name__}-{d.fmt}-{d.rule}")
def test_known_difference_is_real(d):
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = d.value
    got, other = ours(x, FORMATS[d.fmt], d.rule), d.oracle(x, FORMATS[d.fmt], d.rule)
    np.testing.assert_array_equal((got.scales[0, 0], got.values[0, 0]), d.ours)
    np.testing.assert_array_equal((other.scales[0, 0], other.values[0, 0]), d.theirs)


def test_ml_dtypes_does_not_saturate():
    """The one known difference of an element cast: `rounded_by_cast` clips before it casts."""
    beyond = np.array([480, 65536], np.float32)
    assert np.isnan(beyond[0].astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.isinf(beyond[1].astype(ml_dtypes.float8_e5m2).astype(np.float32))
    assert reference.round_elements(torch.from_numpy(beyond[:1]), MXFP8_E4M3).item() == 448
    assert reference.round_elements(torch.from_numpy(beyond[1:]), MXFP8_E5M2).item() == 57344
