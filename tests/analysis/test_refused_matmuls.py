"""find_matmuls: what is no matmul by a weight is left out, and what cannot be quantized comes with the reason."""

import pytest
import torch
from found_matmuls import FLAT, IN, OUT, Weighted, find, the_matmul, the_refusal
from models import MODELS
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from mxcompile.analysis.choice import check_coverage, choose
from mxcompile.analysis.float_tensors import find_float_tensors
from mxcompile.analysis.matmuls import find_matmuls
from mxcompile.errors import CoverageError
from mxcompile.graph.program import Program

# What is not a candidate


def test_attention_scores_are_no_candidates():
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.mT, dim=-1) @ v

    _, found, refusals = find(Attention(), *(torch.randn(2, 5, IN) for _ in range(3)))
    assert (found, refusals) == ([], [])


def test_what_forward_computes_without_a_tensor_of_its_own_is_no_candidate():
    _, found, refusals = find(Weighted((OUT,), lambda m, x: x @ torch.arange(float(IN))[:, None] + m.bias))
    assert (found, refusals) == ([], [])


# Refusals


def test_a_constant_on_the_left():
    refusal = the_refusal(Weighted((OUT, 5), lambda m, x: m.weight @ x))
    assert refusal.reason == "the weight is the left operand: blocks run along the inner dimension of a right operand"
    assert refusal.node.target is torch.ops.aten.matmul.default


def test_a_parametrized_weight_names_the_remedy():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(IN, OUT)), nn.Linear(OUT, 8))
    _, (plain,), (refusal,) = find(model)
    assert plain.parameter == "1.weight"
    assert refusal.reason == (
        "the weight is computed at run time by aten._weight_norm.default from 0.parametrizations.weight.original1, "
        "0.parametrizations.weight.original0: store it as a parameter "
        "(torch.nn.utils.parametrize.remove_parametrizations)"
    )
    assert refusal.bytes == OUT * IN * 4 + OUT * 4
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert [m.parameter for m in find(model)[1]] == ["0.weight", "1.weight"]


def test_a_weight_computed_in_forward():
    refusal = the_refusal(Weighted((OUT, IN), lambda m, x: F.linear(x, m.weight.abs())))
    assert "computed at run time by aten.abs.default from weight: store it as a parameter" in refusal.reason
    part = Weighted((2 * OUT, IN), lambda m, x: F.linear(x, m.weight.chunk(2)[1]))
    assert "computed at run time by aten.chunk.default from weight: store it as a parameter" in the_refusal(part).reason


def test_a_weight_cast_to_another_dtype():
    model = Weighted((OUT, IN), lambda m, x: F.linear(x, m.weight.to(x.dtype))).bfloat16()
    refusal = the_refusal(model, torch.randn(2, IN))
    assert refusal.reason == (
        "the weight 'weight' is cast to torch.float32 at run time, as in an autocast region: convert its module to "
        "that dtype, with .to(torch.float32)"
    )
    transposed = Weighted((OUT, IN), lambda m, x: x @ m.weight.t().float().contiguous()).bfloat16()
    assert the_refusal(transposed, torch.randn(2, IN)).reason == refusal.reason


def test_a_region_of_autocast():
    def region(model: Weighted, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, model.weight)

    model, x = Weighted((OUT, IN), region), torch.randn(2, IN)
    assert the_refusal(model, x).reason.endswith("convert its module to that dtype, with .to(torch.bfloat16)")
    the_matmul(model.to(torch.bfloat16), x.bfloat16())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "restore"),
    [
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
    ],
    ids=["remove_weight_norm", "remove_spectral_norm", "prune.remove"],
)
def test_the_function_that_stores_a_computed_weight(change, restore, request):
    layer = nn.Linear(IN, OUT).eval()
    change(layer)
    name = request.node.callspec.id
    assert the_refusal(layer, *FLAT).reason.endswith(f": store it as a parameter (torch.nn.utils.{name})")
    restore(layer)
    the_matmul(layer, *FLAT)


# Graphs within the graph

NESTED = {
    "cond": lambda m, x: torch.cond(x.sum() > 0, lambda v: v @ m.weight, lambda v: (v * 2) @ m.weight, (x,)),
    "vmapped": lambda m, x: torch.vmap(lambda row: row @ m.weight)(x),
    "map_impl": lambda m, x: map_rows(lambda row: row @ m.weight, x),
    "scan": lambda m, x: scan(lambda carry, row: (carry + 1, row @ m.weight), torch.zeros(1), x)[1],
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("map_impl", "scan") else n for n in NESTED]
)
def test_a_matmul_in_a_nested_graph_is_refused_with_its_bytes(name):
    program, found, (refusal,) = find(Weighted((IN, OUT), NESTED[name]), *FLAT)
    assert found == []
    assert refusal.reason == (
        f"{name} reads weight in a graph of its own, which no pass changes: call these layers outside of it"
    )
    assert (refusal.weights, refusal.bytes) == (("weight",), IN * OUT * 4)
    with pytest.raises(CoverageError, match=f"(?s)only 0% .*%{name}: {name} reads weight"):
        check_coverage(program, choose(program))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.cond(x.sum() > 0, lambda v: v + m.weight, lambda v: v * m.weight, (x,)),
        lambda m, x: torch.vmap(lambda row: row + m.weight)(x),
    ],
    ids=["cond", "vmapped"],
)
def test_a_nested_graph_that_only_adds_a_tensor_is_no_matmul(function, request):
    program, found, refusals = find(Weighted((10, IN), function), *FLAT)
    assert found == refusals == []
    (other,) = find_float_tensors(program, found, refusals, ())
    name = request.node.callspec.id
    assert other.reason == f"'weight' is no weight of a matmul: {name} reads it, it stays float"


