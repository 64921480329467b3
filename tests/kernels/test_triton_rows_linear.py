"""triton/rows_linear.py against float64, and against reference.dequantize, in Triton's interpreter."""

import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import BLOCK_SIZES, FORMATS, MXFP4, MXFP6_E2M3, MXFP8_E5M2, MXINT8, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ErrorOverBound = Callable[..., float]
# NaN and Inf, with which numpy computes under protest, are the point of some tests.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def weight(fmt: MXFormat, out: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight: packed elements, scales, and its values in `dtype`."""
    values = torch.randn(out, size, generator=torch.Generator().manual_seed(out * 1000 + size))
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    return pack(codes, fmt), scales, reference.dequantize(codes, scales, fmt, size, dtype)


def tokens(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize(("rows", "fmt", "dtype"), crossed([17, 0, 1, 3, 16], FORMATS.values(), DTYPES), ids=str)
def test_every_format(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, fmt: MXFormat, dtype: torch.dtype, rows: int
) -> None:
    elements, scales, w = weight(fmt, 37, 77, dtype)
    x, bias = tokens(rows, 77, dtype), tokens(1, 37, dtype)[0] if rows % 2 else None
    y = interpreted.linear.linear(x, elements, scales, bias, fmt)
    assert (y.shape, y.dtype) == ((rows, 37), dtype)
    assert error_over_bound(y, x, w, bias) <= 1


@pytest.mark.parametrize(("out", "size"), [(1, 1), (33, 7), (64, 64), (65, 129), (130, 257), (16, 512)])
@pytest.mark.parametrize("fmt", [MXINT8, MXFP6_E2M3, MXFP4], ids=str)
def test_any_size_in_bounds(
    interpreted: SimpleNamespace,
    error_over_bound: ErrorOverBound,
    accesses: ...,
    fmt: MXFormat,
    out: int,
    size: int,
) -> None:
    elements, scales, w = weight(fmt, out, size, torch.float16)
    x, bias = tokens(5, size, torch.float16), tokens(1, out, torch.float16)[0]
    y = interpreted.linear.linear(x, elements, scales, bias, fmt)
    assert error_over_bound(y, x, w, bias) <= 1
    accesses.assert_within([x, elements, scales, bias], y)


@pytest.mark.parametrize(
    ("fmt", "block"), crossed([MXFP4, *(fmt for fmt in FORMATS.values() if fmt is not MXFP4)], BLOCK_SIZES), ids=str
)
def test_every_block_size(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, accesses: ..., fmt: MXFormat, block: int
) -> None:
    fmt = fmt.with_block(block)
    for size, dtype in ((256, torch.bfloat16), (150, torch.float32)):
        accesses.loads.clear()
        accesses.stores.clear()
        elements, scales, w = weight(fmt, 20, size, dtype)
        x = tokens(2, size, dtype)
        y = interpreted.linear.linear(x, elements, scales, None, fmt)
        assert error_over_bound(y, x, w, None) <= 1
        accesses.assert_within([x, elements, scales], y)


@pytest.mark.parametrize("rows", [64, 150])
def test_larger_tiles(interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, rows: int) -> None:
    elements, scales, w = weight(MXFP4, 140, 96, torch.bfloat16)
    x = tokens(rows, 96, torch.bfloat16)
    assert error_over_bound(interpreted.linear.linear(x, elements, scales, None, MXFP4), x, w, None) <= 1


@pytest.mark.parametrize(("fmt", "dtype"), crossed(FORMATS.values(), DTYPES), ids=str)
def test_identity_gives_the_weight_exactly(interpreted: SimpleNamespace, fmt: MXFormat, dtype: torch.dtype) -> None:
    elements, scales, w = weight(fmt, 35, 65, dtype)
    y = interpreted.linear.linear(torch.eye(65, dtype=dtype), elements, scales, None, fmt)
    assert torch.equal(y, w.T)


@pytest.mark.parametrize(("fmt", "dtype"), crossed(FORMATS.values(), DTYPES), ids=str)
def test_one_input_gives_every_code_and_scale_exactly(
    interpreted: SimpleNamespace, fmt: MXFormat, dtype: torch.dtype
) -> None:
    """Inf and NaN codes, float16 overflow, subnormals: one product by a power of two, so y is known exactly.

    Other powers than 1 show that the weight is rounded to x's dtype before the product.
    """
    bytes_ = torch.tensor([0, 1, 7, 104, 127, 140, 254, 255], dtype=torch.uint8)
    codes = torch.zeros(len(bytes_) * 2**fmt.bits, fmt.block_size, dtype=torch.uint8)
    codes[:, 0] = torch.arange(2**fmt.bits, dtype=torch.int32).to(torch.uint8).repeat(len(bytes_))
    scales = bytes_.repeat_interleave(2**fmt.bits)[:, None]
    x = torch.tensor([[2.0**-10], [1.0], [2.0**10]], dtype=dtype)
    y = interpreted.linear.linear(x, pack(codes, fmt), scales, None, fmt)
    expected = (x.double() * reference.dequantize(codes, scales, fmt, 1, dtype).double().T).to(dtype)
    assert ((y == expected) | (y.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [MXINT8, MXFP8_E5M2, MXFP6_E2M3, MXFP4], ids=str)
def test_nan_scale_makes_exactly_its_column_nan(
    interpreted: SimpleNamespace, fmt: MXFormat, dtype: torch.dtype
) -> None:
    elements, scales, _ = weight(fmt, 40, 96, dtype)
    scales[7, 1] = 255
    y = interpreted.linear.linear(torch.zeros(3, 96, dtype=dtype), elements, scales, None, fmt)
    expected = torch.zeros(40, dtype=torch.bool)
    expected[7] = True
    assert torch.equal(y.isnan(), expected.expand(3, -1))


def test_padding_of_the_last_block_counts_for_nothing(interpreted: SimpleNamespace) -> None:
    codes, scales = reference.quantize(torch.randn(33, 70), MXFP8_E5M2, ScaleRule.FLOOR)
    x = tokens(3, 70, torch.bfloat16)
    clean = interpreted.linear.linear(x, pack(codes, MXFP8_E5M2), scales, None, MXFP8_E5M2)
    codes[:, 70:] = torch.tensor([0x7C, 0x7E]).repeat(13)  # Inf, NaN
    assert torch.equal(interpreted.linear.linear(x, pack(codes, MXFP8_E5M2), scales, None, MXFP8_E5M2), clean)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2], id="every second column"),
        pytest.param(lambda x: x[:, 3:80], id="offset"),
        pytest.param(lambda x: x[:77].T[:6].T.T, id="transposed"),
        pytest.param(lambda x: x[:6, :77].unflatten(0, (3, 2)), id="3-D"),
        pytest.param(lambda x: x[:6, :77].unflatten(0, (3, 2)).transpose(0, 1), id="3-D, permuted"),
        pytest.param(lambda x: x[0, :77], id="1-D"),
        pytest.param(lambda x: x[:1, :77].expand(4, -1), id="expanded"),
        pytest.param(lambda x: x[:0, :77].unflatten(0, (0, 2)), id="3-D, no rows"),
    ],
)
def test_any_shape_and_stride(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound, view: Callable[[Tensor], Tensor]
) -> None:
    x = view(tokens(100, 154, torch.float32))
    elements, scales, w = weight(MXFP6_E2M3, 18, 77, torch.float32)
    y = interpreted.linear.linear(x, elements, scales, None, MXFP6_E2M3)
    assert y.shape == (*x.shape[:-1], 18)
    assert error_over_bound(y.reshape(-1, 18), x.reshape(-1, 77), w, None) <= 1


