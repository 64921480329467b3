"""triton/integer_planes.py against float64, on a GPU and in Triton's interpreter; compiled for Hopper; its choice."""

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from inline_assembly import emulated
from torch import Tensor

from mxcompile.formats import MXFP4, MXFP8_E4M3, MXINT4, MXINT6, MXINT8, MXFormat, ScaleRule
from mxcompile.kernels import tuned_configs
from mxcompile.kernels.layout.planes import PlanarWeight, to_planes
from mxcompile.numerics import packing, reference

integer_planes = pytest.importorskip("mxcompile.kernels.triton.integer_planes")
Config = integer_planes.Config
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
CONFIGS = [
    (256, Config(16, 1, 1)),
    (2304, Config(32, 4, 2)),  # warps with one group fewer
    (3584, Config(64, 2, 4)),
    (4096, Config(32, 4, 4)),
    (4096, Config(16, 16, 1)),
    (14336, Config(32, 8, 4)),
]
DEVICES = [pytest.param("cuda", marks=needs_hopper), "cpu"]
FORMATS = [MXINT8, MXINT6, MXINT4]


@pytest.fixture
def kernel(request: pytest.FixtureRequest, device: str) -> Iterator[ModuleType]:
    """The module, interpreted on a CPU."""
    if device == "cuda":
        yield integer_planes
        return
    interpreted = request.getfixturevalue("interpreted").integer_planes
    with emulated():
        yield interpreted


def weight(out: int, size: int, device: str) -> tuple[PlanarWeight, Tensor]:
    """A weight with a block of zeros and rows of very different sizes, and its values in float64."""
    w = torch.randn(out, size, generator=torch.Generator().manual_seed(out + size)).to(device) / math.sqrt(size)
    w[3, 32:64] = 0
    w[5] *= 2.0**-20
    w[7] *= 2.0**18
    codes, scales = reference.quantize(w, MXINT4, ScaleRule.FLOOR)
    planes = to_planes(packing.pack(codes, MXINT4), scales, MXINT4, size)
    return planes, reference.dequantize(codes, scales, MXINT4, size, torch.float32).double()


def token(size: int, device: str) -> Tensor:
    """Values of which a block is zero, one large, one small, and one saturates: 127.5 is rounded to 127."""
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(size)).bfloat16()
    x[:, 64:96] = 0
    x[:, 100] = 1000
    x[:, 128:160] *= 2.0**-60
    x[:, 192:224] = 127.5 / 64
    return x.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "config"), CONFIGS, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-120], ids=["normal", "tiny"])
def test_against_float64(kernel: ModuleType, device: str, size: int, config: ..., fmt: MXFormat, scale: float) -> None:
    """Rounded as the reference rounds, sums in float32, equal bits on repeat and of what is rounded already."""
    if device == "cpu" and (size > 4096 or (scale < 1 and size > 256)):
        pytest.skip("long in the interpreter")
    outs = 192 if device == "cuda" else 64
    planes, w = weight(outs, size, device)
    x, bias = token(size, device) * scale, torch.randn(outs, device=device, dtype=torch.bfloat16) * scale
    config = kernel.Config(**vars(config))
    rounded = reference.quantize_dequantize(x, fmt, ScaleRule.FLOOR)
    for biases in ([None], [bias]):
        (y,) = kernel.linears(x, planes, [outs], biases, fmt.bits, config)
        exact = (rounded.double() @ w.T)[0] + (0 if biases[0] is None else bias.double())
        bound = exact.abs() * 2**-8 + (rounded.double().abs() @ w.abs().T)[0] * 2**-20 + 2.0**-133
        assert y.shape == (1, outs)
        assert ((y[0].double() - exact).abs() <= bound).all()
        for again in (x, rounded) if device == "cuda" else (rounded,):
            assert torch.equal(kernel.linears(again, planes, [outs], biases, fmt.bits, config)[0], y)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_side_by_side_and_values_that_are_not_finite(kernel: ModuleType, device: str) -> None:
    planes, _ = weight(256, 512, device)
    x, outs, config = token(512, device), [64, 128, 64], kernel.Config(32, 2, 1)
    (whole,) = kernel.linears(x, planes, [256], [None], 8, config)
    parts = kernel.linears(x, planes, outs, [None] * 3, 8, config)
    assert torch.equal(torch.cat(parts, 1), whole)
    for value in (math.inf, math.nan):
        x[0, 40] = value
        assert kernel.linears(x, planes, [256], [None], 8, config)[0].isnan().all()


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_configs_of_the_table_fit_into_registers(monkeypatch: pytest.MonkeyPatch, n: int, k: int) -> None:
    """Also those of other columns. Sixteen rows times a block are one instruction of a tensor core."""
    from sass import integers_report

    config = of_an_h200(monkeypatch, MXINT4, n, k)
    for size in (k, 2048, 28672):
        found = integer_planes.for_columns(config, size)
        report = integers_report(size, found)
        assert report.spilled_bytes <= 64  # of some versions of Triton; what is loaded ahead takes up to 300
        assert report.sass.count("IMMA.16832.S8.S8") == found.out // 16 * 8 * math.ceil(size / 256 / found.warps)
        assert report.registers * 32 * found.warps <= 65536


def of_an_h200(monkeypatch: pytest.MonkeyPatch, fmt: MXFormat, n: int, k: int, name: str = "NVIDIA H200") -> ...:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    for cached in (tuned_configs.table_name, tuned_configs.integer_config_for):
        cached.cache_clear()
    try:
        return tuned_configs.integer_config_for(fmt, n, k, torch.device("cuda"))
    finally:
        for cached in (tuned_configs.table_name, tuned_configs.integer_config_for):
            cached.cache_clear()


def test_a_gpu_that_was_not_measured_has_no_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_an_h200(monkeypatch, MXINT4, 4096, 4096) is not None
    assert of_an_h200(monkeypatch, MXFP4, 4096, 4096) is None
    assert of_an_h200(monkeypatch, MXINT4, 4096, 4096, "NVIDIA H100 80GB HBM3") is None


def test_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_planes, "starts_early", lambda _: True)
    x, floor = torch.zeros(1, 512, dtype=torch.bfloat16), ScaleRule.FLOOR
    assert all(integer_planes.supports(x, MXINT4, (fmt, floor)) is None for fmt in FORMATS)
    unsupported = [
        ("for weights in mxint4", x, MXFP4, MXINT8, floor),
        ("rounded to integers", x, MXINT4, MXFP8_E4M3, floor),
        ("rounded to integers", x, MXINT4, MXINT8.with_block(64), floor),
        ("rounded to integers", x, MXINT4, MXINT8, ScaleRule.MSE),
        ("a multiple of 256", x[:, :320], MXINT4, MXINT8, floor),
        ("bfloat16", x.float(), MXINT4, MXINT8, floor),
        ("one token", x.repeat(2, 1), MXINT4, MXINT8, floor),
    ]
    for reason, values, weight_format, fmt, rule in unsupported:
        assert reason in str(integer_planes.supports(values, weight_format, (fmt, rule)))
