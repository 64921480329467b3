"""The tuner: the configs that it tries are distinct, and its table holds the fastest correct one of each case."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from mxcompile.formats import FORMATS, MXFormat

pytest.importorskip("triton")

from gemm_timing import read
from tuning.candidates import candidates
from tuning.write_configs import fastest, table

from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.tuned_configs import DEQUANTIZED, GLUON, TRITON

SWEEP = Path(__file__).parents[2] / "benchmarks" / "results" / "gemm-sweep-h100.jsonl"
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)


def test_the_table_in_the_package_is_written_from_the_recorded_sweep() -> None:
    lines = read(SWEEP)
    assert all(line["error"] <= 1 for line in fastest(lines))
    text = files("mxcompile.kernels").joinpath("configs", "sm90.jsonl").read_text()
    assert list(map(json.loads, text.splitlines())) == table(lines)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_number_of_tokens_has_distinct_candidates(fmt: MXFormat) -> None:
    for m in ROWS:
        configs = candidates(fmt, 4096, m, 132, gluon=True)
        assert len(set(configs)) == len(configs) > 0
        triton_only = [config for config in configs if not isinstance(config, gluon_planes.Config)]
        assert candidates(fmt, 4096, m, 132, gluon=False) == triton_only != []
        assert (len(configs) > len(triton_only)) == (m >= 16)


def test_the_fastest_correct_line_is_kept_and_one_for_gpus_without_gluon() -> None:
    case = {"weight": "mxint4", "n": 64, "k": 64, "m": 16}
    lines = [
        case | {"path": TRITON, "config": {"rows": 16, "out": 64, "dependent": True}, "us": 1.0},
        case | {"path": GLUON, "config": {"rows": 16}, "us": 2.0},
        case | {"path": TRITON, "config": {"rows": 16, "out": 32}, "us": 3.0},
        case | {"path": DEQUANTIZED, "config": {}, "us": 4.0},
        case | {"path": TRITON, "config": {"rows": 32, "out": 32}, "failed": "wrong"},
    ]
    assert table(lines) == [
        case | {"path": GLUON, "config": {"rows": 16}},
        case | {"path": TRITON, "config": {"rows": 16, "out": 32}},
    ]