def test_addmm_with_factors():
    refusal = the_refusal(Weighted((IN, OUT), lambda m, x: torch.addmm(m.bias, x, m.weight, alpha=2)), *FLAT)
    assert refusal.reason == "addmm with alpha or beta other than 1"
    assert refusal.bytes == IN * OUT * 4


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_weights_that_are_no_real_floats(dtype):
    model = nn.Linear(IN, OUT, bias=False)
    model.weight = nn.Parameter(torch.ones(OUT, IN, dtype=dtype), requires_grad=False)
    refusal = the_refusal(model, torch.ones(3, IN, dtype=dtype))
    assert refusal.reason == f"the weight is of {dtype}: only real floats are quantized"


def test_a_vector_is_no_weight():
    refusal = the_refusal(Weighted((IN,), lambda m, x: x @ m.weight))
    assert refusal.reason == "the weight is contracted over dimension -2 of 1"


def test_a_weight_contracted_over_its_first_dimension_of_three():
    model = Weighted((IN, 2, OUT), lambda m, x: torch.bmm(x, m.weight.transpose(0, 1)))
    assert the_refusal(model).reason == "the weight is contracted over dimension -3 of 3"


@pytest.mark.parametrize(
    ("convolution", "dims"),
    [
        (nn.Conv1d(3, 8, 3), 1),
        (nn.Conv2d(3, 8, 3), 2),
        (nn.Conv3d(3, 8, 3), 3),
        (nn.Conv2d(3, 8, 3, padding="same"), 2),
        (nn.Conv1d(3, 8, 3, padding="same"), 1),
        (nn.Conv3d(3, 8, 3, padding="same"), 3),
        (nn.ConvTranspose1d(3, 8, 3), 1),
        (nn.ConvTranspose2d(3, 8, 3), 2),
    ],
    ids=str,
)
def test_convolutions_are_reported(convolution, dims):
    refusal = the_refusal(convolution, torch.randn(2, 3, *[8] * dims))
    assert refusal.reason == "a convolution: MX quantization covers matmuls only, it stays float"
    assert refusal.bytes == convolution.weight.numel() * 4


def test_the_patch_embedding_of_vit_is_reported(traced):
    _, (refusal,) = find_matmuls(traced("vit"))
    assert refusal.node.target is torch.ops.aten.conv2d.default


