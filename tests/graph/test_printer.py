"""print_program: the whole expected text for a small MLP; two traces print the same; a change shows only in its own
line; nothing depends on a path, an id or a time.
"""

import hashlib
import math
import re
import struct

import pytest
import torch
from models import MODELS, build, inputs
from torch import Tensor, nn

from mxcompile.graph.printer import print_program, print_target, print_type, summarize
from mxcompile.graph.program import Program
from mxcompile.graph.trace import trace
from mxcompile.ops import DEQUANTIZE, QUANTIZE
from mxcompile.pipeline.pipeline import Pipeline

EXPECTED = """\
%up_weight                                f32[6, 4]                    = tensor "up.weight" absmax=1.5 sha=1859b17e
%up_bias                                  f32[6]                       = tensor "up.bias" absmax=0.25 sha=188f8ec8
%down_weight                              f32[4, 6]                    = tensor "down.weight" absmax=1.5 sha=1859b17e
%down_bias                                f32[4]                       = tensor "down.bias" absmax=0.25 sha=2c7ae7c3
%x                                        f32[s0, s1, 4]               = input
%_guards_fn                                                            = _guards_fn(%x)
%linear                                   f32[s0, s1, 6]               = aten.linear(%x, %up_weight, %up_bias)                                                # up
%relu                                     f32[s0, s1, 6]               = aten.relu(%linear)
%linear_1                                 f32[s0, s1, 4]               = aten.linear(%relu, %down_weight, %down_bias)                                         # down
%softmax                                  f64[s0, s1, 4]               = aten.softmax.int(%linear_1, -1, f64)
return (%softmax,)
"""  # noqa: E501


