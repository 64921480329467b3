"""MXWeight: replaces a float weight in every kind of matmul, supports copies, and rejects other operations."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mxcompile.analysis.folds.multiplier import multiplier_digest
from mxcompile.errors import MXCompileError
from mxcompile.formats import MXINT4, MXINT8, ScaleRule
from mxcompile.numerics import hadamard, packing, reference
from mxcompile.tensor.weight import MXLayout, MXWeight, unfused_matmuls


def pack(
    rows: Tensor, activation: str | None = None, transposed: bool = False, multiplier: Tensor | None = None
) -> MXWeight:
    codes, scales = reference.quantize(rows, MXINT4, ScaleRule.MSE)
    name = None if multiplier is None else multiplier_digest(multiplier)
    layout = MXLayout("mxint4", rows.shape[-1], transposed, activation, "floor" if activation else None, name)
    return MXWeight(packing.pack(codes, MXINT4), scales, layout, rows.dtype, multiplier)


@pytest.fixture
def rows():
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x():
    """More rows than the CPU kernels accumulate in their own order (`tests/kernels/test_cpu_linears.py`)."""
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def multiplier():
    return torch.rand(40, generator=torch.Generator().manual_seed(2)) + 0.5


def test_looks_like_the_weight_it_stands_for(rows):
    weight, swapped = pack(rows), pack(rows, transposed=True)
    assert (weight.shape, weight.dtype, weight.device) == (rows.shape, rows.dtype, rows.device)
    assert swapped.shape == (40, 24)
    assert torch.equal(swapped.dequantize(), weight.dequantize().T)
    assert weight.packed_bytes == 24 * 2 * (16 + 1)


@pytest.mark.parametrize("activation", [None, "mxint8"])
@pytest.mark.parametrize("multiplied", [False, True], ids=["", "multiplied"])
def test_every_matmul_gives_what_linear_gives(rows, x, multiplier, activation, multiplied):
    vector = multiplier if multiplied else None
    weight, inner_first = pack(rows, activation, False, vector), pack(rows, activation, True, vector)
    prepared = x if vector is None else x * vector
    if activation is not None:
        prepared = reference.quantize_dequantize(prepared, MXINT8, ScaleRule.FLOOR)
    expected = prepared @ weight.dequantize().T
    bias = torch.randn(24)
    results = {
        "linear": F.linear(x, weight),
        "matmul": torch.matmul(x, inner_first),
        "@": x @ inner_first,
        "mm": torch.mm(x, inner_first),
        "method mm": x.mm(inner_first),
        "@ t()": x @ weight.t(),
        "@ T": x @ weight.T,
        "@ mT": x @ weight.mT,
        "@ transpose": x @ weight.transpose(0, 1),
    }
    for name, result in results.items():
        assert torch.equal(result, expected), name
    assert torch.equal(F.linear(x, weight, bias), torch.addmm(bias, x, inner_first))
    assert torch.equal(F.linear(x, weight, bias=bias), F.linear(prepared, weight.dequantize(), bias))


def test_few_rows(rows, x):
    """One row runs a fused kernel, within float32 accumulation error."""
    weight = pack(rows, "mxint8")
    expected = torch.matmul(weight.prepare(x), weight.dequantize().T)
    torch.testing.assert_close(F.linear(x[:1], weight), expected[:1], rtol=0, atol=1e-5)


def test_batched_matmul_with_a_three_dimensional_weight(x):
    experts = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(2))
    weight = pack(experts)
    batch = x.expand(4, 6, 40)
    wanted = batch @ weight.dequantize().mT  # which adds in another order
    torch.testing.assert_close(torch.bmm(batch, weight.transpose(-2, -1)), wanted, rtol=1e-6, atol=1e-5)
    with unfused_matmuls():
        assert torch.equal(torch.bmm(batch, weight.transpose(-2, -1)), wanted)


def test_a_multiplier_serves_all_experts(x, multiplier):
    experts = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(2))
    weight, plain = pack(experts, multiplier=multiplier), pack(experts)
    batch = x.expand(4, 6, 40)
    wanted = torch.bmm(batch * multiplier, plain.transpose(-2, -1))
    assert torch.equal(torch.bmm(batch, weight.transpose(-2, -1)), wanted)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.bmm(batch, weight.transpose(-2, -1)), wanted)


def test_a_multiplier_is_part_of_the_weight(rows, multiplier):
    weight = pack(rows, multiplier=multiplier)
    assert weight.packed_bytes == pack(rows).packed_bytes + 40 * 4
    assert f"multiplier='{multiplier_digest(multiplier)}'" in repr(weight)
    assert weight._stable_hash_for_caching() != pack(rows)._stable_hash_for_caching()
    assert weight._stable_hash_for_caching() != pack(rows, multiplier=-multiplier)._stable_hash_for_caching()
    names, spec = weight.__tensor_flatten__()
    again = MXWeight.__tensor_unflatten__({name: getattr(weight, name) for name in names}, spec)
    assert (names, again.multiplier is multiplier) == (["elements", "scales", "multiplier"], True)


def test_unfused_matmuls_run_no_fused_kernel(rows, x, monkeypatch):
    """One token, which the CPU kernel would accumulate in its own order."""
    weight = pack(rows, "mxint8")
    wanted = F.linear(weight.prepare(x[:1]), weight.dequantize())
    monkeypatch.setattr("mxcompile.tensor.operators.LINEARS", lambda *_: pytest.fail("a kernel was called"))
    with unfused_matmuls():
        assert torch.equal(F.linear(x[:1], weight), wanted)
    with pytest.raises(pytest.fail.Exception):
        F.linear(x[:1], weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_rounded_where_only_shapes_count(rows, x, transposed):
    called: list[str] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.namespace)
            return func(*args, **(kwargs or {}))

    weight, mode = pack(rows, "mxint8", transposed), FakeTensorMode()
    fake = MXWeight(*map(mode.from_tensor, (weight.elements, weight.scales)), weight.layout_, weight.dtype)
    multiply = torch.matmul if transposed else F.linear
    with Watched():
        y = multiply(mode.from_tensor(x), fake)
    assert (y.shape, y.dtype, y.stride()) == ((6, 24), x.dtype, multiply(x, weight).stride())
    assert "aten" in called
    assert "mx" not in called
    traced = make_fx(multiply, tracing_mode="fake")(x, weight)
    assert [node for node in traced.graph.nodes if str(node.target).startswith("mx.")]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(40,), (6, 40), (2, 3, 40), (0, 40), (2, 1, 3, 40)])
def test_a_linear_run_for_shapes_gives_what_torchs_linear_gives(rows, sizes, biased):
    """Also with a bias, and of inputs that are not contiguous; what does not fit is refused as there."""
    weight, mode = pack(rows, "mxint8"), FakeTensorMode()
    fake = MXWeight(*map(mode.from_tensor, weight.parts), weight.layout_, weight.dtype)
    bias = torch.zeros(24) if biased else None
    x = torch.randn(sizes)
    inputs = [x, x.mT.contiguous().mT] if x.dim() > 1 else [x]
    for each in inputs:
        expected = F.linear(each, weight.dequantize(), bias)
        y = F.linear(mode.from_tensor(each), fake, None if bias is None else mode.from_tensor(bias))
        assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    for refused, other in ((x[..., :32], bias), (x, torch.zeros(23))):
        with pytest.raises((RuntimeError, ValueError)):
            F.linear(mode.from_tensor(refused), fake, None if other is None else mode.from_tensor(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(mode.from_tensor(x), fake).dtype == F.linear(x, weight.dequantize()).dtype


def test_torchs_own_attention_reaches_its_weights():
    """F.multi_head_attention_forward disables __torch_function__: the weights see transpose, expand and bmm."""
    attention = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    weights = {name: pack(value.detach()) for name, value in attention.named_parameters() if value.dim() == 2}
    with torch.no_grad():
        plain = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
        plain.load_state_dict({**attention.state_dict(), **{name: w.dequantize() for name, w in weights.items()}})
        for name, weight in weights.items():
            owner = attention.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(weight, requires_grad=False))
        torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0], rtol=0, atol=1e-6)


def test_embedding_decodes_only_the_rows_it_looks_up(rows):
    ids = torch.tensor([[1, 5], [23, 0]])
    weight = pack(rows)
    assert torch.equal(F.embedding(ids, weight, padding_idx=0), weight.dequantize()[ids])


def test_copies_and_moves(rows, multiplier):
    weight = torch.nn.Parameter(pack(rows, "mxint8", multiplier=multiplier), requires_grad=False)
    for copied in (copy.deepcopy(weight), weight.clone(), weight.detach(), weight.to("cpu", copy=True)):
        assert isinstance(copied, MXWeight)
        assert copied.layout_ == weight.layout_
        assert torch.equal(copied.dequantize(), weight.dequantize())
        assert torch.equal(copied.multiplier, multiplier)
    copied = copy.deepcopy(weight)
    for part in copied.parts:
        part.zero_()
    assert all(part.any() for part in weight.parts)
    assert [part.device.type for part in weight.to("meta").parts] == ["meta"] * 3


def test_casting_changes_what_it_decodes_to_not_what_it_holds(rows):
    module = torch.nn.Linear(40, 24)
    module.weight = torch.nn.Parameter(pack(rows), requires_grad=False)
    elements = module.weight.elements
    module.to(torch.bfloat16)
    assert isinstance(module.weight, MXWeight)
    assert module.weight.dequantize().dtype == torch.bfloat16
    assert torch.equal(module.weight.elements, elements)
    assert torch.equal(module.weight.dequantize().float(), pack(rows).dequantize())


def test_casting_a_multiplier_changes_its_name(rows, x, multiplier):
    """After rounding, its values no longer match the digest, whatever it is cast to later."""
    weight = pack(rows, multiplier=multiplier)
    half = weight.to(torch.bfloat16)
    assert (half.multiplier.dtype, half.elements.dtype) == (torch.bfloat16, torch.uint8)
    assert half.layout_.multiplier == f"{multiplier_digest(multiplier)} as torch.bfloat16"
    assert torch.equal(F.linear(x.bfloat16(), half), F.linear(x.bfloat16() * multiplier.bfloat16(), half.dequantize()))
    assert half.float().layout_.multiplier != weight.layout_.multiplier
    assert weight.float().layout_ == weight.layout_


@pytest.mark.parametrize("multiplied", [False, True], ids=["", "multiplied"])
def test_survives_torch_save_and_load_state_dict(rows, x, multiplier, multiplied):
    module, other = torch.nn.Linear(40, 24), torch.nn.Linear(40, 24)
    for target, values in ((module, rows), (other, -rows)):
        weight = pack(values, multiplier=multiplier if multiplied else None)
        target.weight = torch.nn.Parameter(weight, requires_grad=False)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other.weight.dequantize(), module.weight.dequantize())
    assert torch.equal(other(x), module(x))


def test_weights_with_other_multipliers_take_each_other_s_place_but_are_not_written_over(rows, x, multiplier):
    """A compiled graph has merged multipliers of one name, and looks at a weight again only if it is another one."""
    module, other = torch.nn.Linear(40, 24), torch.nn.Linear(40, 24)
    for target, vector in ((module, multiplier), (other, -multiplier)):
        target.weight = torch.nn.Parameter(pack(rows, multiplier=vector), requires_grad=False)
    with pytest.raises(
        RuntimeError, match=r"cannot copy MXLayout.* into MXLayout.*load_state_dict\(..., assign=True\)"
    ):
        other.load_state_dict(module.state_dict())
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("multiplied", [False, True], ids=["", "multiplied"])
def test_exports(rows, x, multiplier, multiplied):
    module = torch.nn.Linear(40, 24, bias=False)
    weight = pack(rows, "mxint8", multiplier=multiplier if multiplied else None)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    exported = torch.export.export(module, (x,), strict=False)
    targets = [str(node.target) for node in exported.graph.nodes if "mx." in str(node.target)]
    rest = ["mx.quantize.default", "mx.dequantize.default", "mx.dequantize.default"]
    assert targets == ["mx.multiply.default"] * multiplied + rest
    assert torch.equal(exported.module()(x), module(x))


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (
            lambda w, x: torch.baddbmm(w, x[None, :, :1], x[None, :1], alpha=2.0),
            r"^baddbmm is not defined on an MXWeight: .* as peft's target_parameters does, call dequantize\(\)",
        ),
        (lambda w, x: w + 1, r"aten.add.Tensor is not defined on an MXWeight.*dequantize\(\)"),
        (lambda w, x: w @ x.T, "can only be the right operand"),
        (lambda w, x: w.transpose(0, 0), "only the last two dimensions"),
        (
            lambda w, x: w.copy_(torch.zeros(24, 40)),
            r"cannot be copied into an MXWeight \(\[24, 40\], .*quantize that again",
        ),
        (lambda w, x: setattr(w, "data", torch.zeros(24, 40)), r"\.data of an MXWeight .* cannot be set: replace"),
        (lambda w, x: setattr(w, "data", pack(torch.zeros(24, 40))), r"\.data of an MXWeight .* cannot be set"),
        (lambda w, x: w.copy_(pack(torch.zeros(24, 40), multiplier=x[0])), "cannot copy MXLayout"),
    ],
)
def test_refuses_other_arithmetic_by_name(rows, x, operation, words):
    with pytest.raises(MXCompileError, match=words):
        operation(pack(rows), x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_multiplier", [False, True])
@pytest.mark.parametrize("rotation", [None, 8])
def test_the_float_weight_gives_the_same_matmul_without_preparing_its_input(
    rows, x, multiplier, rotation, with_multiplier, transposed
):
    """Both in float32: 40 products of about 1, summed in another order."""
    packed = pack(rows, transposed=transposed)
    layout = replace(packed.layout_, rotation=rotation, multiplier="m" if with_multiplier else None)
    weight = MXWeight(packed.elements, packed.scales, layout, rows.dtype, multiplier if with_multiplier else None)
    plain = weight.float_weight()
    assert (type(plain), plain.shape, plain.dtype) == (torch.Tensor, weight.shape, weight.dtype)
    columns = plain if transposed else plain.T
    torch.testing.assert_close(x @ (weight if transposed else weight.T), x @ columns, rtol=1e-5, atol=1e-5)


def test_a_weight_made_of_another_as_accelerate_makes_parameters(rows, multiplier):
    packed = pack(rows)
    layout = replace(packed.layout_, multiplier="m")
    weight = MXWeight(packed.elements, packed.scales, layout, rows.dtype, multiplier)
    again = MXWeight(weight, requires_grad=False)
    assert all(one is other for one, other in zip(again.parts, weight.parts, strict=True))
    assert (again.layout_, again.dtype, again.requires_grad) == (weight.layout_, weight.dtype, False)
    assert weight.data_ptr() == again.data_ptr() != pack(rows).data_ptr()


def test_writers_of_float_files_are_told(rows, tmp_path):
    from safetensors.torch import save_file

    weight = pack(rows)
    for write in (weight.numpy, lambda: save_file({"w": weight}, tmp_path / "w.safetensors")):
        with pytest.raises(MXCompileError, match=r"MXWeight \(\[24, 40\], .*save the model with mxcompile.save"):
            write()


def test_in_shared_memory(rows, x):
    """As models are given to worker processes."""
    module = torch.nn.Linear(40, 24, bias=False)
    module.weight = torch.nn.Parameter(pack(rows), requires_grad=False)
    expected = module(x)
    assert not module.weight.is_shared()
    module.share_memory()
    assert module.weight.is_shared()
    assert all(part.is_shared() for part in module.weight.parts)
    assert torch.equal(module(x), expected)


# Gradients

MATMULS = {
    "linear": (False, F.linear),
    "linear in steps": (False, lambda x, w: torch.matmul(x, w.t())),
    "matmul": (True, torch.matmul),
    "addmm": (True, lambda x, w: torch.addmm(torch.zeros(24), x, w)),
    "bmm": (True, lambda x, w: torch.bmm(x[None], w)[0]),
}


@pytest.mark.parametrize("form", MATMULS)
@pytest.mark.parametrize("activation", [None, "mxint8"])
def test_rounding_passes_gradients_unchanged(rows, x, multiplier, activation, form):
    """The gradient is that of the dequantized weight on the multiplied and rotated, unrounded input."""
    transposed, matmul = MATMULS[form]
    weight = pack(rows, activation, transposed, multiplier)
    elements, scales = [part[None] for part in weight.parts[:2]] if form == "bmm" else weight.parts[:2]
    rotated = MXWeight(elements, scales, replace(weight.layout_, rotation=8), weight.dtype, multiplier)
    wanted, plain, upstream = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(6, 24)
    matmul(wanted, rotated).backward(upstream)
    values = pack(rows).dequantize()
    F.linear(hadamard.rotate_input(plain * multiplier, 8), values).backward(upstream)
    torch.testing.assert_close(wanted.grad, plain.grad, rtol=0, atol=1e-5)  # sums of 24 products of size 1


@pytest.mark.parametrize("activation", [None, "mxint8"])
def test_a_bias_gets_its_gradient(rows, x, activation):
    bias = torch.zeros(24, requires_grad=True)
    F.linear(x, pack(rows, activation), bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 6.0))


def test_results_with_and_without_gradients_are_equal(rows, x):
    weight = pack(rows, "mxint8")
    torch.testing.assert_close(F.linear(x.clone().requires_grad_(), weight), F.linear(x, weight), rtol=0, atol=1e-5)


def test_the_backward_pass_keeps_no_float_weight(rows, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        F.linear(x.clone().requires_grad_(), pack(rows, "mxint8"))
    assert [tensor.shape for tensor in kept if tensor.dtype != torch.uint8] == [x.shape]  # where x saturates


def test_checkpointing_and_autocast(rows, x):
    weight, wanted = pack(rows, "mxint8"), x.clone().requires_grad_()
    F.linear(wanted, weight).square().sum().backward()
    again = x.clone().requires_grad_()
    checkpoint(lambda value: F.linear(value, weight).square().sum(), again, use_reentrant=False).backward()
    assert torch.equal(wanted.grad, again.grad)
    low = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        F.linear(low.bfloat16(), weight).float().square().sum().backward()
    torch.testing.assert_close(low.grad, wanted.grad, rtol=0, atol=0.02 * wanted.grad.abs().max().item())


def test_an_adapter_in_front_and_beside_it_trains(rows, x):
    """As LoRA does: the weight stays, two small matrices beside it learn, and a vector in front of it."""
    weight, target = pack(rows, "mxint8"), torch.randn(6, 24)
    down, up = torch.randn(4, 40).div(6).requires_grad_(), torch.zeros(24, 4).requires_grad_()
    offset = torch.zeros(40, requires_grad=True)
    optimizer = torch.optim.Adam([down, up, offset], lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = x + offset
        loss = (F.linear(value, weight) + value @ down.T @ up.T - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert offset.abs().min() > 0


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["linear", "matmul", "bmm"])
def test_forward_mode_derivatives_are_refused(rows, x, form):
    transposed, multiply = MATMULS[form]
    weight = pack(rows, transposed=transposed)
    with pytest.raises(MXCompileError, match=r"forward-mode derivatives .* do not pass an MXWeight .*\[.*reverse mode"):
        torch.func.jvp(lambda value: multiply(value, weight), (x,), (torch.ones_like(x),))


def test_a_weight_cannot_be_trained(rows):
    module = torch.nn.Linear(40, 24)
    module.weight = torch.nn.Parameter(pack(rows), requires_grad=False)
    with pytest.raises(MXCompileError, match="cannot be trained: train other parameters"):
        module.requires_grad_(True)
    with pytest.raises(MXCompileError, match="cannot be trained"):
        module.weight.requires_grad = True
    with pytest.raises(MXCompileError, match="cannot be trained"):
        torch.nn.Parameter(pack(rows))
    assert not module.requires_grad_(False).weight.requires_grad
