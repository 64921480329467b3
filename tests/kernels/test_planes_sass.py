"""The planes kernel compiled for Hopper on a machine without a GPU: it compiles, and wgmma is not serialized."""

import pytest

from mxcompile.formats import MXFP4, MXINT8, MXFormat

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        (MXFP4, {"rows": 8, "out": 64, "warps": 2, "joined": False, "split": 4, "dependent": True, "prefetch": 2}),
        (MXINT8, {"rows": 64, "out": 128, "warps": 8, "stages": 3}),
        (MXFP4, {"rows": 256, "out": 128, "warps": 8, "stages": 3}),
    ],
    ids=str,
)
def test_compiles_for_hopper(fmt: MXFormat, options: dict[str, int]) -> None:
    from kernel_sass import report

    from mxcompile.kernels.triton.planes_linear import Config

    found = report(fmt, Config(**options))
    assert found.products == (16 if options["rows"] == 8 else 8)
    assert not found.serialized
    assert found.spilled_bytes == 0
    assert found.shared_bytes <= 232448