class Stored(nn.Module):
    """A tensor that is no parameter, and a forward given as a function."""

    def __init__(self, function, buffer: bool) -> None:
        super().__init__()
        self.function = function
        if buffer:
            self.register_buffer("table", torch.randn(IN, IN))
        else:
            self.table = torch.randn(IN, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_weight_that_is_no_parameter(buffer):
    refusal = the_refusal(Stored(lambda m, x: x @ m.table, buffer))
    assert refusal.weights == ("table",)
    assert refusal.bytes == IN * IN * 4
    assert refusal.reason == (
        "the weight 'table' is a buffer or a constant, which are not quantized: make it an nn.Parameter "
        "(requires_grad=False will do)"
    )
    assert "computed at run time by aten.abs" in the_refusal(Stored(lambda m, x: x @ m.table.abs(), buffer)).reason


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.layer = kind(IN, IN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


OTHER_PRODUCTS = {  # a model and the names of the weights that it multiplies by
    "einsum": (Weighted((OUT, IN), lambda m, x: torch.einsum("bti,oi->bto", x, m.weight)), ["weight"]),
    "tensordot": (Weighted((OUT, IN), lambda m, x: torch.tensordot(x, m.weight, ([2], [1]))), ["weight"]),
    "bilinear": (Weighted((4, IN, IN), lambda m, x: F.bilinear(x, x, m.weight)), ["weight"]),
    "lstm": (Recurrent(nn.LSTM), ["layer.weight_ih_l0", "layer.weight_hh_l0"]),
    "gru": (Recurrent(nn.GRU), ["layer.weight_ih_l0", "layer.weight_hh_l0"]),
    "mv": (Weighted((OUT, IN), lambda m, x: torch.mv(m.weight, x[0, 0])), ["weight"]),
    "addmv": (Weighted((OUT, IN), lambda m, x: torch.addmv(m.bias, m.weight, x[0, 0])), ["weight"]),
    "chain of matrices": (Weighted((IN, OUT), lambda m, x: torch.linalg.multi_dot([x[0], m.weight])), ["weight"]),
    "distances": (Weighted((OUT, IN), lambda m, x: torch.cdist(x, m.weight.expand(2, -1, -1))), ["weight"]),
    "solve": (Weighted((5, 5), lambda m, x: torch.linalg.solve(m.weight, x)), ["weight"]),
    "selected matrices": (Weighted((3, IN, OUT), lambda m, x: x @ m.weight[x[:, 0, 0].long() * 0]), ["weight"]),
    "low rank": (
        Weighted((IN, 4), lambda m, x: x @ (m.weight @ m.weight.new_ones(4, IN) + m.weight @ m.weight.t())),
        ["weight"],
    ),
    "joined": (Weighted((IN, OUT), lambda m, x: x @ torch.cat([m.weight, m.weight], 1)), ["weight"]),
    "reshaped": (Weighted((2, OUT, IN), lambda m, x: F.linear(x, m.weight.reshape(-1, IN))), ["weight"]),
    "a slice": (Weighted((OUT, IN), lambda m, x: F.linear(x, m.weight[:8])), ["weight"]),
    "indexed": (Weighted((OUT, IN), lambda m, x: F.linear(x, m.weight[[0, 2]])), ["weight"]),
    "cast to the input's": (Weighted((OUT, IN), lambda m, x: F.linear(x, m.weight.double().type_as(x))), ["weight"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights")
@pytest.mark.parametrize("name", OTHER_PRODUCTS)
def test_every_other_product_by_a_weight_is_reported(name):
    model, weights = OTHER_PRODUCTS[name]
    program, found, (refusal,) = find(model)
    assert found == []
    assert set(weights) <= set(refusal.weights)
    assert refusal.bytes == sum(model.get_parameter(weight).numel() * 4 for weight in refusal.weights)
    assert weights[0] in refusal.reason
    check_nothing_is_silent(program)


def test_the_factors_of_a_low_rank_update_belong_to_the_weight():
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(IN, IN, bias=False)
            self.down, self.up = nn.Parameter(torch.randn(4, IN)), nn.Parameter(torch.randn(IN, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight + self.up @ self.down)

    assert set(the_refusal(LowRank()).weights) == {"weight", "up", "down"}


def test_learned_inputs_of_a_linear_are_no_weights():
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(3, IN))
            self.key = nn.Linear(IN, IN)

        def forward(self, x: Tensor) -> Tensor:
            return self.key(x) @ self.key(self.queries).mT

    _, found, refusals = find(Queries())
    assert [matmul.parameter for matmul in found] == ["key.weight"] * 2
    assert refusals == []


@torch.library.custom_op("mxcompile_tests::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


def test_an_unknown_operator_counts_as_a_product():
    refusal = the_refusal(Weighted((IN, OUT), lambda m, x: project(x, m.weight)))
    assert refusal.reason == (
        "mxcompile_tests.project.default reads weight in float: only F.linear, x @ w, addmm, bmm and grouped_mm take "
        "MX weights"
    )
    assert refusal.bytes == IN * OUT * 4


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.weight[:5],
        lambda m, x: torch.where(m.weight[:5] > 0, x, 0 * m.weight[:5]),
        lambda m, x: torch.cat([m.weight[:1].expand(2, 1, IN), x], 1),
        lambda m, x: F.scaled_dot_product_attention(x, x, x, m.weight[:5, :5]),
        lambda m, x: F.layer_norm(x, (5, IN), m.weight[:5]),
        lambda m, x: m.weight[x[..., 0].long() * 0] * x,
    ],
    ids=["added", "selected", "joined", "mask", "norm", "looked up"],
)
def test_tables_and_masks_are_no_products(function):
    program, found, refusals = find(Weighted((OUT, IN), function))
    assert (found, refusals) == ([], [])
    (listed,) = find_float_tensors(program, found, refusals, ())
    assert listed.weights == ("weight",)
    assert listed.bytes == OUT * IN * 4
    check_nothing_is_silent(program)
    assert "'weight' is no weight of a matmul: aten." in listed.reason


def test_a_cache_that_forward_writes_is_no_weight():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 5, IN))

        def forward(self, x: Tensor) -> Tensor:
            self.cache.copy_(x)
            return x @ self.cache.mT

    program, found, refusals = find(Cached())
    assert (found, refusals) == ([], [])
    assert find_float_tensors(program, found, refusals, ()) == []


def check_nothing_is_silent(program: Program) -> None:
    """Every float tensor of two or more dimensions is quantized or a miss with its bytes."""
    choice = choose(program)
    listed = {weight for each in (*choice.unsupported, *choice.skipped, *choice.others) for weight in each.weights}
    tensors = {name: program.tensor(name) for name in program.parameter_names()}
    expected = {name for name, tensor in tensors.items() if tensor.dim() >= 2 and tensor.is_floating_point()}
    assert {matmul.parameter for matmul in choice.matmuls} | listed == expected
    assert all(miss.bytes for miss in choice.misses)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_two_or_more_dimensions_is_quantized_or_a_miss(name, traced):
    check_nothing_is_silent(traced(name))
