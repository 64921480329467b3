"""triton/quantize.py against reference.py, bit for bit, in Triton's interpreter."""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import BLOCK_SIZES, FORMATS, MXFP4, MXFP6_E3M2, MXFP8_E4M3, MXINT4, MXINT8, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack
from mxcompile.numerics.straight_through import straight_through

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [
    (fmt, rule) for fmt, rule in product(FORMATS.values(), ScaleRule) if rule is not ScaleRule.T725 or fmt is MXFP4
]
SameBits = Callable[[Tensor, Tensor], None]
# NaN and Inf, with which numpy computes under protest, are the point here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Uniform bit patterns: all exponents, subnormals, NaN and Inf."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(width).view(dtype)


@pytest.mark.parametrize(("case", "dtype"), crossed(CASES, DTYPES), ids=str)
def test_nasty_blocks(
    interpreted: SimpleNamespace,
    assert_same_bits: SameBits,
    nasty_blocks: Callable[..., Tensor],
    case: tuple[MXFormat, ScaleRule],
    dtype: torch.dtype,
) -> None:
    fmt, rule = case
    x = nasty_blocks(fmt, dtype)
    expected = reference.quantize_dequantize(x, fmt, rule)
    assert_same_bits(interpreted.quantize.quantize_dequantize(x, fmt, rule), expected)


@pytest.mark.parametrize("size", [1, 15, 33, 64, 129])
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_any_size_and_block_in_bounds(
    interpreted: SimpleNamespace, assert_same_bits: SameBits, accesses: ..., block: int, size: int
) -> None:
    for fmt, dtype in product((MXINT8, MXFP8_E4M3, MXFP4), (torch.bfloat16, torch.float32)):
        accesses.loads.clear()
        accesses.stores.clear()
        x = random_bits((3, size), dtype, seed=size)
        fmt_ = fmt.with_block(block)
        y = interpreted.quantize.quantize_dequantize(x, fmt_, ScaleRule.RCEIL)
        assert_same_bits(y, reference.quantize_dequantize(x, fmt_, ScaleRule.RCEIL))
        accesses.assert_within([x], y)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.T, id="transposed"),
        pytest.param(lambda x: x[:, ::3], id="every third column"),
        pytest.param(lambda x: x[::2, 5:70], id="offset, every second row"),
        pytest.param(lambda x: x.unflatten(0, (3, 2)).transpose(0, 1), id="3-D, permuted"),
        pytest.param(lambda x: x[0], id="1-D"),
        pytest.param(lambda x: x[:1].expand(4, -1), id="expanded"),
        pytest.param(lambda x: x[:0], id="no rows"),
        pytest.param(lambda x: x[:, :0], id="no columns"),
    ],
)
def test_any_shape_and_stride(
    interpreted: SimpleNamespace, assert_same_bits: SameBits, view: Callable[[Tensor], Tensor]
) -> None:
    x = view(random_bits((6, 100), torch.bfloat16, seed=1))
    y = interpreted.quantize.quantize_dequantize(x, MXFP6_E3M2, ScaleRule.EVEN)
    expected = reference.quantize_dequantize(x, MXFP6_E3M2, ScaleRule.EVEN) if x.numel() else x
    assert_same_bits(y, expected)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(CASES),
    block=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    size=st.integers(1, 150),
    seed=st.integers(0, 2**31),
)
def test_random_bit_patterns(
    interpreted: SimpleNamespace,
    assert_same_bits: SameBits,
    case: tuple[MXFormat, ScaleRule],
    block: int,
    dtype: torch.dtype,
    rows: int,
    size: int,
    seed: int,
) -> None:
    fmt, rule = case[0].with_block(block), case[1]
    x = random_bits((rows, size), dtype, seed)
    x[::2] = torch.where(x[::2].isfinite(), x[::2], 0.0)
    once = interpreted.quantize.quantize_dequantize(x, fmt, rule)
    assert_same_bits(once, reference.quantize_dequantize(x, fmt, rule))


