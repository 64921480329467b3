"""trace: every accepted form of example inputs gives the same graph; batch and length stay dynamic; the user's model is
unchanged to the bit; tied parameters and the output head are recorded; errors explain what cannot be traced.
"""

import re
from collections import UserDict

import pytest
import torch
from models import LANGUAGE_MODELS, MLP, MODELS, build, inputs, output
from torch import Tensor, nn

from mxcompile.errors import InputError, TraceError, UnknownNameError
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.printer import print_program
from mxcompile.graph.program import Program, Stage
from mxcompile.graph.trace import trace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAME_OPS = 1e-5  # the graph calls the same ops in the same order, but attention may take another kernel


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name


# Inputs


def example_forms(x: Tensor) -> dict[str, object]:
    return {
        "tensor": x,
        "tuple": (x,),
        "list": [x],
        "dict": {"x": x},
        "mapping": UserDict({"x": x}),  # what transformers' BatchEncoding is
        "Inputs": Inputs((x,)),
    }


@pytest.mark.parametrize("form", example_forms(torch.empty(0)))
def test_forms_of_example_inputs(form):
    model, x = build("mlp"), inputs("mlp")["x"]
    program = trace(model, example_forms(x)[form])
    assert torch.equal(output(program(*program.example.args, **program.example.kwargs)), model(x))


def test_a_tokenizers_output_is_a_mapping():
    from transformers import BatchEncoding

    x = inputs("mlp")["x"]
    assert torch.equal(trace(build("mlp"), BatchEncoding({"x": x})).example.kwargs["x"], x)


def test_forms_with_the_same_keywords_give_the_same_graph():
    x = inputs("mlp")["x"]
    texts = {print_program(trace(build("mlp"), form)) for form in example_forms(x).values()}
    assert len(texts) == 1


def test_nested_and_missing_inputs():
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], extra: dict[str, Tensor], scale: Tensor | None = None) -> Tensor:
            total = pair[0] + pair[1] + extra["bias"]
            return total if scale is None else total * scale

    pair, extra = (torch.randn(2, 4), torch.randn(2, 4)), {"bias": torch.randn(2, 4)}
    program = trace(Nested(), {"pair": pair, "extra": extra, "scale": None})
    assert torch.equal(program(pair=pair, extra=extra, scale=None), Nested()(pair, extra))


# Dynamic sizes


@pytest.mark.parametrize("name", MODELS)
def test_batch_and_length_are_dynamic(name, traced):
    assert_follows(traced(name), build(name), name)


@pytest.mark.parametrize("name", ["mlp", "cnn", "llama", "vit"])
def test_batch_and_length_are_dynamic_when_traced_at_batch_one(name):
    model = build(name)
    assert_follows(trace(model, inputs(name, batch=1)), model, name)


def assert_follows(program: Program, model: nn.Module, name: str) -> None:
    for batch, length in ((1, 8), (3, 11)):
        x = inputs(name, batch, length, seed=1)
        with torch.no_grad():
            expected = output(model(**x))
        torch.testing.assert_close(output(program(**x)), expected, rtol=0, atol=SAME_OPS)


def test_a_size_that_the_model_fixes_stays_fixed():
    class Fixed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 8
            return super().forward(x)

    text = print_program(trace(Fixed().eval(), inputs("mlp")["x"]))
    assert re.search(r"%x +f32\[s0, 8, 64\]", text)


def test_a_model_for_batch_one_only_is_traced_at_batch_one():
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 1:
                raise ValueError("one at a time")
            return x * 2

    program = trace(Single(), torch.ones(1, 8))
    assert torch.equal(program(torch.ones(1, 5)), torch.full((1, 5), 2.0))


