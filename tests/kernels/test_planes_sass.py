"""The Triton kernel for planar weights, compiled for Hopper without a GPU: wgmma is not serialized, and no register
that it reads is overwritten while it runs."""

import pytest

from mxcompile.formats import MXFP4, MXINT4, MXINT8, MXFormat

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        (MXFP4, {"rows": 8, "out": 64, "warps": 2, "joined": False, "split": 4, "dependent": True, "prefetch": 2}),
        (MXINT4, {"rows": 64, "out": 64, "split": 2, "stages": 3}),
        pytest.param(MXINT8, {"rows": 64, "out": 128, "warps": 8, "stages": 3}, marks=pytest.mark.slow),
        pytest.param(MXFP4, {"rows": 256, "out": 128, "warps": 8, "stages": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_for_hopper(fmt: MXFormat, options: dict[str, int]) -> None:
    from sass import SHARED_BYTES, planes_report

    from mxcompile.kernels.triton.planes_linear import Config

    report = planes_report(fmt, Config(**options))
    assert report.count("HMMA") + report.count("HGMMA") == (16 if options["rows"] == 8 else 8)
    assert not report.serialized
    assert report.overwritten == []
    assert report.spilled_bytes == 0
    assert report.shared_bytes <= SHARED_BYTES
