"""The tuner: the configs that it tries are distinct, and its table holds the fastest correct one of each case."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mxcompile.formats import FORMATS, MXFormat

pytest.importorskip("triton")

from gemm_timing import read
from tuning.candidates import candidates
from tuning.write_configs import chained, fastest, table
from tuning.write_times import times

from mxcompile.kernels.gluon import planes_linear as gluon_planes
from mxcompile.kernels.tuned_configs import DEQUANTIZED, GLUON, TRITON

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)


def read_table(name: str) -> list[dict[str, Any]]:
    text = files("mxcompile.kernels").joinpath("configs", f"{name}.jsonl").read_text()
    return list(map(json.loads, text.splitlines()))


def test_the_tables_in_the_package_are_written_from_the_recorded_sweeps() -> None:
    """That of an H200 has its own configs for 1 to 32 tokens, those of MXINT4 for one token from a chain of layers, and
    those of an H100 for the rest."""
    lines = read(RESULTS / "gemm-sweep-h100.jsonl")
    assert all(line["error"] <= 1 for line in fastest(lines))
    assert read_table("sm90") == table(lines)
    first = [line for line in read(RESULTS / "gemm-sweep-h200.jsonl") if line["m"] in (8, 32)]
    second = read(RESULTS / "gemm-configs-h200.jsonl")
    assert all(line["error"] <= 1 for line in [*first, *second])
    chain = read(RESULTS / "layer-chain-h200.jsonl")
    assert all(line["right"] for line in chain)
    assert read_table("sm90-h200") == chained(chain, table(second, table(first, read_table("sm90"))))


def test_the_times_in_the_package_are_written_from_the_recorded_measurements() -> None:
    text = files("mxcompile.kernels").joinpath("times", "sm90.jsonl").read_text()
    assert list(map(json.loads, text.splitlines()))[1:] == times(read(RESULTS / "gemm-h100.jsonl"))


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


def test_a_case_that_was_measured_with_dependent_launch_alone_has_the_fastest_config_without_it() -> None:
    case = {"weight": "mxint4", "n": 64, "k": 64, "path": TRITON}
    few, many = case | {"m": 8}, case | {"m": 32}
    dependent = {"dependent": 1, "prefetch": 4}
    lines = [
        few | {"config": {"rows": 8, "out": 64, **dependent}, "quick_us": 1.0},
        few | {"config": {"rows": 8, "out": 32, **dependent}, "quick_us": 1.1, "us": 1.2},
        many | {"config": {"rows": 32, "out": 64, **dependent}, "quick_us": 1.0},
        many | {"config": {"rows": 32, "out": 128}, "quick_us": 2.0},
        many | {"config": {"rows": 32, "out": 64, "slices": 4}, "quick_us": 1.0},
    ]
    rest = [few | {"config": {"rows": 8, "out": 128}}, case | {"m": 64, "config": {"rows": 64, "out": 64}}]
    assert table(lines, rest) == [
        few | {"config": {"rows": 8, "out": 32}},
        many | {"config": {"rows": 32, "out": 128}},
        rest[1],
    ]
