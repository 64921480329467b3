"""The table of cuts: every format and number of tokens has one that the kernel can take."""

import pytest
import torch

from mxcompile.formats import FORMATS, MXFP4, MXINT4, MXFormat

pytest.importorskip("triton")

SHAPES = [(6144, 4096), (4096, 14336), (64, 32), (49152, 576), (1024, 4096), (128256, 4096)]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxcompile.kernels import planes_configs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    planes_configs.config_for.cache_clear()


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 64, 65, 257, 5000])
@pytest.mark.parametrize("fmt", [*FORMATS.values(), MXFP4.with_block(128)], ids=str)
def test_every_product_has_a_cut(fmt: MXFormat, rows: int) -> None:
    from mxcompile.kernels import triton_planes
    from mxcompile.kernels.planes import plane_layout
    from mxcompile.kernels.planes_configs import config_for

    for n, k in SHAPES:
        config = config_for(fmt, n, k, rows, torch.device("cuda"))
        assert isinstance(config, triton_planes.Config) == (rows <= 64)
        if isinstance(config, triton_planes.Config):
            assert config.rows >= rows or config.rows == 64
            assert config.split <= max(1, -(-k // plane_layout(fmt).columns))


def test_other_shapes_are_split_into_as_many_programs() -> None:
    from mxcompile.kernels.planes_configs import config_for

    def programs(n: int, k: int) -> int:
        config = config_for(MXINT4, n, k, 1, torch.device("cuda"))
        return config.split * n // config.out  # pyright: ignore[reportOptionalMemberAccess]

    assert 0.5 <= programs(4096, 4096) / programs(2048, 4096) <= 2
    assert config_for(MXINT4, 64, 256, 1, torch.device("cuda")).split == 1  # pyright: ignore[reportOptionalMemberAccess]


def test_a_gpu_without_a_table_takes_the_one_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxcompile.kernels.planes_configs import config_for

    measured = config_for(MXINT4, 6144, 4096, 1, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert config_for(MXINT4, 6144, 4096, 1, torch.device("cuda", 1)) == measured
