"""The table of cuts: it is the measured one, and what is not in it takes no cut that was never checked."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from mxcompile.formats import FORMATS, MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT4, MXINT8, MXFormat

pytest.importorskip("triton")

SHAPES = [(6144, 4096), (4096, 14336), (64, 32), (49152, 576), (1024, 4096), (128256, 4096), (512, 1500)]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MEASURED = {MXINT4: 2048, MXFP4: 2048, MXFP6_E2M3: 16, MXINT8: 2048, MXFP8_E4M3: 2048}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxcompile.kernels import planes_configs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    planes_configs.config_for.cache_clear()


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 64, 65, 257, 5000])
@pytest.mark.parametrize("fmt", [*FORMATS.values(), MXFP4.with_block(128)], ids=str)
def test_cuts_are_those_that_were_checked(fmt: MXFormat, rows: int) -> None:
    """A fused one up to 64 tokens, if K is not tiny, and beyond where measured; K in a power of two of parts."""
    from mxcompile.kernels import triton_planes
    from mxcompile.kernels.planes import plane_layout
    from mxcompile.kernels.planes_configs import config_for

    measured = next((most for other, most in MEASURED.items() if other.name == fmt.name), 0)
    for n, k in SHAPES:
        config = config_for(fmt, n, k, rows, torch.device("cuda"))
        slabs = -(-k // plane_layout(fmt).columns)
        if config is None:
            assert rows > measured
            assert rows > 64 or slabs < 4
        elif isinstance(config, triton_planes.Config):
            assert rows <= 64
            assert config.split in (1, 2, 4, 8, 16)
            assert config.split <= slabs
        else:
            assert measured == 2048


def test_the_table_is_what_the_sweep_gives() -> None:
    """With nothing in it that was wrong."""
    from gemm import choose, read

    chosen = choose(read(RESULTS / "gemm-sweep-h100.jsonl"), dependent=False)
    assert all(line["error"] <= 1 for line in chosen)
    table = files("mxcompile.kernels").joinpath("configs", "sm90.jsonl").read_text().splitlines()
    wanted = [{name: line[name] for name in ("weight", "n", "k", "m", "path", "config")} for line in chosen]
    assert list(map(json.loads, table)) == wanted


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
