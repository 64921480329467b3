"""What a compiled call notices about its MXWeights: another layout, dtype or value, and at what cost."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import mxcompile
from mxcompile.inductor import compile_module, weight_guards, why_no_inductor
from mxcompile.inductor.compiled_forward import CompiledForward
from mxcompile.tensor.weight import MXWeight

needs_compiler = pytest.mark.skipif(why_no_inductor(torch.device("cpu")) is not None, reason="there is no C++ compiler")


def quantized(recipe, seed=0):
    torch.manual_seed(seed)
    return mxcompile.quantize_and_compile(
        nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64), recipe=recipe, compile=False
    )


@needs_compiler
@torch.no_grad()
def test_another_weight_in_its_place_is_seen():
    module, x = compile_module(quantized("w4a8-mxint-quick")), torch.randn(5, 64)
    module(x)
    for recipe, seed in (("w8a8-mxint-quick", 1), ("w4a8-mxfp-quick", 2), ("w4a8-mxint-quick", 3)):
        other = quantized(recipe, seed)
        module[0].weight, module[0].bias = other[0].weight, other[0].bias
        torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-5)


@needs_compiler
@torch.no_grad()
def test_another_dtype_and_a_float_weight_are_seen():
    module, x = compile_module(quantized("w4a8-mxint-quick")), torch.randn(5, 64)
    module(x)
    module.to(torch.bfloat16)
    plain = quantized("w4a8-mxint-quick").to(torch.bfloat16)
    torch.testing.assert_close(module(x.bfloat16()), plain(x.bfloat16()), rtol=0, atol=0.02)
    module[0].weight = nn.Parameter(torch.eye(32, 64, dtype=torch.bfloat16))
    assert torch.equal(module(x.bfloat16()), x.bfloat16()[:, :32] + module[0].bias)


@needs_compiler
@torch.no_grad()
def test_values_of_a_known_layout_need_no_new_graph():
    module, x = compile_module(quantized("w4a8-mxint-quick")), torch.randn(5, 64)
    module(x)
    before = counters["stats"]["unique_graphs"]
    other = quantized("w4a8-mxint-quick", seed=1)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == before


def test_layouts_are_those_of_all_weights():
    module = nn.ModuleList([quantized("w4a8-mxint-quick"), nn.Linear(2, 2), quantized("w8a8-mxint-quick")])
    module.register_module("nothing", None)
    found = weight_guards.WeightLayouts(module)
    assert [layout.format for layout in found.layouts] == ["mxint4", "mxint8"]
    assert found.hold()
    module[0][0].weight = quantized("w4a8-mxint-quick", seed=1)[0].weight
    assert weight_guards.WeightLayouts(module).layouts == found.layouts
    module[0] = module[2]
    assert not found.hold()


class TakesWeight(nn.Module):
    """A linear layer of its own, then a matmul with a weight that it is given."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x, weight):
        return nn.functional.linear(self.linear(x), weight)


def guards_of(module, *args):
    """(type, the value's expression) of every guard that Dynamo keeps for a call, whose result is checked."""
    names = []

    def backend(graph, _):
        context = torch._guards.TracingContext.get()
        inner = context.guards_context.dynamo_guards.inner
        names.extend((guard.create_fn_name(), guard.name) for guard in inner)
        return graph.forward

    torch._dynamo.reset()
    expected = module(*args)
    assert torch.equal(CompiledForward(module, backend)(*args), expected)
    return names


@torch.no_grad()
def test_only_guards_on_what_lies_in_its_own_weights_are_left_out():
    own, other = (
        quantized("w4a8-mxint-quick")[0],
        mxcompile.quantize_and_compile(nn.Linear(32, 64), torch.randn(3, 32), recipe="w4a8-mxint-quick", compile=False),
    )
    assert isinstance(own.weight, MXWeight)
    guards = guards_of(TakesWeight(own), torch.randn(3, 64), other.weight)
    mine = [(kind, name.partition("['weight']")[2]) for kind, name in guards if "_parameters['weight']" in name]
    assert {inside for _, inside in mine} == {""}
    assert "TENSOR_MATCH" in {kind for kind, _ in mine}
    assert "TENSOR_SUBCLASS_METADATA_MATCH" not in {kind for kind, _ in mine}
    foreign = [(kind, name) for kind, name in guards if name.startswith("L['args'][1]")]
    assert "TENSOR_SUBCLASS_METADATA_MATCH" in {kind for kind, _ in foreign}
    assert "L['args'][1].elements" in {name for _, name in foreign}
    assert ("TENSOR_MATCH", "L['args'][0]") in guards
