"""What a compiled call notices about its MXWeights: another layout, dtype or value, and at what cost."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import mxcompile
from mxcompile.inductor import compile_module, weight_guards, why_no_inductor
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


def test_only_guards_on_what_lies_in_its_own_weights_are_left_out():
    module, other = quantized("w4a8-mxint-quick"), quantized("w4a8-mxint-quick")

    def guard(name, kind, value=None):
        return SimpleNamespace(name=name, guard_type=kind, value=value)

    mine, weight = module[0].weight, "G['m']._modules['0']._parameters['weight']"
    assert isinstance(mine, MXWeight)
    given = [
        (guard(weight, "TENSOR_MATCH", mine), True),
        (guard(weight, "TYPE_MATCH", mine), True),
        (guard(weight, "TENSOR_SUBCLASS_METADATA_MATCH", mine), False),
        (guard(f"{weight}.elements", "TENSOR_MATCH", mine.elements), False),
        (guard(f"{weight}.__tensor_flatten__()[0]", "EQUALS_MATCH", ["elements", "scales"]), False),
        (guard("L['x']", "TENSOR_SUBCLASS_METADATA_MATCH", other[0].weight), True),
        (guard("L['x'].elements", "TENSOR_MATCH", other[0].weight.elements), True),
        (guard("G['m'].training", "CONSTANT_MATCH", False), True),
    ]
    assert weight_guards.outside_weights(module)([one for one, _ in given]) == [kept for _, kept in given]
