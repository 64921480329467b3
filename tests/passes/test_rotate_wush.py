"""rotate{kind=wush}: a matrix for each block, from the graph to the deployed, compiled, saved and exported module."""

import copy

import pytest
import torch
from models import build, inputs, output
from torch import nn

import mxcompile
from mxcompile.analysis.choice import choose
from mxcompile.analysis.folds.multiplier import multiplier_of
from mxcompile.analysis.folds.rotation import rotation_of
from mxcompile.graph.printer import print_program
from mxcompile.inductor.rewrites.fuse import fuse
from mxcompile.numerics.metrics import sqnr_db
from mxcompile.ops import MULTIPLY, QUANTIZE_DEQUANTIZE
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.weight import MXWeight

HADAMARD = "rotate{weight=mxfp4,activation=mxfp4}"
WUSH = "rotate{weight=mxfp4,activation=mxfp4,kind=wush}"
REST = "round-weights{format=mxfp4} | lower-mx{weight=mxfp4,activation=mxfp4}"


class Uneven(nn.Module):
    """Two linears on a value whose channels, and the weights' columns, are of very different sizes."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.gain = nn.Buffer(torch.exp(torch.randn(size)))
        self.first, self.second = nn.Linear(size, 48), nn.Linear(size, 16, bias=False)
        with torch.no_grad():
            for linear in (self.first, self.second):
                linear.weight *= torch.exp(torch.randn(size))

    def forward(self, x):
        h = torch.tanh(x) * self.gain
        return torch.cat((self.first(h), self.second(h)), -1)


@pytest.fixture(name="uneven")
def uneven_program():
    """(model, batches, program)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batches = Uneven().eval(), [torch.randn(128, 64) for _ in range(3)]
    return model, batches, mxcompile.trace(model, batches[0])


def lowered_and_deployed(uneven):
    model, batches, program = uneven
    lowered = Pipeline.parse(f"{WUSH} | {REST}").run(program, batches)
    return lowered, mxcompile.deploy(lowered, model)


def test_graph_before_and_after(uneven):
    _, batches, program = uneven
    after = Pipeline.parse(WUSH).run(program, batches)
    lines = [line for line in print_program(after).splitlines() if "aten.linear" in line or "transform" in line]
    assert [line.split()[0] for line in lines if " = " in line] == [
        *("%first_weight_input_transform", "%mul_transformed", "%linear"),
        *("%second_weight_input_transform", "%mul_transformed_1", "%linear_1"),
    ]
    assert all("%mul_transformed" in line for line in lines if "aten.linear(" in line)
    record = after.ledger[0]
    assert record.rewrites == 2  # one for each segment
    assert record.misses == ()
    assert record.preserved_db > 110
    assert all(numbers["error_over_plain"] < 0.6 for numbers in record.numbers.values())


def test_twice_is_once(uneven):
    _, batches, program = uneven
    once = Pipeline.parse(WUSH).run(program, batches)
    for text in (WUSH, HADAMARD):
        twice = Pipeline.parse(text).run(once, batches)
        assert print_program(once) == print_program(twice)
        assert twice.ledger[1].rewrites == 0


def test_quantized_outputs_are_better(uneven):
    model, batches, program = uneven
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        wanted = model(x)
    plain, rotated, transformed = (
        sqnr_db(wanted, Pipeline.parse(f"{text}{REST}").run(program, batches)(x))
        for text in ("", f"{HADAMARD} | ", f"{WUSH} | ")
    )
    assert transformed > max(plain, rotated) + 1


