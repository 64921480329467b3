"""The Gluon kernel for planar weights: compiled for Hopper without a GPU, and its results on a Hopper GPU."""

import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mxcompile.errors import MXCompileError
from mxcompile.formats import FORMATS, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXINT4, MXFormat, ScaleRule
from mxcompile.kernels.layout.planes import PlanarWeight, to_planes
from mxcompile.numerics import reference
from mxcompile.numerics.packing import pack

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon", reason="this version of Triton has no Gluon")

TILE_CONFIGS = ((256, 128, 3, 1), (128, 256, 4, 1), (128, 128, 4, 1), (128, 64, 3, 1), (64, 256, 4, 4), (16, 64, 4, 3))
"""Tokens, outputs, stages, split-K."""
SHAPES = ((257, 1000), (512, 576), (1536, 4096))
ROWS = (1, 128, 257, 700)
ErrorOverBound = Callable[..., float]
TileConfig = tuple[int, int, int, int]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.parametrize(
    ("fmt", "tile"),
    [
        (MXINT4, TILE_CONFIGS[0]),
        *(pytest.param(MXINT4, tile, marks=pytest.mark.slow) for tile in TILE_CONFIGS[1:]),
        pytest.param(MXFP4, TILE_CONFIGS[1], marks=pytest.mark.slow),
        pytest.param(MXFP8_E4M3, (128, 256, 3, 1), marks=pytest.mark.slow),
        pytest.param(MXFP6_E2M3, (256, 128, 2, 1), marks=pytest.mark.slow),
        pytest.param(MXFP6_E3M2, TILE_CONFIGS[4], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_for_hopper(fmt: MXFormat, tile: TileConfig) -> None:
    """wgmma is not serialized, and most of a K-step is decoded while it runs."""
    from sass import SHARED_BYTES, gluon_report

    from mxcompile.kernels.gluon.planes_linear import Config

    rows, out, stages, split = tile
    report = gluon_report(fmt, Config(rows=rows, out=out, stages=stages, split=split), has_bias=True)
    assert not report.serialized
    assert report.overwritten == []
    assert report.spilled_bytes == 0
    assert report.shared_bytes <= (SHARED_BYTES if out > 64 else 115712)
    k_steps = 2 if fmt.bits == 6 else 1
    assert report.count("HGMMA") == 8 * k_steps * (2 if out == 256 else 1)
    assert report.waits == 4 * k_steps
    overlapped, decode = report.decoding
    assert overlapped > 0.6 * decode


def test_says_what_it_does_not_serve() -> None:
    from mxcompile.kernels.gluon.planes_linear import Config, linear, supports

    planes, _ = _weight(MXINT4, 64, 128, "cpu")
    x = torch.zeros(4, 128, dtype=torch.bfloat16)
    assert "float16" in (supports(x.half()) or "")
    assert "CUDA" in (supports(x) or "")
    with pytest.raises(MXCompileError, match="cannot take"):
        linear(x[:, :64], planes, None, Config())


def _weight(fmt: MXFormat, out: int, size: int, device: str) -> tuple[PlanarWeight, Tensor]:
    values = torch.randn(out, size, generator=torch.Generator().manual_seed(out))
    codes, scales = reference.quantize(values, fmt, ScaleRule.FLOOR)
    dense = reference.dequantize(codes, scales, fmt, size, torch.bfloat16)
    return to_planes(pack(codes, fmt).to(device), scales.to(device), fmt, size), dense.to(device)


def test_without_gluon_the_kernels_can_be_imported_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("mxcompile.kernels.gluon")
    names = ("hopper", "planes_kernel", "planes_linear", "fp8_linear", "grouped_planes")
    for name, module in [(name, importlib.import_module(f"mxcompile.kernels.gluon.{name}")) for name in names]:
        monkeypatch.setattr(package, name, module)
        monkeypatch.delitem(sys.modules, f"mxcompile.kernels.gluon.{name}")
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delattr(importlib.import_module("triton.experimental"), "gluon")
    modules = {name: importlib.import_module(f"mxcompile.kernels.gluon.{name}") for name in names}
    for name in ("planes_linear", "fp8_linear"):
        assert "lacks what the Gluon kernels need" in modules[name].GLUON_UNAVAILABLE


@on_hopper
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("tile", TILE_CONFIGS, ids=str)
def test_products(error_over_bound: ErrorOverBound, tile: TileConfig, fmt: MXFormat, shape: tuple[int, int]) -> None:
    from mxcompile.kernels.gluon.planes_linear import Config, linear, supports

    planes, dense = _weight(fmt, *shape, "cuda")
    rows, out, stages, split = tile
    stages = stages if fmt.bits == 4 or out == 64 else stages - 1
    for m in ROWS:
        generator = torch.Generator(device="cuda").manual_seed(m)
        x = torch.randn(m, shape[1], generator=generator, device="cuda").to(torch.bfloat16)
        assert supports(x) is None
        for bias in (None, torch.randn(shape[0], generator=generator, device="cuda").to(torch.bfloat16)):
            for persistent in (False, True):
                config = Config(rows, out, stages, persistent=persistent, split=split)
                y = linear(x, planes, bias, config)
                assert error_over_bound(y, x, dense, bias) <= 1, f"{m} rows, {config}"
                for _ in range(3):
                    assert torch.equal(linear(x, planes, bias, config), y), f"{m} rows, {config}: differs on repeat"


@on_hopper
def test_many_tiles_a_program(error_over_bound: ErrorOverBound) -> None:
    """Stages are reused many times, with one K-step per tile and with several."""
    from mxcompile.kernels.gluon.planes_linear import Config, linear

    for size in (96, 128, 384):
        planes, dense = _weight(MXFP4, 8200, size, "cuda")
        x = torch.randn(2000, size, device="cuda").to(torch.bfloat16)
        for rows, out, stages, split in TILE_CONFIGS:
            y = linear(x, planes, None, Config(rows, out, stages, split=split))
            assert error_over_bound(y, x, dense, None) <= 1, (size, rows, out)


@on_hopper
def test_lift_and_views(error_over_bound: ErrorOverBound) -> None:
    """The largest scales (stored smaller; the kernel applies the lift), rows of a wider tensor, batches."""
    from mxcompile.kernels.gluon.planes_linear import Config, linear, supports

    codes = torch.randint(0, 16, (192, 256), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales = torch.full((192, 8), 250, dtype=torch.uint8)
    planes = to_planes(pack(codes, MXINT4).cuda(), scales.cuda(), MXINT4, 256)
    assert planes.lift > 0
    dense = reference.dequantize(codes, scales, MXINT4, 256, torch.bfloat16).cuda()
    x = (torch.randn(2, 70, 512, device="cuda") * 2.0**-120).to(torch.bfloat16)[..., 256:]
    assert supports(x) is None
    y = linear(x, planes, None, Config(128, 128, 4))
    assert y.shape == (2, 70, 192)
    assert error_over_bound(y.flatten(0, 1), x.flatten(0, 1), dense, None) <= 1


@on_hopper
@pytest.mark.parametrize("split", [1, 3])
def test_weights_side_by_side(error_over_bound: ErrorOverBound, split: int) -> None:
    """One launch for up to three weights adjacent in memory gives the results of separate launches."""
    from mxcompile.kernels.gluon.planes_linear import Config, counters_needed, linears

    planes, dense = _weight(MXINT4, 1024, 640, "cuda")
    x = torch.randn(70, 640, device="cuda").to(torch.bfloat16)
    bias = torch.randn(1024, device="cuda").to(torch.bfloat16)
    config = Config(64, 128, 4, split=split)
    counters = torch.zeros(counters_needed(70, planes, config), dtype=torch.int32, device="cuda")
    for outs in ([1024], [640, 384], [512, 128, 384]):
        ys = linears(x, planes, outs, bias, config, counters)
        assert [y.shape for y in ys] == [(70, out) for out in outs]
        assert all(y.is_contiguous() for y in ys)
        assert error_over_bound(torch.cat(ys, dim=1), x, dense, bias) <= 1
        assert not counters.any()
    with pytest.raises(MXCompileError, match="tiles of 128"):
        linears(x, planes, [960, 64], bias, config, counters)


@on_hopper
def test_reasons() -> None:
    from mxcompile.kernels.gluon.planes_linear import supports

    assert "16 bytes" in (supports(torch.zeros(4, 132, dtype=torch.bfloat16, device="cuda")) or "")
