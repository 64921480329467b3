"""lower-mx: matmuls get packed weights and quantize / dequantize nodes, and compute the same as rounded tensors."""

import re

import pytest
import torch
from torch import nn

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.multiplier import insert_multiplier, multiplier_of
from mxcompile.analysis.layers import find_layers
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.errors import CoverageError, PassError, PipelineError, WeightError
from mxcompile.formats import FORMATS, MXFP4, MXFP8_E4M3, MXINT4, MXINT8, ScaleRule
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Stage
from mxcompile.numerics import reference
from mxcompile.ops import DEQUANTIZE, QUANTIZE
from mxcompile.passes.lower_mx import LowerMX
from mxcompile.passes.round_weights import RoundWeights
from mxcompile.pipeline.pipeline import Pipeline


class Branches(nn.Module):
    """Two linears that read one value, and one that reads their product."""

    def __init__(self, inner: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(inner, 32, bias=False)
        self.up = nn.Linear(inner, 32, bias=False)
        self.down = nn.Linear(32, inner)

    def forward(self, x):
        return self.down(self.gate(x) * self.up(x))


def lowered(model, x, **options):
    return Pipeline([LowerMX(**options)]).run(mxcompile.trace(model, x))


AFTER = """\
%down_bias                                f32[64]                      = tensor "down.bias"
%x                                        f32[s0, 64]                  = input
%gate_weight_elements                     u8[32, 32]                   = tensor "gate.weight_elements"
%gate_weight_scales                       u8[32, 2]                    = tensor "gate.weight_scales"
%gate_weight_dequantized                  f32[32, 64]                  = mx.dequantize(%gate_weight_elements, %gate_weight_scales, 'mxint4', 64, f32) # gate
%x_quantized                              (u8[s0, 64], u8[s0, 2])      = mx.quantize(%x, 'mxint8', 'floor') # gate
%x_elements                               u8[s0, 64]                   = getitem(%x_quantized, 0) # gate
%x_scales                                 u8[s0, 2]                    = getitem(%x_quantized, 1) # gate
%x_dequantized                            f32[s0, 64]                  = mx.dequantize(%x_elements, %x_scales, 'mxint8', 64, f32) # gate
%linear                                   f32[s0, 32]                  = aten.linear(%x_dequantized, %gate_weight_dequantized) # gate
%up_weight_elements                       u8[32, 32]                   = tensor "up.weight_elements"
%up_weight_scales                         u8[32, 2]                    = tensor "up.weight_scales"
%up_weight_dequantized                    f32[32, 64]                  = mx.dequantize(%up_weight_elements, %up_weight_scales, 'mxint4', 64, f32) # up
%linear_1                                 f32[s0, 32]                  = aten.linear(%x_dequantized, %up_weight_dequantized) # up
%mul                                      f32[s0, 32]                  = aten.mul.Tensor(%linear, %linear_1)
%down_weight_elements                     u8[64, 16]                   = tensor "down.weight_elements"
%down_weight_scales                       u8[64, 1]                    = tensor "down.weight_scales"
%down_weight_dequantized                  f32[64, 32]                  = mx.dequantize(%down_weight_elements, %down_weight_scales, 'mxint4', 32, f32) # down
%mul_quantized                            (u8[s0, 32], u8[s0, 1])      = mx.quantize(%mul, 'mxint8', 'floor') # down
%mul_elements                             u8[s0, 32]                   = getitem(%mul_quantized, 0) # down
%mul_scales                               u8[s0, 1]                    = getitem(%mul_quantized, 1) # down
%mul_dequantized                          f32[s0, 32]                  = mx.dequantize(%mul_elements, %mul_scales, 'mxint8', 32, f32) # down
%linear_2                                 f32[s0, 64]                  = aten.linear(%mul_dequantized, %down_weight_dequantized, %down_bias) # down
return (%linear_2,)
"""  # noqa: E501 - a graph, as it is printed


def graph_text(program):
    text = re.sub(r" (absmax=\S+ )?sha=\w+", "", print_program(program))
    lines = [re.sub(r"\) +#", ") #", line) for line in text.splitlines() if "_guards_fn" not in line]
    return "\n".join(lines) + "\n"


def test_graph_after():
    assert graph_text(lowered(Branches(), torch.randn(3, 64), weight=MXINT4, activation=MXINT8)) == AFTER


def test_readers_of_one_value_share_its_quantization():
    program = lowered(Branches(), torch.randn(3, 64), weight=MXINT4, activation=MXINT8)
    assert program.ledger[0].rewrites == 3
    assert len(program.graph.find_nodes(op="call_function", target=QUANTIZE)) == 2
    assert program.stage is Stage.LOWERED


def test_weight_only_leaves_activations_alone():
    program = lowered(Branches(), torch.randn(3, 64), weight=MXFP4)
    assert not program.graph.find_nodes(op="call_function", target=QUANTIZE)
    assert len(program.graph.find_nodes(op="call_function", target=DEQUANTIZE)) == 3


def test_what_cannot_be_lowered_is_a_miss_with_its_reason():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 8))

        def forward(self, x):
            return self.normed(self.linear(x))

    (record,) = lowered(Weighted(), torch.randn(3, 64), weight=MXINT4).ledger
    assert record.rewrites == 1
    assert [miss.reason for miss in record.misses] == [
        "the weight is computed at run time by aten._weight_norm.default from "
        "normed.parametrizations.weight.original1, normed.parametrizations.weight.original0: store it as a parameter "
        "(torch.nn.utils.parametrize.remove_parametrizations)"
    ]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("inner", [64, 52, 7])