def test_where_hadamard_does_as_well_it_is_taken(uneven):
    """Even inputs and weights with an outlier channel, as Hadamard's rotation is made for."""
    _, _, program = uneven
    gain = torch.where(torch.arange(64) % 32 == 5, 30.0, 1.0)
    program.set_tensor("gain", gain)
    for name in ("first.weight", "second.weight"):
        program.set_tensor(name, torch.ones_like(program.tensor(name)) * torch.where(gain > 1, 1 / 30, 1.0))
    even = [torch.randn(128, 64, generator=torch.Generator().manual_seed(1))]
    after = Pipeline.parse(WUSH).run(program, even)
    kinds = [(rotation_of(m.activation), m.activation.target is MULTIPLY) for m in choose(after).matmuls]
    assert all(is_transformed or block in (32, None) for block, is_transformed in kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_keep_their_function_and_deploy(name, dtype):
    """gpt2's GELU gets a multiplier from awq-fold, which the matrices absorb."""
    model, batches = build(name, dtype), [inputs(name, 4, 16, seed=seed) for seed in range(2)]
    before = copy.deepcopy(model.state_dict())
    text = f"awq-fold{{weight=mxfp4,activation=mxfp4}} | {WUSH} | {REST}"
    lowered = Pipeline.parse(text).run(mxcompile.trace(model, batches[0]), batches)
    record = lowered.ledger[1]
    assert record.rewrites >= 1
    assert record.preserved_db > (100 if dtype is torch.float32 else 35)
    deployed = mxcompile.deploy(lowered, model)  # compares with the program
    weights = [p for p in deployed.parameters() if isinstance(p, MXWeight) and p.multiplier is not None]
    matrices = [weight for weight in weights if weight.multiplier.dim() == 3]
    assert matrices
    for weight in matrices:
        assert weight.layout_.multiplier.startswith("32:")
        assert tuple(weight.multiplier.shape) == weight.layout_.multiplier_shape
        assert weight.multiplier.dtype == dtype
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_multiplier_is_absorbed():
    batches = [inputs("gpt2", 4, 16, seed=seed) for seed in range(2)]
    program = mxcompile.trace(build("gpt2"), batches[0])
    folded = Pipeline.parse("awq-fold{weight=mxfp4,activation=mxfp4}").run(program, batches)
    assert any("input_multiplier" in name for name in folded.parameter_names())
    after = Pipeline.parse(WUSH).run(folded, batches)
    transformed = [m for m in choose(after).matmuls if m.activation.target is MULTIPLY]
    assert transformed
    for matmul in transformed:
        assert multiplier_of(after, matmul.activation.args[0]) is None


def test_experts_are_rotated_as_without_it():
    """Each expert would need a matrix of its own."""
    batches = [inputs("mixtral", 4, 16, seed=seed) for seed in range(2)]
    after = Pipeline.parse(f"{WUSH} | {REST}").run(mxcompile.trace(build("mixtral"), batches[0]), batches)
    weights = mxcompile.deploy(after, build("mixtral")).parameters()
    experts = [p for p in weights if isinstance(p, MXWeight) and p.dim() == 3]
    assert experts
    assert all(p.multiplier is None or p.multiplier.dim() == 1 for p in experts)


def test_deployed_module_and_program_compute_the_same_bits(uneven):
    lowered, deployed = lowered_and_deployed(uneven)
    with torch.no_grad():
        assert torch.equal(output(deployed(uneven[1][1])), lowered(uneven[1][1]))


def test_readers_share_one_transform_when_fused():
    """q, k and v have one, and so have gate and up."""
    model, batches = build("llama"), [inputs("llama", 4, 16, seed=seed) for seed in range(2)]
    lowered = Pipeline.parse(f"{WUSH} | {REST}").run(mxcompile.trace(model, batches[0]), batches)
    deployed = mxcompile.deploy(lowered, model)
    values = {weight.layout_.multiplier for weight in deployed.parameters() if isinstance(weight, MXWeight)} - {None}
    graph = (
        torch.export.export(deployed, (), {**batches[0], "use_cache": False}, strict=False).run_decompositions({}).graph
    )
    before = len(graph.find_nodes(op="call_function", target=MULTIPLY))
    result = fuse(graph)
    products = graph.find_nodes(op="call_function", target=MULTIPLY)
    assert len(products) == len(values) < before
    assert not [miss for miss in result.misses if "multiply" in miss.reason]
    assert all(QUANTIZE_DEQUANTIZE in {user.target for user in product.users} for product in products)


def test_compiled_module_computes_the_same(uneven):
    _, deployed = lowered_and_deployed(uneven)
    with torch.no_grad():
        wanted = deployed(uneven[1][1])
        compiled = torch.compile(deployed, backend="aot_eager")(uneven[1][1])
    assert sqnr_db(wanted, compiled) > 100


def test_saved_and_loaded_it_is_the_same(uneven, tmp_path):
    _, deployed = lowered_and_deployed(uneven)
    mxcompile.save(deployed, tmp_path)
    loaded = mxcompile.load(tmp_path, model=Uneven())
    with torch.no_grad():
        assert torch.equal(deployed(uneven[1][1]), loaded(uneven[1][1]))


def test_float_weight_undoes_the_transform(uneven):
    """The weight that gives the same product with an input that is not transformed."""
    model, batches, program = uneven
    plain = Pipeline.parse(f"{WUSH} | round-weights{{format=mxint8}} | lower-mx{{weight=mxint8}}")
    deployed = mxcompile.deploy(plain.run(program, batches), model)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        weight = deployed.first.weight
        assert weight.is_prepared
        wanted = nn.functional.linear(x, weight)
        assert sqnr_db(wanted, x @ weight.float_weight().T) > 100


def test_an_interrupted_run_continues_with_the_same_bits(uneven, tmp_path):
    _, batches, program = uneven
    whole, resumed = (Pipeline.parse(WUSH).run(program, batches, resume=tmp_path) for _ in range(2))
    assert print_program(whole) == print_program(resumed)


def test_training_goes_through_the_transform(uneven):
    _, batches, program = uneven
    text = f"{WUSH} | round-weights{{format=mxfp4}} | tune-vectors{{activation=mxfp4,steps=2}}"
    tuned = Pipeline.parse(text).run(program, batches)
    assert tuned.ledger[-1].name == "tune-vectors"
    assert "all vectors" in tuned.ledger[-1].numbers
