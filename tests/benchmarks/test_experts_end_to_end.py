"""The benchmark of a whole mixture of experts runs on a CPU, and compares with the fastest bfloat16."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import experts_end_to_end
from experts_end_to_end import FLOAT, GROUPED, with_ratios

WORDS = ["--device", "cpu", "--size", "small", "--layers", "1", "--tokens", "3", "--prefill", "16", "--prompt", "4"]


def test_ratios_are_over_the_fastest_float() -> None:
    rows = [
        {"way": FLOAT, "batch_1": {"token_ms": 2.0}, "batch_32": {"token_ms": 9.0}, "prefill_ms": 8.0},
        {"way": GROUPED, "batch_1": {"token_ms": 4.0}, "batch_32": {"token_ms": 3.0}},
        {"way": "w4a16-mxfp-quick", "batch_1": {"token_ms": 1.0}, "batch_32": {"token_ms": 2.0}, "prefill_ms": 4.0},
        {"way": "w4a8-mxint-quick", "failed": "OutOfMemoryError"},
    ]
    ratios = [with_ratios(row, rows)["ratios"] for row in rows]
    assert ratios[0] == {"batch_1": 1.0, "batch_32": 0.333, "prefill": 1.0}
    assert ratios[2] == {"batch_1": 2.0, "batch_32": 1.5, "prefill": 2.0}
    assert ratios[3] == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    """Without compiling what it compiles: tests of mixtures do that."""
    out = tmp_path / "rows.jsonl"
    ways = ["--ways", f"{FLOAT};{GROUPED};w4a16-mxfp-quick", "--batches", "1,2", "--out", str(out)]
    with torch.compiler.set_stance("force_eager"):
        assert experts_end_to_end.main([*WORDS, *ways]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["way"] for row in rows] == [FLOAT, GROUPED, "w4a16-mxfp-quick"]
    assert all(row["batch_2"]["token_ms"] > 0 for row in rows)
    assert [row["way"] for row in rows if "batch_1" in row] == [FLOAT, "w4a16-mxfp-quick"]
    assert set(rows[2]["ratios"]) == {"batch_1", "batch_2", "prefill"}
    assert set(rows[2]["seconds"]) >= {"trace", "quantize", "deploy", "first generate, batch 1"}


def test_a_way_that_fails_is_recorded(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert experts_end_to_end.main([*WORDS, "--ways", "no-recipe", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["failed"].startswith("UnknownNameError")