class Small(nn.Module):
    """An MLP whose weights are multiples of 1/8, written down rather than drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)
        with torch.no_grad():
            for linear in (self.up, self.down):
                linear.weight.copy_((torch.arange(24.0) / 8 - 1.5).reshape(linear.weight.shape))
                linear.bias.fill_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).softmax(-1, torch.float64)


@pytest.fixture
def program() -> Program:
    return trace(Small(), torch.zeros(2, 3, 4))


def lines(program: Program) -> list[str]:
    return print_program(program).splitlines()


def changed(before: list[str], after: list[str]) -> list[str]:
    """The new lines, of texts with as many lines."""
    return [new for old, new in zip(before, after, strict=True) if old != new]


def test_the_whole_text(program):
    assert print_program(program) == EXPECTED


@pytest.mark.parametrize("name", ["mlp", "cnn", "mixtral"])
def test_two_traces_print_alike(name, traced):
    assert print_program(trace(build(name), inputs(name))) == print_program(traced(name))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_that_differs_from_run_to_run(name, traced):
    text = print_program(traced(name))
    assert not re.search(r"0x[0-9a-f]+|/\w+/|\\|\.py\b|<[^>]*>| at ", text)
    assert text == text.strip() + "\n"
    assert not re.search(r" +$", text, re.MULTILINE)


def test_the_sizes_of_the_example_do_not_show(program):
    assert print_program(trace(Small(), torch.zeros(5, 7, 4))) == print_program(program)


@pytest.mark.parametrize("name", ["mlp", "llama", "mixtral"])
def test_dynamic_sizes_are_numbered_in_order(name, traced):
    seen = list(dict.fromkeys(re.findall(r"\bs\d+\b", print_program(traced(name)))))
    assert seen == [f"s{i}" for i in range(len(seen))]
    assert len(seen) >= 2


def test_sizes_computed_from_dynamic_ones():
    class Reshaping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(0, 1), x.repeat(1, 2, 1), x.shape[0]

    text = print_program(trace(Reshaping(), torch.zeros(2, 3, 4)))
    assert re.search(r"%flatten +f32\[(s0\*s1|s1\*s0), s2\]", text)
    assert re.search(r"%repeat +f32\[s0, 2\*s1, s2\]", text)
    assert re.search(r"%sym_size\w* +int\(s0\)", text)


# Small changes


def test_a_replaced_weight_changes_its_own_line(program):
    before = lines(program)
    program.set_tensor("up.weight", program.tensor("up.weight").detach() * 2)
    (line,) = changed(before, lines(program))
    assert line.startswith(
        '%up_weight                                f32[6, 4]                    = tensor "up.weight"'
    )
    assert "absmax=3 sha=" in line
    assert line[-8:] != before[0][-8:]


def test_a_weight_trained_in_between_changes_its_own_line():
    model, x = Small(), torch.zeros(2, 3, 4)
    before = lines(trace(model, x))
    with torch.no_grad():
        model.up.weight.mul_(2)
    (line,) = changed(before, lines(trace(model, x)))
    assert "absmax=3 sha=" in line


def test_a_rounded_weight_says_its_format(program):
    rounded = lines(Pipeline.parse("round-weights{format=mxint4}").run(program))
    assert [line.split('"')[1] for line in rounded if line.endswith(" format=mxint4")] == ["up.weight", "down.weight"]


def test_one_bit_shows(program):
    before = lines(program)
    weight = program.tensor("up.weight").detach().clone()
    weight[2, 1] = torch.nextafter(weight[2, 1], torch.tensor(9.0))
    program.set_tensor("up.weight", weight)
    assert len(changed(before, lines(program))) == 1


def test_a_longer_name_overflows_its_own_line(program):
    before = lines(program)
    (relu,) = [node for node in program.graph.nodes if node.name == "relu"]
    relu._rename("a_name_that_is_much_longer_than_the_column_for_names")
    first, second = changed(before, lines(program))
    assert first.startswith("%a_name_that_is_much_longer_than_the_column_for_names f32[s0, s1, 6] ")
    assert second.startswith(
        "%linear_1                                 f32[s0, s1, 4]               = aten.linear(%a_name_"
    )


def test_a_longer_type_overflows_its_own_line():
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, None, None, None, None, None, None].relu().flatten(2)

    relu, flatten = lines(trace(Wide(), torch.zeros(2, 3, 4)))[-3:-1]
    assert "f32[s0, s1, 1, 1, 1, 1, 1, 1, s2] = aten.relu" in relu
    assert flatten.index("=") == EXPECTED.splitlines()[0].index("=")


# Parts


def test_a_lowered_program(program):
    text = print_program(Pipeline.parse("lower-mx{weight=mxint4,activation=mxint8}").run(program))
    (weight,) = [line for line in text.splitlines() if line.startswith("%up_weight_elements ")]
    assert re.fullmatch(r'%up_weight_elements +u8\[6, 16\] += tensor "up.weight_elements" sha=[0-9a-f]{8}', weight)
    assert "= mx.dequantize(%up_weight_elements, %up_weight_scales, 'mxint4', 4, f32)" in text
    assert "%x_quantized " in text
    assert "(u8[s0, s1, 32], u8[s0, s1, 1]) = mx.quantize(%x, 'mxint8', 'floor')" in text
    assert "= getitem(%x_quantized, 0)" in text


def test_arguments():
    class Arguments(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                torch.cat([x, x], dim=1),
                torch.clamp(x, min=-math.inf, max=0.5),
                x[1:],
                torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.25),
                torch.zeros(3, dtype=torch.int32),
            )

    text = print_program(trace(Arguments(), torch.zeros(3, 3, 4)))
    for call in (
        "aten.cat([%x, %x], 1)",
        "aten.clamp(%x, -inf, 0.5)",
        "aten.slice.Tensor(%x, 0, 1, end)",
        "aten.scaled_dot_product_attention(%x, %x, %x, None, 0.0, True, scale=0.25)",
        "aten.zeros([3], dtype=i32,",
        "return (%cat, %clamp, %slice_1, %scaled_dot_product_attention, %zeros)",
    ):
        assert call in text


def test_an_output_that_is_a_mapping(traced):
    assert lines(traced("llama"))[-1] == "return (%linear_7,)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "f32[2, 3]"),
        (torch.zeros(()), "f32[]"),
        (torch.zeros(1, dtype=torch.bfloat16), "bf16[1]"),
        (torch.zeros(1, dtype=torch.bool), "b8[1]"),
        (torch.zeros(1, dtype=torch.float8_e4m3fn), "f8_e4m3[1]"),
        (torch.zeros(1, dtype=torch.complex128), "complex128[1]"),
        ((torch.zeros(2), [torch.zeros(3, dtype=torch.int64)]), "(f32[2], (i64[3]))"),
        (7, "int(7)"),
        (None, ""),
        (0.5, "float"),
        ("text", "str"),
    ],
    ids=str,
)
def test_types(value, text):
    assert print_type(value) == text


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.ops.aten.linear.default, "aten.linear"),
        (torch.ops.aten.add.Tensor, "aten.add.Tensor"),
        (QUANTIZE, "mx.quantize"),
        (DEQUANTIZE, "mx.dequantize"),
        (math.floor, "floor"),
        ("a.b", "a.b"),
    ],
)
def test_targets(target, text):
    assert print_target(target) == text


# Summaries


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(0), "sha=empty"),
        (torch.zeros(1), "absmax=0 sha=df3f6198"),  # SHA-256 of four zero bytes begins like that
        (torch.zeros(4, dtype=torch.uint8), "sha=df3f6198"),
        (torch.tensor(0.0), "absmax=0 sha=df3f6198"),
        (torch.zeros(2, dtype=torch.bfloat16), "absmax=0 sha=df3f6198"),
    ],
)
def test_summaries(tensor, text):
    assert summarize(tensor) == text


@pytest.mark.parametrize(
    ("values", "absmax"),
    [
        ([1.0, -2.5], "2.5"),
        ([1e-8, 0.0], "1e-08"),
        ([1.0, math.nan], "nan"),
        ([-math.inf, 0.0], "inf"),
        ([1 / 3], "0.333333"),
    ],
)
def test_largest_magnitude(values, absmax):
    assert summarize(torch.tensor(values)).startswith(f"absmax={absmax} sha=")


def test_the_hash_is_of_the_bytes():
    tensor = torch.tensor([1.0, -2.0])
    assert summarize(tensor)[-8:] == hashlib.sha256(struct.pack("=2f", 1.0, -2.0)).hexdigest()[:8]


def test_a_summary_depends_on_values_and_nothing_else():
    x = torch.randn(4, 6)
    assert summarize(x.t().contiguous().t()) == summarize(x) == summarize(nn.Parameter(x))
    assert summarize(x.t()) != summarize(x)
    assert summarize(x.double()) != summarize(x)
    assert summarize(torch.tensor([0.0])) != summarize(torch.tensor([-0.0]))


def test_a_new_tensor_in_an_old_ones_place_is_summarized_anew():
    summaries = {summarize(torch.full((3,), float(i))) for i in range(50)}  # CPython reuses the freed object's id
    assert len(summaries) == 50