def test_rows_of_a_larger_weight(interpreted: SimpleNamespace) -> None:
    elements, scales, _ = weight(MXFP4, 60, 96, torch.bfloat16)
    x = tokens(3, 96, torch.bfloat16)
    whole = interpreted.linear.linear(x, elements, scales, None, MXFP4)
    some = interpreted.linear.linear(x, elements[10:50:2], scales[10:50:2], None, MXFP4)
    assert torch.equal(some, whole[:, 10:50:2])


def test_no_inputs_or_no_outputs(interpreted: SimpleNamespace) -> None:
    elements, scales, _ = weight(MXFP4, 5, 32, torch.bfloat16)
    bias = tokens(1, 5, torch.bfloat16)[0]
    y = interpreted.linear.linear(torch.zeros(2, 0, dtype=torch.bfloat16), elements[:, :0], scales[:, :0], bias, MXFP4)
    assert torch.equal(y, bias.expand(2, -1))
    y = interpreted.linear.linear(tokens(2, 32, torch.bfloat16), elements[:0], scales[:0], None, MXFP4)
    assert y.shape == (2, 0)


def test_shapes_that_disagree_are_refused(interpreted: SimpleNamespace) -> None:
    elements, scales, _ = weight(MXFP4, 5, 64, torch.bfloat16)
    x = tokens(2, 64, torch.bfloat16)
    with pytest.raises(MXCompileError, match=r"scales must be \(5, 1\), not \(5, 2\)"):
        interpreted.linear.linear(x[:, :32], elements, scales, None, MXFP4)
    with pytest.raises(MXCompileError, match=r"elements must be \(5, 64\), not \(5, 32\)"):
        interpreted.linear.linear(x, elements, scales, None, MXINT8)
    with pytest.raises(MXCompileError, match=r"bias must be \(5,\), not \(4,\)"):
        interpreted.linear.linear(x, elements, scales, x[0, :4], MXFP4)