# The user's model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_model_is_untouched(dtype):
    model = build("llama-tied", dtype).train()
    model.model.norm.eval()
    model.config.use_cache = True
    model.lm_head.weight.requires_grad_(False)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    before, flags = snapshot(model), {name: module.training for name, module in model.named_modules()}
    program = trace(model, inputs("llama-tied"))
    program(**inputs("llama-tied", batch=3))
    assert_same_bits(model, before)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert model.config.use_cache is True
    assert all(model.get_parameter(name) is own[name] for name, _ in model.named_parameters(remove_duplicate=False))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    for name in program.parameter_names():  # shared, not copied
        assert program.tensor(name) is own[name]
        assert program.is_parameter(name) == isinstance(own[name], nn.Parameter)


def test_a_buffer_that_forward_writes_to_is_untouched():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    model = Counting()
    program = trace(model, torch.ones(2, 8))
    program(torch.ones(2, 8))
    assert model.calls.item() == 0


def test_traced_in_eval_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9), nn.BatchNorm1d(8)).train()
    statistics = snapshot(model)
    x = torch.randn(4, 8)
    program = trace(model, x)
    assert torch.equal(program(x), program(x))
    assert_same_bits(model, statistics)
    model.eval()
    with torch.no_grad():
        assert torch.equal(program(x), model(x))


def test_no_cache_among_the_outputs(traced):
    result = traced("llama")(**inputs("llama"))
    assert set(result.keys()) == {"logits"}


def test_the_graph_is_not_decomposed(traced):
    targets = {str(node.target) for node in traced("llama").graph.nodes}
    assert {"aten.linear.default", "aten.scaled_dot_product_attention.default"} <= targets
    assert "aten._assert_tensor_metadata.default" not in targets
    assert not targets & {"aten.mm.default", "aten.addmm.default"}


def test_a_new_program():
    program = trace(build("mlp"), inputs("mlp"))
    assert program.stage is Stage.FLOAT
    assert (program.ledger, program.rounded, program.statistics) == ([], {}, {})


def test_parameters_that_nothing_reads_are_let_go():
    class Spare(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(8, 8)

    program = trace(Spare(), inputs("mlp"))
    assert not program.has_tensor("spare.weight")
    assert sorted(program.parameter_names()) == sorted(name for name, _ in MLP().named_parameters())


# Names


def test_tied_parameters_are_known_by_all_their_names(traced):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert traced("llama-tied").aliases == dict.fromkeys(names, names)
    assert traced("llama").aliases == {}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_output_head_is_known(name, traced):
    program = traced(name)
    assert "lm_head.weight" in program.output_heads
    tied = {alias for names in program.aliases.values() for alias in names}
    assert program.output_heads == (tied or {"lm_head.weight"})


@pytest.mark.parametrize("name", ["mlp", "bert", "vit"])
def test_a_model_without_an_output_head(name, traced):
    assert traced(name).output_heads == frozenset()


# Errors


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_an_untraceable_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), Branching()))
    line = Branching.forward.__code__.co_firstlineno + 1
    with pytest.raises(TraceError) as caught:
        trace(model, torch.randn(2, 8))
    message = str(caught.value)
    assert message.startswith(f"Sequential cannot be traced: in 1.1 (Branching), line {line} of its forward: ")
    assert "data-dependent" in message
    assert "torch.where" in message
    assert "mxcompile.trace(model.encoder, ...)" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None


def test_a_model_that_casts_a_module_while_it_runs():
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.scores = self.scores.to(torch.float32)
            return self.scores(x)

    with pytest.raises(TraceError, match=r"in 0 \(Router\), line \d+ of its forward: a module is cast or moved .*once"):
        trace(nn.Sequential(Router()), torch.randn(2, 8))


def test_an_untraceable_top_module():
    with pytest.raises(TraceError, match=r"in the top module \(Branching\), line \d+ of its forward"):
        trace(Branching(), torch.randn(2, 8))


