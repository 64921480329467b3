"""The experts benchmark runs on a CPU: what it times is checked, and a wrong result is recorded as failed."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import experts
import experts_timing
from experts_calls import BATCHED, COMPILED, GROUPED, float_call, float_experts, float_paths, our_call
from experts_timing import MATMULS, OURS, SHAPES, Case, Exact, Rates, line_of, make_layer, make_routes, tokens_of
from gemm_timing import Run

from mxcompile.formats import MXFP4, MXINT8


@pytest.mark.parametrize(("tokens", "disjoint"), [(1, 16), (4, 2)])
def test_a_turn_uses_the_experts_that_rested_longest(tokens: int, disjoint: int) -> None:
    shape = SHAPES["qwen3-moe"]
    routes = make_routes(shape, tokens, "cpu")
    for numbers in torch.cat(routes.experts):
        assert len(numbers.unique()) == shape.choices
        assert 0 <= int(numbers.min()) <= int(numbers.max()) < shape.experts
    for first in range(len(routes.experts) - disjoint + 1):
        used = torch.cat([numbers.unique() for numbers in routes.experts[first : first + disjoint]])
        assert len(used.unique()) == len(used)


def test_random_tokens_do_not_use_every_expert_alike() -> None:
    """64 tokens of 8 of 128: 4 a expert on average, and 98.4 % of the experts."""
    routes = make_routes(SHAPES["qwen3-moe"], 64, "cpu")
    assert 124.5 < routes.distinct < 127.5
    assert int(routes.experts[0].flatten().bincount().max()) > 6


@pytest.mark.parametrize("name", ["small", "small-gpt-oss"])
def test_the_exact_result_is_that_of_the_float_module(name: str) -> None:
    layer = make_layer(SHAPES[name], MXFP4, "cpu")
    x, routes = tokens_of(layer.shape, 5, "cpu"), make_routes(layer.shape, 5, "cpu")
    exact = Exact(layer, x, routes.experts[0], routes.weights[0], None)
    routes.weights[0] = routes.weights[0].double()
    y = float_call(BATCHED, float_experts(layer).double(), x.double(), routes)(0)
    assert exact.error(y) < 1e-12
    assert 1e-3 < exact.rounding < 1e-2


def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    words = ["--device", "cpu", "--shapes", "small,small-gpt-oss", "--formats", "mxfp4,mxint4", "--tokens", "1,3"]
    assert experts.main([*words, "--activations", "mxint8", "--compiled", "", "--out", str(out)]) == 0
    first, *lines = map(json.loads, out.read_text().splitlines())
    assert first["command"].startswith("python benchmarks/experts.py --device cpu")
    assert len(lines) == 2 * 2 * (4 + 3)
    assert {line["path"] for line in lines} == {OURS, BATCHED, GROUPED, MATMULS}
    for line in lines:
        assert line["us"] > 0
        assert line["ratio"] == pytest.approx(line["bf16_us"] / line["us"], rel=1e-2)
        assert line["path"] == MATMULS or 0 < line["error"] < 0.02


def test_a_wrong_result_is_recorded_as_failed(tmp_path: Path) -> None:
    layer = make_layer(SHAPES["small"], MXFP4, "cpu")
    x, routes = tokens_of(layer.shape, 3, "cpu"), make_routes(layer.shape, 3, "cpu")
    exact = Exact(layer, x, routes.experts[0], routes.weights[0], MXINT8)
    call = our_call(layer, x, routes, MXINT8)
    case = Case(Run("", 1.0, tmp_path / "lines.jsonl"))
    case.add(line_of(layer, OURS, 3, MXINT8), lambda: call, exact, 1.0)
    case.add(line_of(layer, OURS, 3, MXINT8), lambda: lambda i: call(i) * 1.05, exact, 1.0)
    case.add(line_of(layer, OURS, 3, MXINT8), lambda: lambda i: call(i) + torch.rand(()) * 1e-4, exact, 1.0)
    case.finish()
    wrong, unsteady, right = case.run.lines
    assert "us" in right
    assert "wrong by" in wrong["failed"]
    assert unsteady["failed"] == "results differ between calls"


def test_the_floor_counts_the_experts_of_a_call() -> None:
    shape = SHAPES["qwen3-moe"]
    layer = make_layer(SHAPES["small"], MXFP4, "cpu")
    rates, routes = Rates(copy=1e12, matmul=1e15), make_routes(layer.shape, 1, "cpu")
    expert = 3 * 128 * 64 * 4.25 / 8
    assert rates.floor(layer, routes, 1) == pytest.approx((2 * expert + 4 * 128) / 1e6)
    assert rates.floor(layer, routes, 1, bf16=True) == pytest.approx((2 * 3 * 128 * 64 * 2 + 4 * 128) / 1e6)
    assert float_paths(shape, 64, [GROUPED]) == [BATCHED, GROUPED, GROUPED + COMPILED]
    assert float_paths(shape, 2048, [BATCHED]) == [GROUPED]


def test_every_shape_can_be_planar() -> None:
    assert all(out % 64 == 0 for shape in experts_timing.SHAPES.values() for out, _ in shape.sizes)
