"""The table of tuned configs: it is the measured one, and shapes outside it use only configs that were checked."""

from collections.abc import Callable
from itertools import product

import pytest
import torch

from mxcompile.formats import FORMATS, MXFP4, MXINT4, MXFormat, ScaleRule

pytest.importorskip("triton")

SHAPES = [(6144, 4096), (4096, 14336), (64, 32), (49152, 576), (1024, 4096), (128256, 4096), (512, 1500)]
MEASURED_SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


@pytest.fixture(params=["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxcompile.kernels import tuned_configs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: request.param)
    for function in (tuned_configs.config_for, tuned_configs.table_name):
        function.cache_clear()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 64, 65, 257, 5000])
@pytest.mark.parametrize("fmt", [*FORMATS.values(), MXFP4.with_block(128)], ids=str)
def test_cuts_are_those_that_were_checked(fmt: MXFormat, rows: int) -> None:
    """A fused kernel, except for many tokens with 6 bits; Gluon beyond 64 tokens. Without Gluon, a fused kernel up to
    64 tokens. split-K is a power of two, except for shapes that were measured. A program has no more warps than there
    are K-steps."""
    from mxcompile.kernels.layout.planes import plane_layout
    from mxcompile.kernels.triton import held_planes
    from mxcompile.kernels.triton import planes_linear as triton_planes
    from mxcompile.kernels.tuned_configs import config_for

    for (n, k), gluon in product(SHAPES, (True, False)):
        config = config_for(fmt, n, k, rows, torch.device("cuda"), gluon)
        if config is None:
            assert rows > 64
            assert fmt.bits == 6 or not gluon
        elif isinstance(config, held_planes.Config):
            assert rows <= config.rows <= 4
            assert config.warps <= -(-k // plane_layout(fmt).columns)
            continue
        elif isinstance(config, triton_planes.Config):
            assert rows <= 64 or not gluon
            assert config.split <= -(-k // plane_layout(fmt).columns)
        else:
            assert gluon
        if config is not None and (n, k) not in MEASURED_SHAPES:
            assert config.split in (1, 2, 4, 8, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_cut_of_the_table_is_right(error_over_bound: Callable[..., float], fmt: MXFormat) -> None:
    """In every format that may use it: against float64, and equal on repeat."""
    from mxcompile.kernels.gluon import planes_linear as gluon_planes
    from mxcompile.kernels.layout.planes import to_planes
    from mxcompile.kernels.triton import held_planes
    from mxcompile.kernels.triton import planes_linear as triton_planes
    from mxcompile.kernels.tuned_configs import configs_for_format
    from mxcompile.numerics import reference
    from mxcompile.numerics.packing import pack

    codes, scales = reference.quantize(torch.randn(520, 4352, generator=generator(0)), fmt, ScaleRule.FLOOR)
    dense = reference.dequantize(codes, scales, fmt, 4352, torch.bfloat16).cuda()
    planes = to_planes(pack(codes, fmt).cuda(), scales.cuda(), fmt, 4352)
    for config in {entry.config for entry in configs_for_format(torch.device("cuda"), fmt)} - {None}:
        x = torch.randn(config.rows + 3, 4352, generator=generator(config.rows)).to("cuda", torch.bfloat16)
        kernels = {triton_planes.Config: triton_planes, held_planes.Config: held_planes}
        fused = kernels.get(type(config), gluon_planes)
        if fused is not gluon_planes or gluon_planes.supports(x) is None:
            y = fused.linear(x, planes, None, config)
            assert error_over_bound(y, x, dense, None) <= 1, config
            assert torch.equal(fused.linear(x, planes, None, config), y), config


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.usefixtures("hopper")
def test_other_shapes_are_split_into_as_many_programs() -> None:
    from mxcompile.kernels.tuned_configs import config_for

    def programs(n: int, k: int) -> int:
        config = config_for(MXINT4, n, k, 8, torch.device("cuda"))
        return config.split * n // config.out  # pyright: ignore[reportOptionalMemberAccess]

    assert 0.5 <= programs(4096, 4096) / programs(2048, 4096) <= 2
    assert config_for(MXINT4, 64, 256, 8, torch.device("cuda")).split == 1  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(("name", "tokens"), [("NVIDIA H200", 4), ("NVIDIA H100 80GB HBM3", 0)])
def test_the_kernels_between_matmuls_start_early_where_these_do(
    monkeypatch: pytest.MonkeyPatch, name: str, tokens: int
) -> None:
    """A chain of layers is slower if its norms start early and its matmuls do not."""
    from mxcompile.kernels import gpu_linears
    from mxcompile.kernels.tuned_configs import most_held_tokens, table_name

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gpu_linears, "starts_early", lambda _: True)
    for cached in (table_name, most_held_tokens):
        cached.cache_clear()
    assert [gpu_linears.start_early(torch.zeros(rows, 1, 8)) for rows in (1, 4, 5)] == [tokens >= 1, tokens >= 4, False]
    for cached in (table_name, most_held_tokens):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "table"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "sm90"),
        ("NVIDIA H200", (9, 0), "sm90-h200"),
        ("NVIDIA GH200 144G HBM3e", (9, 0), "sm90-h200"),
        ("NVIDIA RTX A6000", (8, 6), "sm90"),
    ],
)
def test_a_gpu_takes_the_table_of_its_model_or_the_default_one(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], table: str
) -> None:
    from mxcompile.kernels.tuned_configs import table_name

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    table_name.cache_clear()
    assert table_name(torch.device("cuda")) == table
    table_name.cache_clear()
