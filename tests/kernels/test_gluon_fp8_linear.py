"""FP8 linear: weights and activations are exact in e4m3; the kernel is compiled here and runs on a Hopper GPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from crossed import crossed
from ptx import execute, join
from torch import Tensor

from mxcompile.formats import MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXINT4, MXINT8, MXFormat, ScaleRule
from mxcompile.kernels.layout import fp8_eligibility
from mxcompile.kernels.layout.planes import PlanarWeight, to_planes
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack

pytest.importorskip("triton")
WEIGHTS = (MXINT4, MXFP4)
HOPPER_CASES = ((MXINT4, True), (MXFP4, False), (MXFP4, True))
ACTIVATIONS = (MXFP4, MXINT4, MXFP6_E2M3, MXFP6_E3M2)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def spread(shape: tuple[int, int], span: int, seed: int = 0) -> Tensor:
    """Normal values, each block of 32 times a power of two between 1 and 2**span; the first block is zeros."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(0, span + 1, (shape[0], -(-shape[1] // 32)), generator=generator)
    values = (
        torch.randn(*shape, generator=generator).clamp(-2, 2)
        * torch.exp2(powers.float()).repeat_interleave(32, 1)[:, : shape[1]]
    )
    values[0, :32] = 0
    return values


def packed(fmt: MXFormat, shape: tuple[int, int], scales: Tensor, device: str = "cpu") -> tuple[PlanarWeight, Tensor]:
    """A weight with every code and given scales `[out, blocks]`, and its values in float64."""
    codes = torch.randint(0, 16, (shape[0], scales.shape[1] * 32), generator=torch.Generator().manual_seed(1))
    codes = codes.to(torch.uint8)
    codes[0, :32] = 0
    codes[:, shape[1] :] = 0
    dense = reference.dequantize(codes, scales, fmt, shape[1], torch.float32).double()
    return to_planes(pack(codes, fmt).to(device), scales.to(device), fmt, shape[1]), dense.to(device)


def decoded(planes: PlanarWeight) -> Tensor:
    """The weight as decoded by the PTX of gluon/decode_to_e4m3.py: e4m3 `[out, in]`."""
    from mxcompile.kernels.gluon import decode_to_e4m3

    words = join(planes.words[:, :, 0].unflatten(-1, (-1, 2, 2)), 16)
    steps, offsets = decode_to_e4m3.steps(planes.fmt), decode_to_e4m3.offsets(planes.fmt, planes.top)
    values: list[Tensor] = []
    for plane, ptx in enumerate(decode_to_e4m3.assembly(planes.fmt)):
        byte = ((planes.scales[:, :, 0].long() >> (8 * plane)) & 0xFF).unsqueeze(-1)
        first, second = ((byte * step + offset) % 2**32 for step, offset in zip(steps, offsets, strict=True))
        four = execute(ptx, {"$1": words[..., 0], "$2": words[..., 1], "$3": first, "$7": second})
        scale_bytes = torch.stack([(four >> (8 * i)) & 0xFF for i in range(4)], -1)
        values.append(scale_bytes.flatten(-2).to(torch.uint8).view(torch.float8_e4m3fn))
    return torch.stack(values, -2).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1)[: planes.out, : planes.size]


@pytest.mark.parametrize("fmt", WEIGHTS, ids=str)
@pytest.mark.parametrize("lowest", [5, 100, 235])
def test_every_code_on_every_scale_of_the_span_is_an_e4m3_number(fmt: MXFormat, lowest: int) -> None:
    from mxcompile.kernels.gluon import decode_to_e4m3

    span = fp8_eligibility.largest_span(fmt)
    assert span is not None
    scales = lowest + torch.arange(span + 1).repeat(64, 1)
    scales[0, 0] = 0  # the scale of an all-zero block, which is ignored
    planes, dense = packed(fmt, (64, 32 * (span + 1)), scales.to(torch.uint8))
    assert planes.top > 0
    power = decode_to_e4m3.power(fmt, planes.top, planes.lift)
    assert torch.equal(decoded(planes).double() * 2.0**power, dense)