def test_computes_what_rounded_weights_and_activations_compute(fmt, inner):
    """Equal, not close: the same rounded operands go into the same linear."""
    model, x = Branches(inner), torch.randn(5, inner)
    program = lowered(model, x, weight=fmt, activation=MXINT8)

    def rounded(weight):
        return reference.quantize_dequantize(weight.detach(), fmt, ScaleRule.MSE)

    def prepared(value):
        return reference.quantize_dequantize(value, MXINT8, ScaleRule.FLOOR)

    hidden = prepared(x) @ rounded(model.gate.weight).T * (prepared(x) @ rounded(model.up.weight).T)
    expected = torch.nn.functional.linear(prepared(hidden), rounded(model.down.weight), model.down.bias.detach())
    assert torch.equal(program(x), expected)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_finds_the_elements_that_rounding_chose(fmt):
    model, x = Branches(), torch.randn(3, 64)
    program = mxcompile.trace(model, x)
    for rule in (ScaleRule.MSE, ScaleRule.FLOOR, ScaleRule.RCEIL, ScaleRule.CEIL):
        rounding = Pipeline([RoundWeights(fmt, rule)]).run(program)
        both = Pipeline([RoundWeights(fmt, rule), LowerMX(fmt)]).run(program)
        assert torch.equal(both(x), rounding(x))


@pytest.mark.parametrize(("fmt", "bits"), [(MXFP4, 4.25), (MXINT4, 4.25), (FORMATS["mxint6"], 6.25), (MXINT8, 8.25)])
def test_true_size(fmt, bits):
    program = lowered(Branches(), torch.randn(3, 64), weight=fmt)
    stored = sum(program.tensor(f"gate.weight_{part}").numel() for part in ("elements", "scales"))
    assert stored * 8 == bits * 32 * 64


def test_twice_is_once():
    program = mxcompile.trace(Branches(), torch.randn(3, 64))
    once = Pipeline([LowerMX(MXINT4, MXINT8)]).run(program)
    twice = Pipeline([LowerMX(MXINT4, MXINT8), LowerMX(MXINT4, MXINT8)]).run(program)
    assert twice.ledger[1].rewrites == 0
    assert print_program(once) == print_program(twice)


def test_float_weights_are_let_go():
    program = lowered(Branches(), torch.randn(3, 64), weight=MXINT4)
    assert not program.has_tensor("gate.weight")