def test_supports_says_why_not(interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    supports, device_counters = interpreted.linear.supports, interpreted.linear.unsupported_device.__globals__
    assert supports(torch.zeros(2, 32), MXFP4) == "Triton kernels need a CUDA device, not cpu"
    assert "not int8" in supports(torch.zeros(2, 32, dtype=torch.int8), MXFP4)
    monkeypatch.setitem(device_counters, "capability", lambda device: (7, 5))
    on_gpu = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda", 0))
    assert "8.0 or newer, this GPU has 7.5" in supports(on_gpu, MXFP4)
    monkeypatch.setitem(device_counters, "capability", lambda device: (9, 0))
    assert supports(on_gpu, MXFP4) is None


def test_interpreter_leaves_triton_and_inductor_alone(interpreted: SimpleNamespace) -> None:
    triton = pytest.importorskip("triton")
    before = {module: dict(vars(module)) for module in (triton.language, triton.language.core, triton.language.math)}
    elements, scales, _ = weight(MXFP4, 5, 64, torch.bfloat16)
    interpreted.linear.linear(tokens(2, 64, torch.bfloat16), elements, scales, None, MXFP4)
    interpreted.quantize.quantize_dequantize(tokens(2, 64, torch.bfloat16), MXFP4, ScaleRule.FLOOR)
    assert all(vars(module) == names for module, names in before.items())
    assert not triton.knobs.runtime.interpret
    assert interpreted.linear is not sys.modules.get("mxcompile.kernels.triton.rows_linear")
    from mxcompile.kernels.triton import quantize, rows_linear

    assert isinstance(rows_linear._linear_kernel, triton.JITFunction)
    assert isinstance(quantize._dequantize_kernel, triton.JITFunction)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ for CPU code")
def test_torch_compile_still_works_afterwards(interpreted: SimpleNamespace) -> None:
    elements, scales, w = weight(MXFP4, 5, 64, torch.float32)
    x = tokens(2, 64, torch.float32)
    interpreted.linear.linear(x, elements, scales, None, MXFP4)

    def function(a: Tensor) -> Tensor:
        return torch.nn.functional.gelu(a @ w.T).softmax(-1).sum(0)

    difference = (torch.compile(function)(x) - function(x)).abs().max().item()
    assert difference <= 2**-20  # five sums of two softmax values: a few units in the last place of 1