@pytest.mark.parametrize("fmt", WEIGHTS, ids=str)
def test_one_more_is_too_much(fmt: MXFormat) -> None:
    scales = torch.tensor([100, 101 + (fp8_eligibility.largest_span(fmt) or 0)]).repeat(64, 1).to(torch.uint8)
    planes, _ = packed(fmt, (64, 64), scales)
    assert planes.top == 0


def test_other_formats_are_no_e4m3_numbers() -> None:
    planes = to_planes(torch.ones(64, 64, dtype=torch.uint8), torch.full((64, 2), 120, dtype=torch.uint8), MXINT8, 64)
    assert planes.top == 0
    assert "weights" in (fp8_eligibility.why_not(MXINT8, MXFP4) or "")
    assert "activations" in (fp8_eligibility.why_not(MXFP4, MXFP8_E4M3) or "")
    assert "float" in (fp8_eligibility.why_not(MXFP4, None) or "")
    assert "and mxfp8_e4m3+aligned" in (fp8_eligibility.why_not(MXFP4, MXFP8_E4M3) or "")
    assert "2**11 is the most" in (fp8_eligibility.why_not(MXFP4, MXFP4, fits=False) or "")
    assert fp8_eligibility.why_not(MXFP4, MXFP4) is None
    assert fp8_eligibility.why_not(MXFP4, MXFP8_E4M3.with_alignment()) is None


@pytest.mark.parametrize("fmt", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 32), (2, 200), (1, 416)], ids=str)
def test_activations_are_kept_exactly(
    interpreted: SimpleNamespace, fmt: MXFormat, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Blocks that differ by up to 2**6; quantizing beforehand gives the same."""
    x = spread(shape, 6).to(dtype)
    expected = reference.quantize_dequantize(x, fmt, ScaleRule.FLOOR)
    for given, rounding in ((x, (fmt, ScaleRule.FLOOR)), (expected, None)):
        aligned, powers = interpreted.align.align(given, rounding)
        assert torch.equal(aligned.double() * powers.double()[:, None], expected.double())
        assert aligned.float().abs().max() <= 256


def test_what_is_too_small_is_rounded_to_steps_of_the_tokens_largest(interpreted: SimpleNamespace) -> None:
    """The largest values stay exact, and no token depends on another."""
    x = spread((4, 512), 40)
    expected = reference.quantize_dequantize(x, MXFP4, ScaleRule.FLOOR).double()
    aligned, powers = interpreted.align.align(x, (MXFP4, ScaleRule.FLOOR))
    error = (aligned.double() * powers.double()[:, None] - expected).abs()
    largest = expected.abs().amax(-1, keepdim=True)
    assert error.max() > 0
    assert (error <= largest * 2.0**-17).all()
    assert (error[expected.abs() >= largest * 2.0**-13] == 0).all()


def hard(size: int, dtype: torch.dtype) -> Tensor:
    """Tokens of all magnitudes whose blocks differ by up to 2**20; some values round to the next power of two."""
    x = torch.cat([spread((4, size), 20, seed) * 2.0**power for seed, power in enumerate(range(-140, 120, 40))])
    x[::3] = torch.where(x[::3].abs() > 1, x[::3].sign() * 2.0 ** (x[::3].abs().log2().ceil()) * 0.98, x[::3])
    x[1::7, 0], x[2::17, -1], x[0::23], x[5::19, 1] = -0.0, torch.inf, 0, torch.nan
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("rule_and_block", "dtype"),
    crossed(
        [(ScaleRule.RCEIL, 32), (ScaleRule.FLOOR, 16), (ScaleRule.EVEN, 128), (ScaleRule.CEIL, 64)],
        [torch.bfloat16, torch.float16, torch.float32],
    ),
    ids=str,
)
def test_mxfp8_aligned_has_the_bits_of_the_reference(
    interpreted: SimpleNamespace,
    assert_same_bits: Callable[[Tensor, Tensor], None],
    rule_and_block: tuple[ScaleRule, int],
    dtype: torch.dtype,
) -> None:
    """Quantized in the kernel or before; as values, and as e4m3 times a power, which may underflow in x's dtype."""
    rule, block = rule_and_block
    fmt, x = MXFP8_E4M3.with_block(block), hard(200, dtype)
    rounded = reference.quantize_dequantize(x, fmt, rule)
    expected = reference.align(rounded)
    lost = (expected != rounded) & expected.isfinite()
    assert lost.any()
    for given, rounding in ((x, (fmt, rule)), (rounded, None)):
        assert_same_bits(interpreted.align.values(given, rounding), expected)
        aligned, powers = interpreted.align.align(given, rounding)
        assert_same_bits((aligned.float() * powers[:, None]).to(dtype), expected)


def test_mxfp8_aligned_in_pieces(
    interpreted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, assert_same_bits: Callable[[Tensor, Tensor], None]
) -> None:
    """A token longer than one chunk, and strides."""
    monkeypatch.setattr(interpreted.align, "_MOST_COLUMNS", 64)
    x = spread((200, 6), 20).T.to(torch.bfloat16)
    expected = reference.align(reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL))
    assert_same_bits(interpreted.align.values(x, (MXFP8_E4M3, ScaleRule.RCEIL)), expected.contiguous())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zeros_and_what_is_not_finite(interpreted: SimpleNamespace) -> None:
    x = spread((4, 64), 2)
    x[0] = 0
    x[1, 5], x[2, 40] = torch.inf, torch.nan
    aligned, powers = interpreted.align.align(x, (MXFP4, ScaleRule.FLOOR))
    assert (aligned[0].float() == 0).all()
    assert powers.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("fmt", "k_chunked"),
    [(MXINT4, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in HOPPER_CASES)],
    ids=str,
)
def test_compiles_for_hopper(fmt: MXFormat, k_chunked: bool) -> None:
    """e4m3 wgmma, not serialized; four K-steps per loop iteration, and no spills."""
    pytest.importorskip("triton.experimental.gluon", reason="this version of Triton has no Gluon")
    from sass import SHARED_BYTES, fp8_report

    from mxcompile.kernels.gluon.fp8_linear import Config

    report = fp8_report(fmt, Config(), k_chunked, has_bias=True)
    assert not report.serialized
    assert report.overwritten == []
    assert report.shared_bytes <= SHARED_BYTES
    assert report.count("GMMA") == 16
    assert report.waits == 4
    assert report.spilled_bytes == 0