def test_an_untraceable_method():
    class Indirect(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.choose(x)

        def choose(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    line = Indirect.forward.__code__.co_firstlineno + 1
    with pytest.raises(TraceError, match=rf"in 0 \(Indirect\), line {line} of its forward"):
        trace(nn.Sequential(Indirect()), torch.randn(2, 8))


def test_a_model_that_fails_by_itself():
    with pytest.raises(InputError) as caught:
        trace(nn.Linear(8, 4), (torch.randn(2, 9),))
    message = str(caught.value)
    assert message.startswith("Linear itself fails on the example inputs (float32 (2, 9)): RuntimeError: ")
    assert "shapes cannot be multiplied" in message


@pytest.mark.parametrize("wrong", [-1, 8])
def test_indices_outside_of_a_table(wrong):
    """Tracing reads no values; the model fails when a pass runs it, on a GPU for good."""
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64))
    with pytest.raises(InputError, match=r"has indices from .* and the table of %embedding in 0 has 8 rows"):
        trace(model, torch.tensor([[0, 7, wrong]]))


def test_a_model_of_two_dtypes_that_fails_by_itself():
    """Tracing accepts operands of two dtypes; the message names the layer that was forgotten."""
    half, integer = nn.Linear(64, 64).half(), nn.Linear(64, 64)
    integer.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
    for layer, dtypes in ((half, "float16 by float32"), (integer, "float32 by int8")):
        with pytest.raises(InputError, match=rf"^%linear_1 in 1 multiplies {dtypes}: cast .* Sequential itself fails"):
            trace(nn.Sequential(nn.Linear(64, 64), layer), torch.randn(2, 64))


def test_inputs_without_values():
    with pytest.raises(InputError, match=r"^an input of shape \[2, 64\] is on the meta device: give tensors with"):
        trace(nn.Linear(64, 64), torch.empty(2, 64, device="meta"))


def test_a_keyword_that_forward_does_not_take():
    x = inputs("mlp")["x"]
    with pytest.raises(InputError) as caught:
        trace(build("mlp"), {"pixels": x})
    assert str(caught.value).startswith("the example inputs do not fit MLP.forward(x): ")
    with pytest.raises(InputError, match=r"do not fit MLP\.forward\(x\): got an unexpected keyword argument 'mask'"):
        trace(build("mlp"), {"x": x, "mask": x})


def test_too_many_positional_arguments():
    with pytest.raises(InputError, match=r"do not fit MLP\.forward\(x\): too many positional arguments"):
        trace(build("mlp"), (torch.randn(2, 8, 64), torch.randn(2)))


def test_inputs_of_no_accepted_form():
    with pytest.raises(InputError, match="example inputs are a str; pass a dict of keyword arguments, a tuple"):
        trace(build("mlp"), "x")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([MLP(), MLP()])
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layer.0.up", "layers.0.up or layers.1.up or layers.0?"),
        ("embed_weight", "embed.weight or head.weight or embed?"),
    ],
)
def test_a_pattern_that_matches_nothing(option, pattern, near):
    with pytest.raises(UnknownNameError) as caught:
        trace(Tied(), torch.zeros(2, 5, dtype=torch.long), **{option: ["head", pattern]})
    assert str(caught.value) == f"unknown module or parameter pattern {pattern!r}: did you mean {near}"


@pytest.mark.parametrize("name", ["head", "head.weight", "embed", "embed.weight", "layers.?.up", "*.norm.bias"])
def test_a_pattern_may_be_any_name_of_a_module_or_parameter(name):
    program = trace(Tied(), torch.zeros(2, 5, dtype=torch.long), include=[name], exclude=["head", name])
    assert (program.selection.include, program.selection.exclude) == ((name,), ("head", name))


def test_a_lone_string_is_one_pattern():
    assert trace(build("mlp"), inputs("mlp"), include="up").selection.include == ("up",)


class Untraceable(nn.Module):
    """Counts its calls and clamps its input, then branches on data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        self.calls += 1
        x.clamp_(-1, 1)
        return self.linear(x) if x.sum().item() > 0 else x


def test_a_failed_trace_leaves_buffers_and_inputs():
    model, x = Untraceable(), torch.randn(2, 64) * 3
    kept = x.clone()
    with pytest.raises(TraceError):
        trace(model, x)
    assert model.calls.item() == 0
    assert torch.equal(x, kept)
