"""Joining linears of one input: before and after, what is left alone, and the same results."""

import pytest
import torch
from torch import nn

import mxcompile
from mxcompile.inductor.rewrites import join_linears as rewrite
from mxcompile.inductor.rewrites.fuse import VIEWS, fuse
from mxcompile.inductor.rewrites.join_linears import join_linears
from mxcompile.ops import CPU_LINEARS, LINEAR, LINEARS, QUANTIZE_DEQUANTIZE


class Three(nn.Module):
    """Two linears of one value and a third of what they make; `keep` gives the rounded value away too."""

    def __init__(self, other: int = 32) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 32), nn.Linear(64, other, bias=False), nn.Linear(32, 16)

    def forward(self, x):
        first, second = self.first(x), self.second(x)
        return self.third(torch.tanh(first)), second


def fused_graph(recipe, x, **options):
    """(graph module with fused MX operations, of the deployed module)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Three().eval()
    deployed = mxcompile.quantize_and_compile(model, x, recipe=recipe, compile=False, **options)
    module = torch.export.export(deployed, (x,), strict=False).run_decompositions({}).module()
    fuse(module.graph)
    return module


def text(graph):
    """Calls on MX weights and what they read."""
    names = {LINEAR: "linear", LINEARS: "linears", CPU_LINEARS: "cpu_linears", QUANTIZE_DEQUANTIZE: "round"}
    return [names[node.target] for node in graph.nodes if node.target in names]


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("recipe", "before", "after", "calls"),
    [
        ("w4a8-mxint-quick", ["round", "linear", "linear", "round", "linear"], ["cpu_linears", "cpu_linears"], 2),
        ("w4a16-mxint-quick", ["linear", "linear", "linear"], ["cpu_linears", "linear"], 1),
    ],
)
@pytest.mark.parametrize("x", [X, X[0], X[:1, :1]], ids=["3-D", "2-D", "one token"])
def test_before_and_after(recipe, before, after, calls, x):
    """A rounding goes with its linears, behind a view too; a single linear without one stays as it is."""
    module = fused_graph(recipe, x)
    assert text(module.graph) == before
    wanted = module(x)
    assert join_linears(module.graph) == calls
    module.graph.lint()
    module.recompile()
    assert text(module.graph) == after
    for given, value in zip(module(x), wanted, strict=True):
        torch.testing.assert_close(given, value, rtol=0, atol=1e-5)
    assert join_linears(module.graph) == 0


def test_other_formats_are_other_calls():
    module = fused_graph("w4a8-mxint-quick", X, overrides={"second": mxcompile.formats.MXINT8})
    assert join_linears(module.graph) == 3
    assert text(module.graph) == ["cpu_linears", "cpu_linears", "cpu_linears"]


def test_a_rounded_value_that_others_read_stays():
    module = fused_graph("w4a8-mxint-quick", X)
    (first, *_) = module.graph.find_nodes(op="call_function", target=QUANTIZE_DEQUANTIZE)
    output = module.graph.output_node()
    output.args = ((*output.args[0], first),)
    assert join_linears(module.graph) == 2
    assert text(module.graph) == ["round", "cpu_linears", "cpu_linears"]


def test_a_gpu_graph_is_left_alone():
    module = fused_graph("w4a8-mxint-quick", X)
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        node.meta["val"] = node.meta["val"].to("meta")
    assert join_linears(module.graph) == 0


def test_one_token_in_integers_is_rounded_again(monkeypatch):
    """By the call that multiplies it, a single linear's, too, where the kernel of a GPU does."""
    asked = []

    def why_not_integers(x, fmt, planes, rounding):
        asked.append((tuple(x.shape), fmt.name, planes, rounding[0].name))
        return None if len(asked) == 1 else "no"

    module = fused_graph("w4a8-mxint-quick", X[:1, :1])
    wanted = module(X[:1, :1])
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        node.args = (*node.args, [0, 0])
    monkeypatch.setattr(rewrite, "_on_cpu", lambda _: False)
    monkeypatch.setattr(rewrite, "why_not_fp8", lambda *_: "no")
    monkeypatch.setattr(rewrite, "why_not_integers", why_not_integers)
    assert join_linears(module.graph) == 1
    assert asked == [((1, 1, 64), "mxint4", (0, 0), "mxint8"), ((1, 1, 32), "mxint4", (0, 0), "mxint8")]
    assert text(module.graph) == ["round", "linears", "round", "linear"]
    (joined,) = module.graph.find_nodes(op="call_function", target=LINEARS)
    assert joined.args[0].target in (QUANTIZE_DEQUANTIZE, *VIEWS)
    assert joined.args[5:7] == ("mxint8", "floor")
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        node.args = node.args[:-1]  # the weight is not really planar
    joined.args = joined.args[:-1]
    module.recompile()
    for result, value in zip(module(X[:1, :1]), wanted, strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=1e-5)
