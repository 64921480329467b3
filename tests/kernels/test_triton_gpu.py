"""The Triton kernels compiled, on a real GPU. Compiling takes most of the time: with pytest-xdist, use -n 8."""

from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxcompile.formats import FORMATS, MXFP4, MXFP6_E3M2, MXFP8_E4M3, MXINT4, MXINT6, MXINT8, MXFormat, ScaleRule
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack, unpack
from mxcompile.numerics.straight_through import straight_through
from mxcompile.ops import DEQUANTIZE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 3, 16, 64, 257)
SHAPES = ((257, 1000), (512, 576), (1536, 4096))
CASES = [
    pytest.param(fmt, rule, id=f"{fmt}-{rule.name}")
    for fmt, rule in product(FORMATS.values(), ScaleRule)
    if rule is not ScaleRule.T725 or fmt is MXFP4
]
ErrorOverBound = Callable[..., float]
SameBits = Callable[[Tensor, Tensor], None]


def random_weight(
    fmt: MXFormat, out: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randn(out, size, generator=torch.Generator().manual_seed(out)).to(device)
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    dense = reference.dequantize(codes, scales, fmt, size, dtype)
    return pack(codes, fmt).cuda(), scales.cuda(), dense.cuda()


def check_products(
    fmt: MXFormat, dtype: torch.dtype, shape: tuple[int, int], rows: tuple[int, ...], error_over_bound: ErrorOverBound
) -> None:
    from mxcompile.kernels.triton import rows_linear

    elements, scales, w = random_weight(fmt, *shape, dtype)
    for m in rows:
        generator = torch.Generator(device="cuda").manual_seed(m)
        x = torch.randn(m, shape[1], generator=generator, device="cuda").to(dtype)
        bias = torch.randn(shape[0], generator=generator, device="cuda").to(dtype) if m % 2 else None
        assert rows_linear.supports(x, fmt) is None
        y = rows_linear.linear(x, elements, scales, bias, fmt)
        assert error_over_bound(y, x, w, bias) <= 1, f"{m} rows"
        assert torch.equal(rows_linear.linear(x, elements, scales, bias, fmt), y), f"{m} rows: not deterministic"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_format(
    error_over_bound: ErrorOverBound, fmt: MXFormat, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    check_products(fmt, dtype, shape, ROWS, error_over_bound)


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_block_size(error_over_bound: ErrorOverBound, fmt: MXFormat, block: int) -> None:
    check_products(fmt.with_block(block), torch.bfloat16, (257, 1000), (3, 257), error_over_bound)
    check_products(fmt.with_block(block), torch.float16, (512, 576), (16,), error_over_bound)
    check_products(fmt.with_block(block), torch.float32, (257, 1000), (3,), error_over_bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_one_input_gives_every_code_and_scale_exactly(fmt: MXFormat, dtype: torch.dtype) -> None:
    """Inf and NaN codes, float16 overflow, subnormals: one product by a power of two, so y is known exactly.

    Other powers than 1 show that the weight is rounded to x's dtype before the product.
    """
    from mxcompile.kernels.triton import rows_linear

    codes = torch.zeros(256 * 2**fmt.bits, fmt.block_size, dtype=torch.uint8)
    codes[:, 0] = torch.arange(2**fmt.bits, dtype=torch.int32).to(torch.uint8).repeat(256)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat_interleave(2**fmt.bits)[:, None]
    x = torch.tensor([[2.0**-10], [1.0], [2.0**10]], dtype=dtype)
    y = rows_linear.linear(x.cuda(), pack(codes, fmt).cuda(), scales.cuda(), None, fmt).cpu()
    expected = (x.double() * reference.dequantize(codes, scales, fmt, 1, dtype).double().T).to(dtype)
    assert ((y == expected) | (y.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("fmt", [MXINT8, MXFP8_E4M3, MXFP6_E3M2, MXFP4], ids=str)
def test_strides_and_shapes(error_over_bound: ErrorOverBound, fmt: MXFormat) -> None:
    from mxcompile.kernels.triton import rows_linear

    elements, scales, w = random_weight(fmt, 100, 77, torch.bfloat16)
    x = torch.randn(154, 154, device="cuda").to(torch.bfloat16)
    for view in (
        x[:, ::2],
        x[:77].T,
        x[:6, 5:82],
        x[:6, :77].unflatten(0, (3, 2)).transpose(0, 1),
        x[0, :77],
        x[:0, :77],
    ):
        y = rows_linear.linear(view, elements, scales, None, fmt)
        assert y.shape == (*view.shape[:-1], 100)
        assert error_over_bound(y.reshape(-1, 100), view.reshape(-1, 77), w, None) <= 1


def test_nan_scale_makes_exactly_its_column_nan() -> None:
    from mxcompile.kernels.triton import rows_linear

    elements, scales, _ = random_weight(MXFP4, 512, 576, torch.bfloat16)
    scales[77, 3] = 255
    for rows in (1, 257):
        x = torch.randn(rows, 576, device="cuda").to(torch.bfloat16)
        nan = rows_linear.linear(x, elements, scales, None, MXFP4).isnan()
        assert nan[:, 77].all()
        assert int(nan.sum()) == rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fmt", "rule"), CASES)
def test_quantize_dequantize(
    assert_same_bits: SameBits, nasty_blocks: Callable[..., Tensor], fmt: MXFormat, rule: ScaleRule, dtype: torch.dtype
) -> None:
    """Against the reference on the CPU: edge-case blocks, all kinds of bit patterns, and values of a common size.

    And which elements pass a gradient.
    """
    from mxcompile.kernels.triton import quantize

    generator = torch.Generator().manual_seed(0)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    bits = torch.randint(-(2**31), 2**31, (512, 1000), generator=generator, dtype=torch.int64)
    wild = bits.to(width).view(dtype)
    wild = torch.where(wild.isfinite() | (bits % 64 == 0), wild, 1.0)
    tame = torch.randn(512, 1024, generator=generator).to(dtype)
    for x in (nasty_blocks(fmt, dtype), wild, tame):
        y = quantize.quantize_dequantize(x.cuda(), fmt, rule)
        assert_same_bits(y.cpu(), reference.quantize_dequantize(x, fmt, rule))
        passed = quantize.straight_through(torch.ones_like(x, device="cuda"), x.cuda(), fmt, rule)
        assert_same_bits(passed.cpu(), straight_through(torch.ones_like(x), x, fmt, rule))


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_quantize_dequantize_block_sizes(assert_same_bits: SameBits, fmt: MXFormat, block: int) -> None:
    from mxcompile.kernels.triton import quantize

    x = torch.randn(65, 1000).to(torch.bfloat16)
    y = quantize.quantize_dequantize(x.cuda(), fmt.with_block(block), ScaleRule.RCEIL)
    assert_same_bits(y.cpu(), reference.quantize_dequantize(x, fmt.with_block(block), ScaleRule.RCEIL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_dequantize_every_code_and_scale(assert_same_bits: SameBits, fmt: MXFormat, dtype: torch.dtype) -> None:
    from mxcompile.kernels.triton import quantize

    for block in (16, 32, 64, 128):
        blocked = fmt.with_block(block)
        codes = torch.arange(max(2**fmt.bits, block), dtype=torch.int32).remainder(2**fmt.bits).to(torch.uint8)
        scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, len(codes) // block)
        codes = codes.expand(256, -1)
        size = codes.shape[-1] - 5
        y = quantize.dequantize(pack(codes, blocked).cuda(), scales.cuda(), blocked, size, dtype)
        assert_same_bits(y.cpu(), reference.dequantize(codes, scales, blocked, size, dtype))


@pytest.mark.parametrize("fmt", [MXFP4, MXINT6, MXFP8_E4M3.with_alignment(True)], ids=str)
def test_the_operator_decodes_without_temporaries(assert_same_bits: SameBits, fmt: MXFormat) -> None:
    """Packed weights of 2 and 3 dimensions. Aligned formats, which the kernel does not decode, as before."""
    for shape in ((512, 1000), (3, 64, 96)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        codes, scales = reference.quantize(weight, fmt, ScaleRule.FLOOR)
        expected = reference.dequantize(codes, scales, fmt, shape[-1], torch.bfloat16)
        elements, scales = pack(codes, fmt).cuda(), scales.cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = DEQUANTIZE(elements, scales, str(fmt), shape[-1], torch.bfloat16)
        peak = torch.cuda.max_memory_allocated() - before
        assert_same_bits(y.cpu(), expected)
        assert fmt.aligned or peak <= 2 * y.nbytes, peak


def _needs_gigabytes(count: int) -> None:
    if torch.cuda.mem_get_info()[0] < count << 30:
        pytest.skip(f"needs {count} GiB of free GPU memory")


def test_linear_offsets_beyond_2_31(error_over_bound: ErrorOverBound) -> None:
    from mxcompile.kernels.triton import rows_linear

    _needs_gigabytes(16)
    elements, scales, w = random_weight(MXFP4, 64, 32768, torch.bfloat16)
    x = torch.zeros(70000, 32768, dtype=torch.bfloat16, device="cuda")  # 2.3e9 values
    x[-3:] = torch.randn(3, 32768, device="cuda")
    y = rows_linear.linear(x, elements, scales, None, MXFP4)
    assert error_over_bound(y[-3:], x[-3:], w, None) <= 1
    last, x = x[-3:].clone(), None
    many = torch.zeros(140000, elements.shape[1], dtype=torch.uint8, device="cuda")  # 2.3e9 bytes
    many[-64:] = elements
    y = rows_linear.linear(last, many, scales[:1].expand(140000, -1), None, MXFP4)
    w = reference.dequantize(unpack(elements, MXFP4), scales[:1].expand(64, -1), MXFP4, 32768, torch.bfloat16)
    assert error_over_bound(y[:, -64:], last, w, None) <= 1


def test_output_and_quantize_offsets_beyond_2_31(error_over_bound: ErrorOverBound, assert_same_bits: SameBits) -> None:
    from mxcompile.kernels.triton import quantize, rows_linear

    _needs_gigabytes(16)
    elements, scales, w = random_weight(MXFP4, 32800, 32, torch.bfloat16)
    x = torch.randn(65600, 32, device="cuda").to(torch.bfloat16)
    y = rows_linear.linear(x, elements, scales, None, MXFP4)  # 2.15e9 values
    assert error_over_bound(y[-3:], x[-3:], w, None) <= 1
    q = quantize.quantize_dequantize(y, MXFP4, ScaleRule.FLOOR)
    assert_same_bits(q[-3:].cpu(), reference.quantize_dequantize(y[-3:].cpu(), MXFP4, ScaleRule.FLOOR))


def test_second_gpu(error_over_bound: ErrorOverBound) -> None:
    from mxcompile.kernels.triton import rows_linear

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    elements, scales, w = (t.to("cuda:1") for t in random_weight(MXFP4, 257, 1000, torch.bfloat16))
    x = torch.randn(3, 1000, device="cuda:1").to(torch.bfloat16)
    assert error_over_bound(rows_linear.linear(x, elements, scales, None, MXFP4), x, w, None) <= 1


def test_interpreted_compiled_and_inductor_kernels_in_one_process(
    interpreted: SimpleNamespace, error_over_bound: ErrorOverBound
) -> None:
    elements, scales, w = random_weight(MXFP8_E4M3, 40, 96, torch.float32)
    x = torch.randn(3, 96, device="cuda")
    y = interpreted.linear.linear(x.cpu(), elements.cpu(), scales.cpu(), None, MXFP8_E4M3)
    assert error_over_bound(y, x.cpu(), w.cpu(), None) <= 1
    check_products(MXFP8_E4M3, torch.float32, (40, 96), (3,), error_over_bound)
    compiled = torch.compile(lambda a: a.softmax(-1))(x)  # its kernel uses triton's own max and sum
    assert (compiled - x.softmax(-1)).abs().max().item() <= 2**-20


PLANES_OPTIONS = [
    {"rows": 8, "out": 64, "warps": 2, "joined": False, "split": 4},
    {"rows": 8, "out": 32, "warps": 1, "joined": False, "split": 3, "dependent": True, "prefetch": 2},
    {"rows": 16, "out": 64, "split": 2, "stages": 3},
    {"rows": 64, "out": 128, "warps": 8, "stages": 2, "dependent": True},
    {"rows": 128, "out": 128, "warps": 8, "stages": 2, "joined": False, "group": 2},
]


@pytest.mark.parametrize("options", PLANES_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_planes(
    error_over_bound: ErrorOverBound, fmt: MXFormat, shape: tuple[int, int], options: dict[str, int]
) -> None:
    from mxcompile.kernels.layout.planes import to_planes
    from mxcompile.kernels.triton import dequantize, planes_linear

    elements, scales, w = random_weight(fmt, *shape, torch.bfloat16)
    planes, config = to_planes(elements, scales, fmt, shape[1]), planes_linear.Config(**options)
    assert torch.equal(dequantize.dequantize(planes), w)
    for m in ROWS:
        x = torch.randn(m, shape[1], device="cuda").to(torch.bfloat16)
        bias = torch.randn(shape[0], device="cuda").to(torch.bfloat16) if m % 2 else None
        counters = torch.zeros(planes_linear.counters_needed(m, planes, config), dtype=torch.int32, device="cuda")
        y = planes_linear.linear(x, planes, bias, config, counters)
        assert error_over_bound(y, x, w, bias) <= 1, f"{m} rows"
        for _ in range(3):
            assert torch.equal(planes_linear.linear(x, planes, bias, config, counters), y), f"{m} rows: repeated"
        assert not counters.any()


def test_wgmma_has_read_its_registers_before_they_are_written(error_over_bound: ErrorOverBound) -> None:
    """With this many programs, half of all calls were wrong when Triton let wgmma run into the next K-step."""
    from mxcompile.kernels.layout.planes import to_planes
    from mxcompile.kernels.triton import planes_linear

    elements, scales, w = random_weight(MXINT4, 28672, 4096, torch.bfloat16, "cuda")
    planes, x = to_planes(elements, scales, MXINT4, 4096), torch.randn(64, 4096, device="cuda").to(torch.bfloat16)
    for options in ({"out": 64, "stages": 3}, {"out": 128, "warps": 8, "stages": 3}):
        config = planes_linear.Config(64, split=2, **options)
        y = planes_linear.linear(x, planes, None, config)
        assert error_over_bound(y, x, w, None) <= 1
        for _ in range(50):
            assert torch.equal(planes_linear.linear(x, planes, None, config), y)


HELD_OPTIONS = [{}, {"warps": 4, "held": 2, "dependent": True}, {"rows": 4, "out": 32, "warps": 2}]


@pytest.mark.parametrize("options", HELD_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_held_planes(
    error_over_bound: ErrorOverBound, fmt: MXFormat, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    from mxcompile.kernels.layout.planes import to_planes
    from mxcompile.kernels.triton import held_planes

    elements, scales, w = random_weight(fmt, *shape, torch.bfloat16)
    planes = to_planes(elements, scales, fmt, shape[1])
    config = held_planes.for_k_steps(held_planes.Config(**options), planes.words.shape[1])
    for m in ROWS:
        x = torch.randn(m, shape[1], device="cuda").to(torch.bfloat16)
        bias = torch.randn(shape[0], device="cuda").to(torch.bfloat16) if m % 2 else None
        y = held_planes.linear(x, planes, bias, config)
        assert error_over_bound(y, x, w, bias) <= 1, f"{m} rows"
        assert torch.equal(held_planes.linear(x, planes, bias, config), y), f"{m} rows: repeated"


ATTENTION_SHAPES = [
    (1, 32, 8, 2048, 128),
    (1, 32, 8, 98, 128),
    (2, 9, 3, 8190, 64),
    (1, 71, 1, 333, 64),
    (3, 12, 12, 1024, 80),
    (1, 8, 4, 4097, 256),
    (40, 8, 4, 65, 16),
]


def attention_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Arguments of `attend`: a part of a cache and every kind of mask."""
    batch, heads, shared, keys, size = shape
    generator = torch.Generator(device="cuda").manual_seed(0)
    query = torch.randn(batch, 1, heads, size, generator=generator, device="cuda").to(dtype).transpose(1, 2)
    cache = torch.randn(2, batch, shared, keys + 9, size, generator=generator, device="cuda").to(dtype)[..., 5:-4, :]
    left = torch.rand(batch, 1, 1, keys, generator=generator, device="cuda") < 0.7
    bias = torch.randn(batch, heads, 1, keys, generator=generator, device="cuda").to(dtype)
    for mask in (left & False, None, left, torch.where(left, 0.0, -65536.0).to(torch.bfloat16), bias):
        yield (query, *cache, mask, size**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention(attention_over_bound: Callable[..., float], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also bit-identical on repeat."""
    from mxcompile.kernels import dispatch
    from mxcompile.kernels.triton.attention import one_token

    dispatch.prepare(torch.device("cuda", torch.cuda.current_device()))
    for args in attention_arguments(shape, dtype):
        assert one_token.supports(*args[:4]) is None
        y = one_token.attend(*args)
        assert attention_over_bound(y, *args) <= 1
        assert all(torch.equal(one_token.attend(*args), y) for _ in range(3))


@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_in_a_cuda_graph(shape: tuple[int, ...]) -> None:
    """Separate, since a graph needs the caching allocator; without that allocator compute-sanitizer sees more."""
    from mxcompile.kernels import dispatch
    from mxcompile.kernels.triton.attention import one_token

    dispatch.prepare(torch.device("cuda", torch.cuda.current_device()))
    *_, args = attention_arguments(shape, torch.bfloat16)
    y = one_token.attend(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_token.attend(*args)
    for _ in range(3):
        captured.fill_(1)
        graph.replay()
        assert torch.equal(captured, y)