def test_the_users_model_and_the_float_program_are_untouched():
    model, x = Branches(), torch.randn(3, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = mxcompile.trace(model, x)
    text = print_program(program)
    Pipeline([LowerMX(MXINT4, MXINT8)]).run(program)
    assert print_program(program) == text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("activation", [None, MXINT8])
def test_a_multiplied_value_is_quantized_after_the_multiply(activation):
    x = torch.randn(3, 64)
    program = mxcompile.trace(Branches(), x)
    product = insert_multiplier(program, choose(program).matmuls[:2])
    program.set_tensor(str(multiplier_of(program, product)), torch.full((64,), 4.0))
    after = Pipeline([LowerMX(MXINT4, activation)]).run(program)
    gate, up, _ = find_matmuls(after)[0]
    assert gate.activation is up.activation
    assert gate.activation.name == ("x_multiplied" if activation is None else "x_multiplied_dequantized")
    plain = lowered(Branches(), x, weight=MXINT4, activation=activation)
    assert torch.equal(after(x), plain(4 * x))


def test_what_is_added_to_a_product_stays_float_though_it_is_the_activation_too():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return torch.addmm(x, x, self.weight)

    model, x = Residual(), torch.randn(3, 64)
    program = lowered(model, x, weight=MXINT4, activation=MXINT8)
    assert torch.equal(mxcompile.deploy(program, model)(x), program(x))
    (matmul,) = find_matmuls(program)[0]
    assert [str(arg) for arg in matmul.node.args[:2]] == ["x", "x_dequantized"]


def test_embedding_on_request_looks_up_packed_rows():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 48)
            self.linear = nn.Linear(48, 16)

        def forward(self, ids):
            return self.linear(self.embed(ids))

    model, ids = Lookup(), torch.randint(40, (2, 5))
    program = Pipeline([LowerMX(MXINT4)]).run(mxcompile.trace(model, ids, include=["embed"]))
    table = reference.quantize_dequantize(model.embed.weight.detach(), MXINT4, ScaleRule.MSE)
    weight = reference.quantize_dequantize(model.linear.weight.detach(), MXINT4, ScaleRule.MSE)
    assert program.ledger[0].rewrites == 2
    assert torch.equal(program(ids), torch.nn.functional.linear(table[ids], weight, model.linear.bias.detach()))


def test_nan_in_a_weight_names_it():
    model = Branches()
    with torch.no_grad():
        model.up.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"'up.weight'"):
        lowered(model, torch.randn(3, 64), weight=MXINT4)


def test_nothing_to_lower_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    with pytest.raises(CoverageError, match=r"(?s)only 0%.*convolution.*allow_partial"):
        lowered(model, torch.randn(1, 1, 8, 8), weight=MXINT4)


def test_two_formats_for_one_weight_are_refused():
    with pytest.raises(PassError, match=r"'gate.weight' was rounded to mxint8, but lower-mx has weight=mxint4"):
        Pipeline([RoundWeights(MXINT8), LowerMX(MXINT4)]).run(mxcompile.trace(Branches(), torch.randn(3, 64)))


def test_a_pass_that_spoils_rounded_weights_is_found_out():
    class Shrink(mxcompile.Pass):
        name = "shrink"
        accepts = frozenset({Stage.ROUNDED})

        def run(self, program):
            program.set_tensor("up.weight", program.tensor("up.weight").detach() * 0.9)
            return mxcompile.PassResult(1)

    pipeline = Pipeline([RoundWeights(MXINT4), Shrink(), LowerMX(MXINT4)])
    with pytest.raises(PassError, match=r"'up.weight' no longer holds mxint4 values"):
        pipeline.run(mxcompile.trace(Branches(), torch.randn(3, 64)))


def test_rounding_after_lowering_is_refused():
    with pytest.raises(
        PipelineError, match=r"round-weights cannot run after lower-mx.*Move round-weights before lower-mx"
    ):
        Pipeline([LowerMX(MXINT4), RoundWeights(MXINT4)])


def test_inputs_of_a_format_of_their_own_are_rounded_to_it():
    """Every matmul's input in another format than lower-mx has: the same bits as with that format in lower-mx."""
    x = torch.randn(8, 64)
    program = mxcompile.trace(Branches(), x)
    chosen = program.copy()
    chosen.input_formats = dict.fromkeys(find_layers(program), MXFP8_E4M3)
    one = Pipeline.parse("round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxfp4}").run(chosen)
    other = Pipeline.parse("round-weights{format=mxint4} | lower-mx{weight=mxint4,activation=mxfp8_e4m3}").run(program)
    assert torch.equal(one(x), other(x))


def test_readers_of_one_value_may_have_inputs_of_different_formats():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x):
            return self.one(x), self.two(x)

    program = mxcompile.trace(Shared(), torch.randn(8, 64))
    program.input_formats = {"two.weight": MXFP4}
    lowered = Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8}").run(program)
    assert [str(layer.input_rounding) for layer in find_layers(lowered).values()] == ["mxint8", "mxfp4"]