@pytest.mark.parametrize(("case", "dtype"), crossed(CASES, DTYPES), ids=str)
def test_gradients_without_saturated_elements(
    interpreted: SimpleNamespace,
    assert_same_bits: SameBits,
    nasty_blocks: Callable[..., Tensor],
    case: tuple[MXFormat, ScaleRule],
    dtype: torch.dtype,
) -> None:
    fmt, rule = case
    x = nasty_blocks(fmt, dtype)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = straight_through(gradient, x, fmt, rule)
    assert_same_bits(interpreted.quantize.straight_through(gradient, x, fmt, rule), expected)


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_scales_of_least_squares(interpreted: SimpleNamespace, assert_same_bits: SameBits, block: int) -> None:
    """Ordinary blocks, of which each of the three scales is the best of some."""
    x = torch.randn(64, 130, generator=torch.Generator().manual_seed(block))
    for fmt in (MXINT4.with_block(block), MXFP4.with_block(block), MXFP6_E3M2.with_block(block)):
        searched, floor = (reference.quantize(x, fmt, rule)[1].int() for rule in (ScaleRule.MSE, ScaleRule.FLOOR))
        assert {*(searched - floor).flatten().tolist()} >= {0, 1}
        expected = reference.quantize_dequantize(x, fmt, ScaleRule.MSE)
        assert_same_bits(interpreted.quantize.quantize_dequantize(x, fmt, ScaleRule.MSE), expected)


def test_own_maximum(interpreted: SimpleNamespace, assert_same_bits: SameBits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests replace the kernel's combining function with Triton's own; the kernel's is slow to interpret."""
    monkeypatch.setattr(interpreted.quantize, "maximum", interpreted.larger)
    x = random_bits((3, 40), torch.float32, seed=3)
    y = interpreted.quantize.quantize_dequantize(x, MXFP4, ScaleRule.FLOOR)
    assert_same_bits(y, reference.quantize_dequantize(x, MXFP4, ScaleRule.FLOOR))


@pytest.mark.parametrize(
    ("block", "fmt"), crossed([32, *(size for size in BLOCK_SIZES if size != 32)], FORMATS.values()), ids=str
)
def test_dequantize_every_code_and_scale(
    interpreted: SimpleNamespace, assert_same_bits: SameBits, fmt: MXFormat, block: int
) -> None:
    fmt = fmt.with_block(block)
    codes = torch.arange(max(2**fmt.bits, block), dtype=torch.int32).remainder(2**fmt.bits).to(torch.uint8)
    bytes_ = torch.arange(256, dtype=torch.uint8)[slice(None) if block == 32 else slice(3, None, 36)]
    scales = bytes_[:, None].expand(-1, len(codes) // block)
    codes = codes.expand(len(bytes_), -1)
    for dtype, size in zip(DTYPES, (codes.shape[-1], codes.shape[-1] - 5, codes.shape[-1]), strict=True):
        y = interpreted.quantize.dequantize(pack(codes, fmt), scales, fmt, size, dtype)
        assert_same_bits(y, reference.dequantize(codes, scales, fmt, size, dtype))


@pytest.mark.parametrize("fmt", [MXINT8, MXFP6_E3M2, MXFP4], ids=str)
def test_dequantize_in_bounds(
    interpreted: SimpleNamespace, assert_same_bits: SameBits, accesses: ..., fmt: MXFormat
) -> None:
    codes, scales = reference.quantize(torch.randn(5, 70), fmt, ScaleRule.FLOOR)
    elements = pack(codes, fmt)
    y = interpreted.quantize.dequantize(elements, scales, fmt, 70, torch.bfloat16)
    assert_same_bits(y, reference.dequantize(codes, scales, fmt, 70, torch.bfloat16))
    accesses.assert_within([elements, scales], y)


def test_dequantize_refuses_shapes_that_disagree(interpreted: SimpleNamespace) -> None:
    codes, scales = reference.quantize(torch.randn(5, 70), MXFP4, ScaleRule.FLOOR)
    with pytest.raises(MXCompileError, match="size 100 cannot come from"):
        interpreted.quantize.dequantize(pack(codes, MXFP4), scales, MXFP4, 100, torch.bfloat16)


def test_supports_says_why_not(interpreted: SimpleNamespace) -> None:
    supports, x = interpreted.quantize.supports, torch.zeros(2, 32)
    assert supports(x, MXFP4, ScaleRule.FLOOR) == "Triton kernels need a CUDA device, not cpu"
    assert supports(x.double(), MXFP4, ScaleRule.FLOOR) == (
        "the Triton kernels take bfloat16, float16 or float32, not float64"
    )
    assert supports(x, MXINT8, ScaleRule.T725) == "scale rule 7.25 is a threshold of mxfp4, not of mxint8"