@on_hopper
@pytest.mark.parametrize("shape", [(64, 512), (192, 1040), (1536, 4096), (256, 28672)], ids=str)
@pytest.mark.parametrize("fmt", WEIGHTS, ids=str)
def test_products(fmt: MXFormat, shape: tuple[int, int]) -> None:
    """Against float64: at most 1.2 times the error of rounding to bfloat16 for normal values, 1.6 times where blocks
    differ by up to 2**3, as the tensor core then truncates more. Equal on repeat; any number of tokens.
    """
    from mxcompile.kernels.gluon import fp8_linear
    from mxcompile.kernels.triton import align

    generator = torch.Generator().manual_seed(shape[0])
    scales = torch.randint(110, 116, (shape[0], -(-shape[1] // 32)), generator=generator).to(torch.uint8)
    planes, dense = packed(fmt, shape, scales, "cuda")
    assert planes.top > 0
    for m, span in ((1, 3), (256, 0), (515, 3), (1100, 0)):
        x = spread((m, shape[1]), span, m).to("cuda", torch.bfloat16)
        for activation in (MXFP4, MXFP6_E2M3):
            rounded = reference.quantize_dequantize(x, activation, ScaleRule.FLOOR).double()
            aligned, powers = align.align(x, (activation, ScaleRule.FLOOR))
            assert torch.equal(aligned.double() * powers.double()[:, None], rounded)
            for bias in (None, torch.randn(shape[0], device="cuda").to(torch.bfloat16)):
                exact = rounded @ dense.T + (0 if bias is None else bias.double())
                for config in (fp8_linear.Config(), fp8_linear.Config(128, 4)):
                    y = fp8_linear.linear(aligned, powers, planes, bias, activation, config)
                    error = (y.double() - exact).norm() / (exact.to(torch.bfloat16).double() - exact).norm()
                    assert error < (1.6 if span else 1.2), (m, activation, config)
                    assert torch.equal(fp8_linear.linear(aligned, powers, planes, bias, activation, config), y)


@on_hopper
def test_what_is_too_small_is_rounded_to_the_nearest_step() -> None:
    from mxcompile.kernels.triton import align

    x = spread((16, 20000), 40)
    aligned, powers = align.align(x.cuda(), (MXFP4, ScaleRule.FLOOR))
    expected = reference.quantize_dequantize(x, MXFP4, ScaleRule.FLOOR).double() / powers.cpu().double()[:, None]
    assert torch.equal(aligned.cpu().double(), expected.float().to(torch.float8_e4m3fn).double())


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mxfp8_aligned_on_a_gpu(dtype: torch.dtype, assert_same_bits: Callable[[Tensor, Tensor], None]) -> None:
    """Also tokens that are read in chunks."""
    from mxcompile.kernels.triton import align

    for x in (hard(200, dtype), spread((5, 20000), 20).to(dtype)):
        rounded = reference.quantize_dequantize(x, MXFP8_E4M3, ScaleRule.RCEIL)
        expected = reference.align(rounded)
        for given, rounding in ((x, (MXFP8_E4M3, ScaleRule.RCEIL)), (rounded, None)):
            assert_same_bits(align.values(given.cuda(), rounding).cpu(), expected)
            aligned, powers = align.align(given.cuda(), rounding)
            assert_same_bits((aligned.float() * powers[:, None]).to(dtype).cpu(), expected)


@on_hopper
@pytest.mark.parametrize("tokens", [100, 600])
def test_mxfp8_aligned_is_the_same_function_for_any_number_of_tokens(
    tokens: int, error_over_bound: Callable[..., float]
) -> None:
    """600 tokens run on FP8 tensor cores, 100 do not; without alignment none do."""
    from mxcompile.kernels import dispatch
    from mxcompile.kernels.layout.planes import PlanarScaling, to_bytes

    scales = torch.randint(116, 122, (256, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    planes, dense = packed(MXFP4, (256, 512), scales, "cuda")
    parts, scaling = [(*to_bytes(planes), None)], PlanarScaling(planes.lift, planes.top)
    x = spread((tokens, 512), 16).to("cuda", torch.bfloat16)
    for aligned in (True, False):
        rounding = (MXFP8_E4M3.with_alignment(aligned), ScaleRule.RCEIL)
        prepared = reference.quantize_dequantize(x, *rounding)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            (y,) = dispatch.linears(x, parts, MXFP4, rounding, scaling)
            torch.cuda.synchronize()
        fast = aligned and tokens >= 512
        assert ("_fp8_kernel" in [event.name for event in profile.events()]) == fast
        assert error_over_bound(y, prepared, dense.to(torch.bfloat16), None) < (8 if fast else 1)


@on_hopper
@pytest.mark.parametrize("tokens", [100, 700])
def test_many_tokens_take_it_in_the_product(tokens: int, error_over_bound: Callable[..., float]) -> None:
    """`mx::linears` with an activation format and weights adjacent in memory; few tokens use the bfloat16 kernel."""
    from mxcompile.kernels import dispatch
    from mxcompile.kernels.layout.planes import PlanarScaling, to_bytes

    scales = torch.full((320, 8), 120, dtype=torch.uint8)
    planes, dense = packed(MXFP4, (320, 256), scales, "cuda")
    elements, exponents = to_bytes(planes)
    parts = [(*pair, None) for pair in zip(elements.split((256, 64)), exponents.split((256, 64)), strict=True)]
    x = spread((tokens, 256), 3).to("cuda", torch.bfloat16).view(2, -1, 256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ys = dispatch.linears(x, parts, MXFP4, (MXFP4, ScaleRule.FLOOR), PlanarScaling(planes.lift, planes.top))
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert ("_fp8_kernel" in names, "_align_kernel" in names) == (tokens >= 512, tokens >= 512)
    rounded = reference.quantize_dequantize(x, MXFP4, ScaleRule.FLOOR).flatten(0, 1)
    y = torch.cat(ys, -1).flatten(0, 1)
    assert [part.shape for part in ys] == [(2, tokens // 2, 256), (2, tokens // 2, 64)]
    assert error_over_bound(y, rounded, dense.to(torch.bfloat16), None) < (1 if tokens < 512 else 8)
